"""`kdpipe estimate NAME`: before caching, what each encoding would cost and lose, on a sample of the real rows.

Nothing is written but a file that measures the disk, which is removed. Shapes: B rows, P positions (rows, or tokens of
rows), C classes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe import durable
from kdpipe.data.prepared import PreparedData, PreparedInputs
from kdpipe.distributed import cpu_threads
from kdpipe.encodings import TargetEncoding
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.estimating import (
    Needs,
    Offer,
    Recommendation,
    Sample,
    candidates,
    measure,
    profiled,
    recommend,
    shard_rows_of,
    title_of,
)
from kdpipe.fingerprint import uniform_by_id
from kdpipe.losses import LossTerm
from kdpipe.store.manifest import COVERED, STATISTICS
from kdpipe.targets import OutputSpec
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import CLASS_IDS, Teacher, abstains
from kdpipe.views import row_keys
from kdpipe_stages.building import encodings_of
from kdpipe_stages.params import PARAMETERS, TargetsSection
from kdpipe_stages.project import Project
from kdpipe_stages.teachers import build_teacher
from kdpipe_stages.terms import Stored, check_term, loss_term

SAMPLE_ROWS = 512
MAX_LOGITS = 2**22
"""Numbers that are measured: positions times classes. Positions are taken evenly from more of them."""
PROBE_BYTES = 32 * 2**20
"""What the disk is measured with: as much as a large shard."""
_FEWEST_PROBES, _MOST_PROBES, _PROBE_S = 3, 8, 4.0
_ALWAYS = (1.0, 4.0)

OnProgress = Callable[[int, int, str], None]
"""(rows done, rows in all, a note)."""


def run(
    project: Project, name: str, num_rows: int = SAMPLE_ROWS, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """What is known before caching a teacher, as JSON values: bytes, seconds, fidelity, and a recommendation.

    Raises what building the teacher raises, `TeacherError` for logits that are NaN, `OSError` when the disk is full.
    """
    data, section = project.prepared_data(), project.targets(name)
    teacher, _ = build_teacher(project, name, data.inputs)
    rows = sampled_rows(data, num_rows)
    with cpu_threads(section.threads):
        heard = _listen(teacher, data.inputs, rows, section.batch_size, on_progress)
    terms = _terms(project, name)
    needed = sorted({term.loss.temperature for term in terms.values()}) or [1.0]
    plan = _Plan(project=project, name=name, teacher=teacher, data=data, heard=heard)
    sample = Sample(heard.logits, heard.keys, sorted({*section.temperatures, *needed, *_ALWAYS}))
    offers, excluded = _offers(plan, sample, terms, sorted({*section.temperatures, *needed}), on_progress)
    disk = measure_disk(project.work("estimate"))
    needs = Needs(
        num_classes=sample.output.shape[-1],
        rows=plan.num_targets,
        places=len(data.inputs) * project.views().num_views,
        rows_per_s=heard.rows_per_s,
        temperatures=needed,
        free_bytes=disk.free_bytes,
        write_bytes_per_s=disk.median,
    )
    return {
        **plan.to_json(),
        "sample": {"rows": len(rows), "positions": len(heard.logits), "batch_size": section.batch_size},
        "temperatures": list(sample.temperatures),
        "loss_temperatures": needed,
        "disk": disk.to_json(),
        "encodings": [_offer_json(each, needs, plan.own) for each in offers],
        "excluded": excluded,
        "recommended": _recommended_json(recommend(offers, needs), section),
    }


def sampled_rows(data: PreparedData, num_rows: int) -> NDArray[np.int64]:
    """So many rows that have a split, ascending: the first ones by a hash of their sample id."""
    if num_rows < 1:
        raise ConfigError(f"--rows is {num_rows}; expected 1 or more")
    rows = data.rows_of(data.split_names)
    draws = uniform_by_id(data.inputs.sample_ids[rows].tolist(), 0, "estimate")
    return np.sort(rows[np.argsort(draws, kind="stable")[:num_rows]])


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """What the teacher said about the sample, `[P, C]` with a key each, and how fast."""

    logits: Tensor
    keys: NDArray[np.uint64]
    rows_per_s: float


def _listen(
    teacher: Teacher, inputs: PreparedInputs, rows: NDArray[np.int64], batch_size: int, on_progress: OnProgress
) -> _Heard:
    """Run the teacher. The first batch is not timed (libraries warm up); a single one is run again for that.

    Raises `ConfigError` for a teacher that knows its most probable classes only.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    (output,) = [each for each in teacher.outputs if each.name == "logits"]
    most = max(1, MAX_LOGITS // output.shape[-1] // len(batches))
    logits, keys, timed, ask = [], [], [], Asking(teacher)
    for number, batch in enumerate(batches + batches[:1] * (len(batches) == 1)):
        columns, before = inputs.read(batch), time.perf_counter()
        said = {each: value.cpu() for each, value in ask(columns, len(batch)).items()}
        if CLASS_IDS in said:
            raise ConfigError(
                "this teacher gives its most probable classes only, so that nothing can be compared with all of them"
            )
        timed.append((len(batch), time.perf_counter() - before))
        if number < len(batches):
            kept_logits, kept_keys = _positions(said, inputs.sample_ids[batch], most)
            logits.append(kept_logits)
            keys.append(kept_keys)
        on_progress(min((number + 1) * batch_size, len(rows)), len(rows), "teacher")
    if not sum(len(each) for each in keys):
        raise TeacherError(f"the teacher abstained from all of {len(rows)} sampled rows; raise --rows")
    counted, seconds = (sum(each) for each in zip(*timed[1:], strict=True))
    return _Heard(logits=torch.cat(logits), keys=np.concatenate(keys), rows_per_s=counted / seconds)


def _positions(said: dict[str, Tensor], sample_ids: NDArray[np.str_], most: int) -> tuple[Tensor, NDArray[np.uint64]]:
    """Logits `[P, C]` and keys of up to `most` positions that the teacher speaks about, evenly spread."""
    logits = said["logits"]
    keys = row_keys(sample_ids.tolist(), 0).reshape(-1, *[1] * (logits.ndim - 2))
    tokens = np.arange(math.prod(logits.shape[1:-1]), dtype=np.uint64).reshape(logits.shape[1:-1])
    keys = (keys + (tokens << np.uint64(32))).reshape(-1)
    spoken = said.get(COVERED, torch.ones(logits.shape[:-1], dtype=torch.bool)).reshape(-1).nonzero().squeeze(-1)
    flat = logits.reshape(-1, logits.shape[-1])
    wrong = spoken[~torch.isfinite(flat[spoken].amax(dim=-1))]
    if len(wrong):
        example = sample_ids[int(wrong[0]) // max(1, tokens.size)]
        raise TeacherError(f"the teacher's logits are NaN or infinite for {len(wrong)} positions, such as of {example}")
    kept = spoken[torch.linspace(0, len(spoken) - 1, min(most, len(spoken))).round().long()]
    return flat[kept], keys[kept.numpy()]


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """How fast a disk takes shards, in bytes per second, and how much room it has."""

    median: float
    lowest: float
    highest: float
    num_writes: int
    free_bytes: int

    def to_json(self) -> dict[str, Any]:
        """In MB/s."""
        return {
            "write_mb_per_s": {"median": self.median / 1e6, "lowest": self.lowest / 1e6, "highest": self.highest / 1e6},
            "writes": self.num_writes,
            "bytes_per_write": PROBE_BYTES,
            "free_bytes": self.free_bytes,
        }


def measure_disk(folder: Path) -> DiskSpeed:
    """Write files as a store commits shards (fsync, rename) into a new folder, several times; all of it is removed.

    Raises `OSError` when the disk is full or read-only.
    """
    made = [each for each in (folder, *folder.parents) if not each.is_dir()]
    content, probe = os.urandom(PROBE_BYTES), folder / f"probe-{os.getpid()}"
    rates: list[float] = []
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while len(rates) < _FEWEST_PROBES or (len(rates) < _MOST_PROBES and time.perf_counter() < started + _PROBE_S):
            before = time.perf_counter()
            durable.write_bytes(probe, content)
            rates.append(PROBE_BYTES / (time.perf_counter() - before))
            probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(error.filename or probe)) from error
    finally:
        probe.unlink(missing_ok=True)
        for each in (each for each in made if each.is_dir() and not any(each.iterdir())):
            each.rmdir()
    return DiskSpeed(
        median=float(np.median(rates)), lowest=min(rates), highest=max(rates), num_writes=len(rates), free_bytes=free
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What caching this teacher would be about, and what the student would do with it."""

    project: Project
    name: str
    teacher: Teacher
    data: PreparedData
    heard: _Heard

    @property
    def section(self) -> TargetsSection:
        """targets.<name>."""
        return self.project.targets(self.name)

    @property
    def logits(self) -> OutputSpec:
        """The teacher's logits."""
        (output,) = [each for each in self.teacher.outputs if each.name == "logits"]
        return output

    @property
    def own(self) -> TargetEncoding:
        """How params.yaml stores them."""
        return encodings_of(self.section, self.teacher.outputs)["logits"]

    @property
    def num_targets(self) -> int:
        """Rows that the teacher is shown: every row once, and those of views.splits in every augmented view."""
        views, count = self.project.params.views, len(self.data.inputs)
        augmented = count if views.splits is None or not views.count else len(self.data.rows_of(views.splits))
        return count + views.count * augmented

    @property
    def positions(self) -> int:
        """Positions (tokens) per row."""
        return math.prod(self.logits.shape[:-1])

    def other_bytes(self) -> int:
        """Bytes per row of what is stored beside any encoding: statistics, coverage, features."""
        encodings = encodings_of(self.section, self.teacher.outputs)
        features = [spec for each in self.teacher.outputs[1:] for spec in encodings[each.name].arrays(each).values()]
        beside = 4 * len(STATISTICS) + abstains(self.teacher)
        return beside * self.positions + sum(spec.row_bytes for spec in features)

    def to_json(self) -> dict[str, Any]:
        """Rows, teacher hours, and after how many students caching has paid."""
        student, seconds_per_row = self.project.params.student, 1 / self.heard.rows_per_s
        rows = len(self.data.rows_of(student.distil_on))
        share = self.num_targets / (student.train.epochs * rows)
        return {
            "teacher": self.name,
            "num_classes": self.logits.shape[-1],
            "rows": len(self.data.inputs),
            "views": self.project.views().num_views,
            "rows_to_show": self.num_targets,
            "other_bytes_per_row": self.other_bytes(),
            "teacher_rows_per_s": self.heard.rows_per_s,
            "teacher_hours": self.num_targets * seconds_per_row / 3600,
            "break_even": {
                "students": max(1, math.ceil(share)),
                "teacher_hours_per_student": student.train.epochs * rows * seconds_per_row / 3600,
                "epochs": student.train.epochs,
                "rows": rows,
                "students_per_run": student.seeds,
            },
        }


def _terms(project: Project, name: str) -> dict[str, LossTerm]:
    """The student's losses on this teacher's logits, by where they stand."""
    return {
        f"student.losses.{index}": loss_term(project, index, each)
        for index, each in enumerate(project.params.student.losses)
        if name in each.teachers and each.output == "logits"
    }


def _offers(
    plan: _Plan, sample: Sample, terms: dict[str, LossTerm], temperatures: list[float], on_progress: OnProgress
) -> tuple[list[Offer], dict[str, str]]:
    """Every candidate and params.yaml's own encoding, measured; and why others could not be, by name.

    Candidates store `temperatures`; params.yaml's own takes the place of the one with its name, and stores its own.
    """
    masked, own = bool(torch.isneginf(sample.logits).any()), profiled(plan.own, "fast")
    wanted = candidates(sample.output.shape[-1], temperatures, masked)
    if own not in wanted:
        wanted = [own, *(each for each in wanted if title_of(each) != title_of(own))]
    offers, excluded = [], {}
    for number, encoding in enumerate(wanted):
        on_progress(number, len(wanted), title_of(encoding))
        shard_rows = plan.section.shard_rows or shard_rows_of(encoding, plan.logits, plan.num_targets)
        try:
            measured = measure(encoding, sample, shard_rows * plan.positions)
        except ConfigError as error:
            excluded[title_of(encoding)] = str(error)
            continue
        row_bytes = {profile: each * plan.positions for profile, each in measured.bytes_each.items()}
        offers.append(Offer(measured=measured, row_bytes=row_bytes, refused=_refused(terms, encoding, plan.logits)))
    return offers, excluded


def _refused(terms: dict[str, LossTerm], encoding: TargetEncoding, output: OutputSpec) -> str:
    try:
        for where, term in terms.items():
            stored = Stored(encoding=encoding, output=output)
            check_term(where, term, dict.fromkeys(term.teachers, stored), output.shape)
    except ConfigError as error:
        return str(error)
    return ""


def _offer_json(offer: Offer, needs: Needs, own: TargetEncoding) -> dict[str, Any]:
    measured = offer.measured
    return {
        "name": title_of(measured.encoding),
        "settings": settings_of(measured.encoding),
        "in_params": measured.encoding == profiled(own, "fast"),
        "bytes_per_row": offer.row_bytes["fast"],
        "bytes_per_row_compact": offer.row_bytes["compact"],
        "bytes": needs.total(offer, "fast"),
        "bytes_compact": needs.total(offer, "compact"),
        "needed_mb_per_s": needs.total(offer, "fast") / needs.rows * needs.rows_per_s / 1e6,
        "top1_agreement": measured.top1_agreement,
        "refused": offer.refused,
        "at": [vars(each) for each in measured.at],
    }


def _recommended_json(found: Recommendation, section: TargetsSection) -> dict[str, Any]:
    """Its settings are a whole `targets` section: with what today's one says beside the encoding."""
    if found.encoding is None:
        return {"name": None, "settings": None, "reason": found.reason}
    of_encodings = {"encoding", "profile", "temperatures"}.union(*PARAMETERS.values())
    plain = vars(TargetsSection())
    kept = {key: each for key, each in vars(section).items() if key in plain.keys() - of_encodings}
    kept = {key: list(each) if isinstance(each, tuple) else each for key, each in kept.items() if each != plain[key]}
    return {"name": title_of(found.encoding), "settings": settings_of(found.encoding) | kept, "reason": found.reason}


def settings_of(encoding: TargetEncoding) -> dict[str, Any]:
    """An encoding as it stands in a `targets` section of params.yaml."""
    value = encoding.to_json()
    own = {key: value[key] for key, default in PARAMETERS[value["name"]].items() if value[key] != default}
    profile = {"profile": "compact"} if value.get("compact") else {}
    temperatures = {"temperatures": value["temperatures"]} if "temperatures" in value else {}
    return {"encoding": value["name"], **own, **temperatures, **profile}
