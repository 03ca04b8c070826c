"""Bytes as a store writes them, and what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.encodings.teachers import Said
from kdpipe.encodings import Sampled, TargetEncoding
from kdpipe.encodings.topk import tail_log_masses
from kdpipe.losses import forward_kl
from kdpipe.store.layout import ArrayLayout, choose_shard_rows
from kdpipe.store.shard_file import encode_shard
from kdpipe.targets import DenseTargets, OutputSpec, SampledTargets, SparseTargets, Targets

TEMPERATURES = (1.0, 2.0, 4.0)
MORE_TEMPERATURES = (1.0, 4 / 3, 2.0, 4.0, 10.0)
BETWEEN = (1.25, 1.5, 1.75, 2.5, 3.0, 3.5, 5.0, 6.0, 7.0, 8.0, 9.0)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one encoding made of a teacher: arrays of every row, scores of the first ones by name."""

    encoding: TargetEncoding
    num_classes: int
    arrays: Arrays
    scores: dict[str, Tensor]

    def bytes_per_row(self) -> float:
        """Of all arrays, as a store writes them."""
        return sum(shard_bytes(self.encoding, self.arrays, self.num_classes).values())


def layouts(encoding: TargetEncoding, num_classes: int, num_rows: int) -> dict[str, ArrayLayout]:
    """How a store lays out shards of so many rows."""
    specs = encoding.arrays(OutputSpec(name="logits", shape=(num_classes,)))
    shard_rows = min(choose_shard_rows(specs.values(), 10**9), num_rows)
    return {suffix: ArrayLayout.of(f"logits{suffix}", spec, shard_rows) for suffix, spec in specs.items()}


def shard_bytes(encoding: TargetEncoding, arrays: Arrays, num_classes: int) -> dict[str, float]:
    """Bytes per row of each array's shards, their checksums and indexes counted."""
    num_rows = len(next(iter(arrays.values())))
    return {
        suffix: sum(
            len(piece)
            for start in range(0, num_rows, layout.shard_rows)
            for part in encode_shard(arrays[suffix][start : start + layout.shard_rows], layout)
            for piece in part
        )
        / num_rows
        for suffix, layout in layouts(encoding, num_classes, num_rows).items()
    }


def measure(encodings: Mapping[str, TargetEncoding], teacher: Iterable[Said], error_rows: int) -> dict[str, Found]:
    """Every encoding on what a teacher says, batch by batch; `Teacher` holds how the teacher is."""
    parts: dict[str, list[Arrays]] = {name: [] for name in encodings}
    scores: dict[str, list[dict[str, Tensor]]] = {name: [] for name in encodings}
    random, num_rows, num_classes = np.random.default_rng(0), 0, 0
    for said in teacher:
        num_classes = said.logits.shape[-1]
        keys = random.integers(0, 2**64, len(said.logits), dtype=np.uint64)
        students = said.students() if num_rows < error_rows else {}
        exact = {name: _gradient(student, _full(said.logits)) for name, student in students.items()}
        for name, encoding in encodings.items():
            parts[name].append(encoding.encode(said.logits, keys))
            if num_rows < error_rows:
                targets = encoding.decode(parts[name][-1], OutputSpec(name="logits", shape=(num_classes,)))
                score = errors(targets, said.logits) | teacher_scores(said.logits)
                for student, full in exact.items():
                    difference = (_gradient(students[student], targets) - full).norm(dim=-1)
                    score |= {f"error at {student}": difference, f"gradient at {student}": full.norm(dim=-1)}
                scores[name].append(score)
        num_rows += len(said.logits)
    return {
        name: Found(
            encoding=encoding,
            num_classes=num_classes,
            arrays={key: np.concatenate([part[key] for part in parts[name]]) for key in parts[name][0]},
            scores={key: torch.cat([score[key] for score in scores[name]]) for key in next(iter(scores[name]), {})},
        )
        for name, encoding in encodings.items()
    }


def teacher_scores(logits: Tensor) -> dict[str, Tensor]:
    """Entropy, largest probability and range of each row."""
    probs = torch.softmax(logits.double(), dim=-1)
    span = logits.amax(dim=-1) - logits.amin(dim=-1)
    return {"entropy": torch.special.entr(probs).sum(dim=-1), "top-1": probs.amax(dim=-1), "range": span}


def errors(targets: Targets, logits: Tensor) -> dict[str, Tensor]:
    """KL from the exact distribution (over K + 1 buckets where targets are sparse), and of the head's mass."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    if isinstance(targets, DenseTargets):
        return {f"KL at {t:g}": _kl(torch.log_softmax(log_p / t, dim=-1), targets.log_probs(t)) for t in TEMPERATURES}
    if isinstance(targets, SampledTargets):
        return {"unique": (targets.weights > 0).sum(dim=-1).double()}
    assert isinstance(targets, SparseTargets)
    asked = sorted({*targets.temperatures, *BETWEEN})
    exact = SparseTargets(
        ids=targets.ids,
        head=log_p.gather(-1, targets.ids),
        tails=tail_log_masses(log_p, targets.ids, asked),
        temperatures=tuple(asked),
        num_classes=targets.num_classes,
    )
    found = {f"KL at {t:g}": _kl(exact.log_probs(t), targets.log_probs(t)) for t in targets.temperatures}
    off = {t: _head_mass(targets, t) - _head_mass(exact, t) for t in asked if t <= max(targets.temperatures)}
    stored = torch.stack([off[t].abs() for t in targets.temperatures]).amax(dim=0)
    between = torch.stack([each.abs() for t, each in off.items() if t not in targets.temperatures]).amax(dim=0)
    return found | {"head mass, stored": stored, "head mass, between": between}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q.double())).sum(dim=-1)


def _head_mass(targets: SparseTargets, temperature: float) -> Tensor:
    return -torch.expm1(targets.log_probs(temperature, allow_interpolation=True)[..., -1].double())


def _full(logits: Tensor) -> DenseTargets:
    row_max = logits.amax(dim=-1)
    return DenseTargets(values=logits - row_max.unsqueeze(-1), row_max=row_max)


def _gradient(student: Tensor, targets: Targets) -> Tensor:
    """Gradient of the forward KL at T = 1 in the student's logits `[B, C]`."""
    logits = student.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(forward_kl(logits, targets).sum(), logits)[0]


def draws_of_bytes(teacher: Iterable[Said], stratified: bool, bytes_per_row: Sequence[float]) -> list[int]:
    """How many draws, up to 255, take so many bytes, compact, by the parabola through three measured counts."""
    counts = (35, 55, 85)
    encodings = {str(draws): Sampled(draws=draws, stratified=stratified, compact=True) for draws in counts}
    sizes = [found.bytes_per_row() for found in measure(encodings, teacher, 0).values()]
    return [min(max(round(each), 2), 255) for each in np.polyval(np.polyfit(sizes, counts, 2), bytes_per_row).tolist()]
