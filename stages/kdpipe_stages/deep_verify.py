"""`kdpipe verify STORE --deep`: sampled rows are shown to the teacher again, beside a live-against-live control.

Number 1: how far what is stored is from what the teacher says now, in the batches that the store was captured in.
Number 2, the control: the same for what it says about the same rows among other neighbours, encoded but not stored.
Results of floats differ between batches, devices and versions in their last bits, so number 1 may be as large as the
control, plus the encoding's own error on what is said now. On another device or torch than the store's, which the
control cannot show, it may be larger by what rounding in the teacher's precision explains. A teacher whose answers to
other batches, or to the same one once more, no rounding explains is refused: nothing can be said about what is stored.

Shapes: B rows, C classes, D width; `...` stands for further axes (tokens).
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.caching import Cut, read_intact, refuse_nonfinite, zero_where_abstained
from kdpipe.data.prepared import PreparedInputs
from kdpipe.devices import compute_device
from kdpipe.distributed import cpu_threads
from kdpipe.errors import ConfigError, CorruptStoreError, StaleStoreError, TeacherError
from kdpipe.estimating import kl_to_targets
from kdpipe.fingerprint import canonical_json, uniform_by_id
from kdpipe.inputs import LOGITS
from kdpipe.store import TargetStore
from kdpipe.store.manifest import COVERED
from kdpipe.store.records import CommitRecord
from kdpipe.store.rows import SampleIndex
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets, Targets
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import CLASS_IDS, Teacher
from kdpipe.views import ViewSpec, row_keys
from kdpipe_stages.cache_teacher import manifest_of
from kdpipe_stages.project import Project
from kdpipe_stages.replay import check_kept_views, check_partners
from kdpipe_stages.teachers import build_teacher

SAMPLE_ROWS = 2048
ROUNDING = {"float32": 2.0**-16, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Precision -> the share of a logit by which devices may differ, in units in the last place: 256, one, one."""
BETWEEN_BATCHES = 2.0**-6
"""The share of a logit by which answers may differ between batches: two units in the last place of bfloat16."""
_SINGLE = 4
"""How much more than that share a single number may differ."""
_NAMED, _SHOWN = 5, 20

OnProgress = Callable[[int, int, str], None]


def run(
    project: Project, path: Path | str, num_rows: int = SAMPLE_ROWS, on_progress: OnProgress = lambda *_: None
) -> Sequence[str]:
    """Compare a store whose bytes are intact with its teacher; returns what was found, a line each.

    Raises `StaleStoreError` when the teacher of params.yaml is another one than the store's, `CorruptStoreError` when
    what is stored is not what the teacher says, `TeacherError` when that depends on which rows it sees together, or
    changes from call to call.
    """
    if num_rows < 1:
        raise ConfigError(f"--rows is {num_rows}; expected 1 or more")
    store = TargetStore.open(path)
    name = teacher_of(project, store)
    inputs = project.prepared_inputs()
    teacher, description = build_teacher(project, name, inputs)
    _check_same(store, manifest_of(project, name, teacher, description, len(inputs)).ingredients, name)
    views = project.views_of(inputs)
    check_partners(store, inputs, views, name)
    check_kept_views(store, inputs, views, name)
    again = _Again(
        store=store, teacher=teacher, inputs=inputs, views=views, batch_tokens=project.targets(name).batch_tokens
    )
    batches = again.sampled(num_rows)
    found = {each: _Found(name=each) for each in store.outputs}
    rounding = ROUNDING[project.targets(name).precision if _is_elsewhere(store) else "float32"]
    done, total, identical = 0, sum(len(each.rows) for each in batches), 0
    with cpu_threads(project.targets(name).threads):
        for batch in batches:
            identical += again.compare(batch, found, rounding)
            done += len(batch.rows)
            on_progress(done, total, f"{identical:,} rows identical")
    shards = {(each.view, each.shard) for each in batches}
    lines = [
        f"{name} saw {total:,} rows again, of {len(shards)} of {len(store.records)} shards, in the same batches: "
        f"{identical:,} rows give identical bytes",
        *(each.line() for each in found.values()),
    ]
    random = [said for each in found.values() if (said := each.beyond_rounding("asked again"))]
    if random:
        raise TeacherError("\n".join([_what_is_random(path, name), *lines, *random]))
    wrong = [said for each in found.values() if (said := each.wrong(store))]
    if wrong:
        raise CorruptStoreError("\n".join([_what_is_wrong(path, store, name), *lines, *wrong]))
    dependent = [said for each in found.values() if (said := each.beyond_rounding("in other batches"))]
    if dependent:
        raise TeacherError("\n".join([_what_depends(path, name), *lines, *dependent]))
    return [*lines, f"{path} is what {name} says"]


