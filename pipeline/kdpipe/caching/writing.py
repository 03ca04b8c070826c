"""What the teacher said, checked, encoded and committed shard by shard behind it.

Shapes: B rows, T tokens, C classes, k kept classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.caching.batches import Batch
from kdpipe.encodings import Sampled, TargetEncoding, TopK
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.inputs import SURE_ROWS, look_like_a_sigmoids, look_like_probabilities
from kdpipe.store import TargetStore
from kdpipe.store.statistics import kept_statistics, teacher_statistics
from kdpipe.targets import OutputSpec, are_of_places, spread, zero_unless
from kdpipe.teachers.base import CLASS_IDS, COVERED, LOG_PROBS, LOGITS, TAIL_LOG_MASS
from kdpipe.views import row_keys

ENCODE_BYTES = 2**20
"""What the teacher said is encoded when it is so much, or when its shard ends: many small steps cost more."""
MAX_WAITING_BYTES = 64 * 2**20
"""What may wait to be encoded; one batch is always taken."""


def kept_encoding(encoding: TargetEncoding, num_kept: int | None = None) -> TopK:
    """The encoding of a teacher that knows `num_kept` classes only. Raises `ConfigError` where it stores others."""
    if isinstance(encoding, TopK) and encoding.temperatures == (1.0,):
        if num_kept not in (None, encoding.k):
            raise ConfigError(f"k is {encoding.k}, and the teacher gives {num_kept} classes; give both the same k")
        return encoding
    found = str(encoding.to_json()["name"])
    if isinstance(encoding, TopK):
        found += f" and temperatures: [{', '.join(f'{each:g}' for each in encoding.temperatures)}]"
    raise ConfigError(
        "the teacher knows its most probable classes at temperature 1 only; store them with encoding: topk and "
        f"temperatures: [1] (found encoding: {found})"
    )


def promised(
    said: Mapping[str, Tensor],
    num_rows: int,
    outputs: Sequence[OutputSpec],
    encodings: Mapping[str, TargetEncoding],
    coverage: bool,
) -> dict[str, Tensor]:
    """The outputs that a store keeps, in the promised shapes `[B, …]`, and `covered` where the teacher abstains.

    `coverage`: whether it may. Raises `TeacherError`.
    """
    kept: dict[str, Tensor] = {}
    for output in outputs:
        if output.name == LOGITS and CLASS_IDS in said:
            kept |= _promised_kept(said, (num_rows, *output.shape[:-1]), kept_encoding(encodings[LOGITS]).k)
            continue
        if output.name not in said:
            raise TeacherError(f"the teacher gave no output {output.name!r}; it gave {', '.join(said)}")
        values, expected = said[output.name], (num_rows, *output.shape)
        if values.shape != expected:
            found = f"the teacher's {output.name} have shape {list(values.shape)}"
            raise TeacherError(f"{found}; expected {list(expected)}")
        kept[output.name] = values
    if coverage:
        covered, expected = said.get(COVERED), kept[TAIL_LOG_MASS if CLASS_IDS in said else LOGITS].shape
        expected = expected if CLASS_IDS in said else expected[:-1]
        if covered is None or covered.dtype != torch.bool or covered.shape != expected:
            found = "none" if covered is None else f"{covered.dtype} of shape {list(covered.shape)}"
            raise TeacherError(f"the teacher abstains, so it must give `covered`, bool {list(expected)}; found {found}")
        kept[COVERED] = covered
    return kept


def _promised_kept(said: Mapping[str, Tensor], rows: tuple[int, ...], k: int) -> dict[str, Tensor]:
    """The same of a teacher that knows k classes only."""
    expected = {CLASS_IDS: (*rows, k), LOG_PROBS: (*rows, k), TAIL_LOG_MASS: rows}
    for name, shape in expected.items():
        if name not in said or said[name].shape != shape:
            found = list(said[name].shape) if name in said else "nothing"
            raise TeacherError(f"the teacher's {name} have shape {found}; expected {list(shape)}")
    return {name: said[name] for name in expected}


class _Said:
    """What the teacher said about batches that follow each other in one shard."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._parts: list[dict[str, Tensor]] = []
        self.num_bytes = 0

    def add(self, batch: Batch, said: dict[str, Tensor]) -> None:
        """Append a batch."""
        self._batches.append(batch)
        self._parts.append(said)
        self.num_bytes += sum(each.nbytes for each in said.values())

    @property
    def last(self) -> Batch:
        """The latest batch."""
        return self._batches[-1]

    def joined(self) -> tuple[Batch, dict[str, Tensor]]:
        """All of it as one batch."""
        if len(self._batches) == 1:
            return self._batches[0], self._parts[0]
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        return Batch.joined(self._batches), tensors