def teacher_of(project: Project, store: TargetStore) -> str:
    """The teacher of params.yaml that a store is published for, else the one that its manifest names."""
    for name in project.params.teachers:
        if project.store(name).resolve() == store.path.resolve():
            return name
    named = str(store.manifest.teacher.get("name"))
    if named not in project.params.teachers:
        raise ConfigError(
            f"{store.path} is a store of the teacher {named!r}; {project.params_file} has "
            f"{', '.join(project.params.teachers)}. Name its params.yaml with --params"
        )
    return named


def _check_same(store: TargetStore, today: Mapping[str, Any], name: str) -> None:
    """That today's teacher and settings would give this store's fingerprint."""
    different = list(_differences(store.manifest.ingredients, json.loads(canonical_json(today))))
    if different:
        raise StaleStoreError(
            f"{store.path} was made by another teacher, or with other settings, than {name!r} of params.yaml: "
            f"{', '.join(different)} differ. Restore them, or run `kdpipe cache-teacher {name}`."
        )


def _differences(then: Any, today: Any, where: str = "") -> Iterator[str]:
    """Dotted keys under which two JSON values differ."""
    if isinstance(then, Mapping) and isinstance(today, Mapping):
        for key in [*then, *(each for each in today if each not in then)]:
            yield from _differences(then.get(key), today.get(key), f"{where}.{key}".lstrip("."))
    elif then != today:
        yield where


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of a store that the teacher saw together, for one view."""

    view: int
    shard: int
    rows: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Again:
    """A store, its teacher, and the rows that both are about."""

    store: TargetStore
    teacher: Teacher
    inputs: PreparedInputs
    views: ViewSpec
    batch_tokens: int | None

    def sampled(self, num_rows: int) -> list[_Batch]:
        """Batches of the capture, at least `num_rows` rows in all, of as many shards as possible: by a hash of ids."""
        store = self.store
        store.check_complete()
        records = [(each, each.start + np.flatnonzero(each.rows_computed)) for each in store.records.values()]
        records = [(each, rows) for each, rows in records if len(rows)]
        order = np.argsort(self._draws([(each.view, rows) for each, rows in records]))
        shards = deque(self._batches_of(*records[index]) for index in order.tolist())
        chosen: list[_Batch] = []
        while shards and sum(len(each.rows) for each in chosen) < num_rows:  # one of each shard, then a second one
            batches = shards.popleft()
            batch = next(batches, None)
            if batch is not None:
                chosen.append(batch)
                shards.append(batches)
        return sorted(chosen, key=lambda each: (each.view, int(each.rows[0])))

    def _batches_of(self, record: CommitRecord, rows: NDArray[np.int64]) -> Iterator[_Batch]:
        """The batches that a shard's rows were shown in, in a random order; it is cut when the first is asked for."""
        places = rows if self.batch_tokens is None else self._prepared_rows(rows)
        cut = Cut(self.teacher, self.inputs, self.views, record.batch_size, self.batch_tokens)
        order = np.argsort(places)
        parts = [rows[order[np.searchsorted(places[order], part)]] for part in cut(record.view, places)]
        for index in np.argsort(self._draws([(record.view, part) for part in parts])).tolist():
            yield _Batch(view=record.view, shard=record.shard, rows=parts[index])

    def _draws(self, batches: Sequence[tuple[int, NDArray[np.int64]]]) -> NDArray[np.float64]:
        ids = [f"{self.store.sample_ids[rows[0]]}\0{view}" for view, rows in batches]
        return uniform_by_id(ids, 0, "verify")

    def compare(self, batch: _Batch, found: Mapping[str, _Found], rounding: float) -> int:
        """Add a batch to what was found about each output; returns how many rows give identical bytes."""
        places = self._prepared_rows(batch.rows)
        live = self._say(batch, places)
        again, other = self._say(batch, places), self._say_among_others(batch, places)
        encoded = self._encoded(batch, live)
        stored = self.store.read_arrays(batch.rows, batch.view)
        says = {
            "stored": self.store.decode(stored),
            "control": self.store.decode(self._encoded(batch, other)),
            "own": self.store.decode(encoded),
        }
        for name, each in found.items():
            targets = {key: decoded[name] for key, decoded in says.items()}
            each.add(batch, live[name], again[name], other[name], targets, rounding)
        same = [(encoded[name] == stored[name]).reshape(len(batch.rows), -1).all(axis=1) for name in stored]
        return int(np.logical_and.reduce(same).sum())

    def _prepared_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows of a store stand among the prepared ones; their content must be the one that it is about."""
        ids = self.store.sample_ids[rows]
        places = self._prepared.find(ids)
        same = (places >= 0) & (self.inputs.digests[places] == self.store.digests[rows]).all(axis=1)
        if not same.all():
            raise StaleStoreError(
                f"{self.store.path} is about rows that are not prepared here, or of other content, such as "
                f"{ids[~same][0]}. Run `kdpipe prepare-data` on the data that it was made from."
            )
        return places

    @cached_property
    def _ask(self) -> Asking:
        return Asking(self.teacher)

    @cached_property
    def _prepared(self) -> SampleIndex:
        return SampleIndex(self.inputs.sample_ids)

    def _say(self, batch: _Batch, places: NDArray[np.int64]) -> dict[str, Tensor]:
        """What the teacher says about prepared rows, zero where it abstains."""
        ids = self.inputs.sample_ids[places]
        read = partial(read_intact, self.inputs)
        said = self._ask(self.views.read(read, self.inputs.sample_ids, places, batch.view).columns, len(places))
        if CLASS_IDS in said:
            raise ConfigError(
                "--deep compares logits of all classes, and this teacher gives its most probable ones only"
            )
        for output in self.teacher.outputs:
            said[output.name] = zero_where_abstained(said[output.name], said.get(COVERED))
            refuse_nonfinite(said[output.name], output, ids)
        return said

    def _say_among_others(self, batch: _Batch, places: NDArray[np.int64]) -> dict[str, Tensor]:
        """The same rows in half as large batches of mixed order; a batch of one is doubled."""
        if len(places) == 1:
            return {name: each[:1] for name, each in self._say(batch, places.repeat(2)).items()}
        order = np.random.default_rng(0).permutation(len(places))
        parts = [self._say(batch, places[each]) for each in np.array_split(order, 2)]
        back = torch.from_numpy(np.argsort(order))
        return {
            name: torch.cat([part[name] for part in parts])[back.to(each.device)] for name, each in parts[0].items()
        }

    def _encoded(self, batch: _Batch, said: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        keys = row_keys(self.store.sample_ids[batch.rows].tolist(), batch.view)
        arrays: dict[str, NDArray[Any]] = {"statistics": teacher_statistics(said[LOGITS])}
        if self.store.manifest.coverage:
            covered: NDArray[np.bool_] = said[COVERED].cpu().numpy()
            arrays[COVERED] = covered
            arrays["statistics"][~covered] = 0
        for name, encoding in self.store.encodings.items():
            arrays |= {name + suffix: each for suffix, each in encoding.encode(said[name], keys).items()}
        return arrays


@dataclass(kw_only=True)
class _Found:
    """One output of the sampled rows: batch by batch their shards, row numbers, distances and allowance."""

    name: str
    kind: type[Targets] | None = None
    rows: list[NDArray[np.int64]] = field(default_factory=list)
    shards: list[NDArray[np.int64]] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self,
        batch: _Batch,
        live: Tensor,
        again: Tensor,
        other: Tensor,
        says: Mapping[str, Targets],
        rounding: float,
    ) -> None:
        """Add a batch: what the teacher says now `[B, ...]`, once more and in other batches, and targets to compare."""
        live, again, other, own = live.cpu(), again.cpu(), other.cpu(), says["own"]
        self.kind = type(own)
        self.rows.append(batch.rows)
        self.shards.append(np.full(len(batch.rows), batch.shard))
        for name, targets in says.items():
            self.parts[name].append(_per_row(distance(live, targets, own), targets, own))
            if isinstance(targets, DenseTargets) and isinstance(own, DenseTargets):
                apart = (targets.row_max - own.row_max).double().abs()
                self.parts[f"maximum {name}"].append(_per_row(apart, targets, own))
        if isinstance(own, DenseTargets):
            sizes = live.double().abs().masked_fill(torch.isneginf(live), 0.0).amax(dim=-1)
            self.parts["maximum rounding"].append(_per_row(_SINGLE * rounding * sizes, own, own))
        self.parts["rounding"].append(_per_row(allowance(live, own, rounding), own, own))
        between = distance(live, _unencoded(other, own), own)
        self.parts["in other batches"].append(_per_row(between, says["control"], own))
        self.parts["asked again"].append(_per_row(distance(live, _unencoded(again, own), own), own, own))
        exact = _unencoded(live, own)
        for how, share in (("in other batches", BETWEEN_BATCHES), ("asked again", rounding)):
            self.parts[f"explained {how}"].append(_per_row(allowance(live, exact, share), own, own))

    def line(self) -> str:
        """Both numbers, for a person."""
        stored, control, own, rounding = (self._mean(each) for each in ("stored", "control", "own", "rounding"))
        return (
            f"{self.name}: {_UNITS.get(self.kind, _KL)} {stored:.2g}; control, live against live in other batches: "
            f"{control:.2g}; the encoding's own error {own:.2g}, rounding {rounding:.2g}"
        )

    def wrong(self, store: TargetStore) -> str:
        """What neither the control nor the encoding nor rounding explains; empty when all is well."""
        size, limit = self._all("stored"), self._mean("control") + self._mean("own") + self._mean("rounding")
        far = size > self._all("control").max() + self._all("own").max() + self._all("rounding")
        single_rows_count = self.kind is not SampledTargets  # rounding may turn any one draw
        if self._mean("stored") > limit or (single_rows_count and bool(far.any())):
            return (
                f"{self.name}: {self._mean('stored'):.2g} in the mean, expected up to {limit:.2g}; {int(far.sum()):,} "
                f"rows are further off than any of the control, {self._where(store, far, size)}"
            )
        if self.kind is DenseTargets:  # KL does not see what is added to all classes
            size = self._all("maximum stored")
            far = size > self._all("maximum control").max() + self._all("maximum rounding")
            if bool(far.any()):
                where = self._where(store, far, size)
                return f"{self.name}: the largest logit of {int(far.sum()):,} rows is off, {where}"
        return ""

    def _where(self, store: TargetStore, far: Tensor, size: Tensor) -> str:
        rows, shards = np.concatenate(self.rows), sorted(set(np.concatenate(self.shards)[far.numpy()].tolist()))
        worst = size.argsort(descending=True)[:_NAMED].tolist()
        named = ", ".join(f"{store.sample_ids[rows[each]]} ({size[each]:.2g})" for each in worst)
        return f"in shards {', '.join(map(str, shards[:_SHOWN])) or '-'}; the worst: {named}"

    def beyond_rounding(self, how: str) -> str:
        """How far today's answers to the same rows are apart `how`, beyond any rounding; empty otherwise."""
        found, explained = self._mean(how), self._mean(f"explained {how}")
        if found <= explained:
            return ""
        unit = "|live - live| / |live|" if self.kind is FeatureTargets else "KL(live || live), nats,"
        return f"{self.name}: {unit} {how} {found:.2g}; rounding explains up to {explained:.2g}"

    def _all(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])

    def _mean(self, name: str) -> float:
        return max(0.0, float(self._all(name).mean()))