class Writer:
    """Takes what the teacher says; its thread encodes that into the shard in work, and commits the shard when full."""

    def __init__(self, store: TargetStore, thread: Executor) -> None:
        manifest = store.manifest
        self._store, self._thread = store, thread
        self._at_once = 0
        self._said = _Said()
        self._waiting: deque[tuple[_Said, Future[None]]] = deque()
        # One shard's arrays, used for one shard after the other.
        self._arrays = {
            name: np.empty((manifest.shard_rows, *spec.shape), spec.dtype) for name, spec in manifest.arrays().items()
        }
        self._failed = self._looked_at = False

    def put(self, batch: Batch, said: dict[str, Tensor]) -> None:
        """Hand over what the teacher said. Waits for the writer thread when it is behind; raises what it raised."""
        num_rows, manifest = len(batch.rows), self._store.manifest
        kept = promised(said, num_rows, manifest.outputs, self._store.encodings, manifest.coverage) if num_rows else {}
        self._said.add(batch, kept)
        if batch.is_last or self._said.num_bytes >= ENCODE_BYTES:
            self._waiting.append((self._said, self._thread.submit(self._write, self._said)))
            self._said = _Said()
        while self._waiting and (self._waiting[0][1].done() or self._is_behind()):
            self._waiting.popleft()[1].result()

    def finish(self) -> None:
        """Wait for the last commit."""
        while self._waiting:
            self._waiting.popleft()[1].result()

    def _is_behind(self) -> bool:
        (oldest, _), (newest, _) = self._waiting[0], self._waiting[-1]
        too_much = oldest is not newest and sum(said.num_bytes for said, _ in self._waiting) > MAX_WAITING_BYTES
        return too_much or (newest.last.is_last and not oldest.last.is_beside(newest.last))

    def _write(self, said: _Said) -> None:
        if self._failed:
            return
        self._failed = True  # unless all of this succeeds: after an error nothing is committed
        batch, tensors = said.joined()
        if batch.is_first and not self._store.wanted(batch.view, batch.shard).all():
            for array in self._arrays.values():
                array[:] = 0
        self._at_once = batch.at_once if batch.is_first else min(self._at_once, batch.at_once)
        if len(batch.rows):
            for name, values in self._encode(batch, tensors).items():
                self._arrays[name][batch.place] = values
        if batch.is_last:
            arrays = {name: values[: batch.shard.num_rows] for name, values in self._arrays.items()}
            self._store.write(batch.view, batch.shard, arrays, self._at_once)
        self._failed = False

    def _encode(self, batch: Batch, said: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
        ids, covered = self._store.rows.ids_of(batch.rows), said.get(COVERED)
        arrays: dict[str, NDArray[Any]] = {}
        for output in self._store.manifest.outputs:
            if output.name == LOGITS and CLASS_IDS in said:
                arrays |= self._encode_kept(said, ids)
                continue
            values = zero_where_abstained(said[output.name], covered)
            if output.name == LOGITS and not self._looked_at:
                self._looked_at = are_logits(values, covered)
            refuse_nonfinite(values, output, ids)
            encoding = self._store.encodings[output.name]
            keys = row_keys(ids.tolist(), batch.view) if isinstance(encoding, Sampled) else None
            encoded = encoding.encode(values, keys)
            arrays |= {output.name + suffix: each for suffix, each in encoded.items()}
            if output.name == LOGITS:
                arrays["statistics"] = teacher_statistics(values)
        if covered is not None:
            arrays[COVERED] = covered.cpu().numpy()
            arrays["statistics"][~arrays[COVERED]] = 0
        return arrays

    def _encode_kept(self, said: dict[str, Tensor], sample_ids: NDArray[np.str_]) -> dict[str, NDArray[Any]]:
        encoding, covered = self._store.encodings[LOGITS], said.get(COVERED)
        assert isinstance(encoding, TopK)
        ids, head, tail = said[CLASS_IDS], said[LOG_PROBS].double(), said[TAIL_LOG_MASS].double()
        shape = self._store.outputs[LOGITS].shape
        if covered is not None:  # what stands where the teacher did not speak may be anything
            alike = [each.to(ids.device) for each in encoding.alike(shape)]
            ids, head, tail = (
                torch.where(spread(covered, each.ndim), each, other)
                for each, other in zip((ids, head, tail), (alike[0], alike[1], alike[2].squeeze(-1)), strict=True)
            )
        mass = torch.logaddexp(head.logsumexp(dim=-1), tail)
        wrong = (mass.abs() > _MASS_TOLERANCE) | torch.isnan(mass)
        _refuse(wrong, "log-probs and tail have another mass than 1", sample_ids)
        num_classes = shape[-1]
        disorder = ((ids.diff(dim=-1) <= 0) & ~torch.isneginf(head[..., 1:])).any(dim=-1)
        absent = ((ids < 0) | (ids >= num_classes)).any(dim=-1)
        _refuse(disorder | absent, "class ids are not ascending numbers of classes", sample_ids)
        arrays = {
            LOGITS + suffix: each
            for suffix, each in encoding.encode_kept(ids, head, tail.unsqueeze(-1), num_classes).items()
        }
        return {**arrays, "statistics": kept_statistics(ids, head, tail)}


_MASS_TOLERANCE = 1e-3


def zero_where_abstained(values: Tensor, covered: Tensor | None) -> Tensor:
    """`values [B, …]` with zeros where the teacher abstained: those rows and tokens are not looked at.

    Values that are not of tokens (see `are_of_places`) are zero where the teacher abstained from every one of the row.
    """
    if covered is None:
        return values
    if not are_of_places(values.shape, covered.shape):
        covered = covered.flatten(1).any(dim=1)
    return zero_unless(covered, values)


def refuse_nonfinite(values: Tensor, output: OutputSpec, sample_ids: NDArray[np.str_]) -> None:
    """Raise `TeacherError` naming samples; -inf is a masked class: legal in logits unless every class is masked.

    What losses compute in counts: float64 beyond float32 is infinite.
    """
    worst = values.amax(dim=-1) if output.kind == "logits" else values  # of NaN and others, the maximum is NaN
    where = ""
    if worst.dtype == torch.float64:
        worst, where = worst.float(), " in float32"
    _refuse(~torch.isfinite(worst), f"{output.name} are NaN or infinite{where}", sample_ids)


def are_logits(logits: Tensor, covered: Tensor | None = None) -> bool:
    """That these are no probabilities, `[B, …, C]`, where the teacher spoke; False where they are too few to tell.

    Raises `TeacherError` for what only rounding keeps from being a softmax's output, and for a sigmoid's.
    """
    spoken = logits if covered is None else logits[covered]
    if len(spoken) < 2:
        return False
    if look_like_probabilities(spoken.half()):
        raise TeacherError(
            f"the teacher's logits of {len(spoken)} samples are numbers from 0 to 1 with a sum of 1: probabilities. "
            "Take what goes into the softmax, or give their logarithm."
        )
    if look_like_a_sigmoids(spoken):
        raise TeacherError(
            f"the teacher's single logits of {len(spoken)} samples are numbers from 0 to 1: probabilities, such as a "
            "sigmoid's. Take what goes into the sigmoid (of an ONNX file: probabilities: true)."
        )
    return spoken.shape[-1] != 2 or spoken[..., 0].numel() >= SURE_ROWS


def _refuse(bad: Tensor, what: str, sample_ids: NDArray[np.str_]) -> None:
    wrong = np.flatnonzero(bad.reshape(len(sample_ids), -1).any(dim=1).cpu().numpy())
    if len(wrong):
        examples = ", ".join(sample_ids[wrong[:5]].tolist())
        raise TeacherError(
            f"the teacher's {what} for {len(wrong)} of {len(sample_ids)} samples of a batch, such as {examples}. "
            "Mend the teacher (precision: float32?) and run again."
        )