_KL = "KL(live || stored), nats,"
_UNITS: Mapping[type[Targets] | None, str] = {
    FeatureTargets: "|live - stored| / |live|",
    SampledTargets: "cross-entropy difference of the draws, nats,",
}


def distance(live: Tensor, targets: Targets, own: Targets) -> Tensor:
    """How far targets are from what the teacher says now, at T = 1 `[B, ...]`; `own` is that, encoded and decoded."""
    wide = live.double()
    match targets:
        case FeatureTargets():
            size = torch.linalg.vector_norm(wide, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            relative: Tensor = torch.linalg.vector_norm(targets.values.double() - wide, dim=-1) / size
            return relative
        case SampledTargets():
            assert isinstance(own, SampledTargets)
            log_probs = torch.log_softmax(wide, dim=-1)
            return (_cross_entropy(log_probs, targets) - _cross_entropy(log_probs, own)).abs()
    return kl_to_targets(wide, targets)


def _size(logits: Tensor) -> Tensor:
    """The number, per row `[B, ..., 1]`, that a share of is lost to rounding: how large the largest logit is.

    In float64 no larger than the row's range: a module that computes in float32 may widen its answer, and what it adds
    to all classes then is no reason for them to be apart.
    """
    wide = logits.double()
    top = wide.amax(dim=-1, keepdim=True)
    if logits.dtype != torch.float64:
        return top.abs()
    lowest = torch.where(torch.isneginf(wide), top, wide).amin(dim=-1, keepdim=True)
    return torch.minimum(top.abs(), top - lowest) + torch.finfo(torch.float64).eps * top.abs()


def allowance(live: Tensor, own: Targets, rounding: float) -> Tensor:
    """What of `distance` rounding by a share of each number's size explains, to second order for KL: `[B, ...]`."""
    wide = live.double()
    if isinstance(own, FeatureTargets):
        return torch.full(wide.shape[:-1], rounding, dtype=torch.float64)
    log_probs = torch.log_softmax(wide, dim=-1)
    probs, shift = log_probs.exp(), rounding * (_size(live) - log_probs)
    shift = torch.where(probs > 0, shift, 0.0)
    if isinstance(own, SampledTargets):  # a draw near a border between classes may fall on the other side
        entropy: Tensor = torch.special.entr(probs).sum(dim=-1)
        return (probs * shift).sum(dim=-1) * entropy.exp() * (1 + 2 * entropy)
    return (probs * shift.square()).sum(dim=-1) / 2


def _unencoded(said: Tensor, own: Targets) -> Targets:
    """What the teacher says `[B, ..., C]` or `[B, ..., D]`, as targets that lose nothing."""
    if isinstance(own, FeatureTargets):
        return FeatureTargets(values=said)
    return DenseTargets.of(said)


def _cross_entropy(log_probs: Tensor, targets: SampledTargets) -> Tensor:
    weights = targets.weights.double()
    return -torch.where(weights > 0, weights * log_probs.gather(-1, targets.ids), 0.0).sum(dim=-1)


def _per_row(values: Tensor, targets: Targets, own: Targets) -> Tensor:
    """`[B, ...]` -> the mean over a row's covered places `[B]`; infinite for NaN, and where coverage has changed."""
    values = values.masked_fill(torch.isnan(values), torch.inf)
    if own.covered is None or targets.covered is None:
        return values.flatten(1).mean(dim=1) if values.ndim > 1 else values
    covered, changed = own.covered & targets.covered, own.covered != targets.covered
    if covered.ndim > 1 and values.shape != covered.shape:  # of the row, not of its tokens
        covered = covered.flatten(1).any(dim=1)
    values = values.reshape(*covered.shape, -1).mean(dim=-1)
    total = torch.where(covered, values, 0.0).reshape(len(values), -1).sum(dim=1)
    mean = total / covered.reshape(len(values), -1).sum(dim=1).clamp(min=1)
    return mean.masked_fill(changed.reshape(len(values), -1).any(dim=1), torch.inf)


def _here() -> dict[str, str]:
    """What a store records of where it was captured, as it is now."""
    return {"torch": torch.__version__, "machine": platform.machine(), "device": compute_device().type}


def _is_elsewhere(store: TargetStore) -> bool:
    """Whether a store may have been captured on another kind of device; of a GPU its record has no model."""
    return compute_device().type == "cuda" or any(
        store.manifest.recorded.get(key) != each for key, each in _here().items()
    )


def _what_is_wrong(path: Path | str, store: TargetStore, name: str) -> str:
    then = ", ".join(str(store.manifest.recorded.get(key)) for key in _here())
    return (
        f"{path}: what is stored is not what its teacher {name!r} says, though every checksum matches. Remove "
        f"{path} and data/.work/{store.fingerprint}, and run `kdpipe cache-teacher {name}`. (Captured on {then}; "
        f"compared on {', '.join(_here().values())}.)"
    )


def _what_is_random(path: Path | str, name: str) -> str:
    return (
        f"{name!r} answers the same batch otherwise when it is asked again, so that {path} holds one of its answers. "
        "Look for random numbers, and for what it remembers from call to call, such as a layer in training mode. Mend "
        f"it, and run `kdpipe cache-teacher {name}`."
    )


def _what_depends(path: Path | str, name: str) -> str:
    return (
        f"what {name!r} says about a row depends on the other rows of its batch, so {path} holds what it says in one "
        "choice of batches only. Look for what mixes rows: views.transform, or a layer such as batch normalisation in "
        f"training mode. Mend it, and run `kdpipe cache-teacher {name}`."
    )
