"""What each encoding costs and loses, measured on a sample of a teacher's logits, and which one to take.

Shapes: P positions (rows, or tokens of rows), C classes, K kept. T is the temperature; MB is 10^6 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import Tensor

from kdpipe.encodings import ArraySpec, Dense, Int8, Sampled, TargetEncoding, TopK, encoding_from_json
from kdpipe.losses import ForwardKL, bucket_log_probs
from kdpipe.store.layout import CRC_BYTES, ArrayLayout, choose_shard_rows
from kdpipe.store.manifest import STATISTICS
from kdpipe.store.shard_file import encode_shard, index_bytes
from kdpipe.targets import MixedTargets, OutputSpec, SampledTargets, SparseTargets, Targets

GRADIENT_ERROR = 0.05
"""The largest gradient error of an encoding that is recommended."""
DENSE_CLASSES = 4000
"""Up to so many classes every one of them is kept, where that fits."""
DRAWS = 8
"""How often a sampled encoding is drawn for its expected error."""
SMALLEST_GRADIENT = 1e-12
"""The norm, per position, below which a gradient in float64 is none."""
_LADDER = (2, 5, 10, 20, 50, 100, 200, 500)
_RUNGS = 4
_WHOLE_TOPK = 100


def candidates(num_classes: int, temperatures: Sequence[float], masked: bool) -> list[TargetEncoding]:
    """What could be stored of C classes. `masked`: the teacher says -inf."""
    sizes = [k for k in _LADDER if k < num_classes][-_RUNGS:]
    if num_classes <= _WHOLE_TOPK:
        sizes.append(num_classes)
    topk = [TopK(k=k, values=values, temperatures=temperatures) for k in sizes for values in ("float16", "int8")]
    head = min(16, num_classes // 4)
    sampled = [Sampled(draws=min(50, num_classes)), *([Sampled(draws=head, head=head)] if head else [])]
    return [Dense(dtype="float16"), Dense(dtype="float32"), Int8(masked_classes=masked), *topk, *sampled]


def title_of(encoding: TargetEncoding) -> str:
    """A short name with the parameters that count."""
    value = encoding.to_json()
    match value:
        case {"name": "dense", "dtype": dtype}:
            return f"dense {dtype}"
        case {"name": "topk", "k": k, "values": values, "top_p": top_p}:
            return f"topk {k} {values}" + ("" if top_p is None else f" p {top_p:g}")
        case {"name": "sampled", "draws": draws, "head": head}:
            return f"sampled {draws}" + (f" head {head}" if head else "")
    return str(value["name"])


def profiled(encoding: TargetEncoding, profile: str) -> TargetEncoding:
    """The same encoding in the `fast` or the `compact` profile."""
    return encoding_from_json({**encoding.to_json(), "compact": profile == "compact"})


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What a temperature keeps of the teacher; None where these targets cannot serve it.

    `kl` is KL(teacher || targets) in nats, for topk over k + 1 buckets; `head_mass` the teacher's mass on the kept
    classes; `gradient_error` is `|g' - g| / |g|` over the whole sample, for sampled the root mean square of one draw.
    """

    temperature: float
    kl: float | None
    head_mass: float | None
    gradient_error: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One encoding on the sample: bytes per position by profile (without statistics), top-1 agreement, fidelity."""

    encoding: TargetEncoding
    bytes_each: Mapping[str, float]
    top1_agreement: float
    at: Sequence[Fidelity]

    def gradient_error(self, temperatures: Sequence[float]) -> float | None:
        """The largest one at the given temperatures; None where it does not serve all of them."""
        known = {each.temperature: each.gradient_error for each in self.at}
        errors = [known.get(each) for each in temperatures]
        return None if None in errors else max((each for each in errors if each is not None), default=0.0)


class Sample:
    """A teacher's finite or masked (-inf) logits `[P, C]` on the CPU, a key per position, and a student's gradients."""

    def __init__(self, logits: Tensor, keys: NDArray[np.uint64], temperatures: Sequence[float]) -> None:
        self.logits = logits if logits.dtype == torch.float64 else logits.float()  # as a capture encodes them
        self.keys, self.temperatures = keys, temperatures
        self.output = OutputSpec(name="logits", shape=tuple(logits.shape[1:]))
        self.student = made_up_student(self.logits)
        self.exact = {
            each: torch.softmax(self.student / each, dim=-1) - torch.softmax(self.logits.double() / each, dim=-1)
            for each in temperatures
        }

    def through(self, encoding: TargetEncoding, draw: int = 0) -> Targets:
        """What a store would give back; for a sampled encoding one of many draws."""
        return encoding.decode(encoding.encode(self.logits, self.keys + np.uint64(draw)), self.output)

    def squared_error(self, targets: Targets, temperature: float) -> float:
        """`|g' - g|^2 / |g|^2`: what forward KL tells the student through these targets, and what it should tell.

        Where it should tell next to nothing (a student and a teacher that are sure of the same classes), the error is
        that of rounding, and counts against `SMALLEST_GRADIENT` per position.
        """
        student = self.student.clone().requires_grad_()
        loss = ForwardKL(temperature=temperature)(student, _widened(targets)).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        exact = self.exact[temperature]
        least = len(exact) * SMALLEST_GRADIENT**2
        return float((gradient / temperature - exact).square().sum() / exact.square().sum().clamp(min=least))


def measure(encoding: TargetEncoding, sample: Sample, shard_rows: int) -> Measured:
    """Encode and decode a sample as a store of such shards would. Raises `ConfigError` where it cannot."""
    encoding.check(sample.output)
    draws = [sample.through(encoding)]
    if isinstance(draws[0], SampledTargets):
        draws += [sample.through(encoding, draw) for draw in range(1, DRAWS)]
    return Measured(
        encoding=encoding,
        bytes_each={each: stored_bytes(profiled(encoding, each), sample, shard_rows) for each in ("fast", "compact")},
        top1_agreement=float((_top1(draws[0]) == sample.logits.argmax(dim=-1)).double().mean()),
        at=[_fidelity(sample, draws, temperature) for temperature in sample.temperatures],
    )


def shard_rows_of(encoding: TargetEncoding, output: OutputSpec, num_rows: int) -> int:
    """Rows per shard that a store of `num_rows` rows would choose for one output and its statistics."""
    statistics = ArraySpec(dtype="float32", shape=(*output.shape[:-1], len(STATISTICS)))
    return choose_shard_rows([*encoding.arrays(output).values(), statistics], num_rows)


def stored_bytes(encoding: TargetEncoding, sample: Sample, shard_rows: int) -> float:
    """Bytes per position in shards of `shard_rows`, of one chunk each, checksums and index included.

    Whole shards where the sample has as many positions, else one of a power of two of them, and for each position that
    it lacks what its second half adds to its first: what a chunk takes however few rows it holds counts once.
    """
    rows = min(shard_rows, 1 << (len(sample.logits).bit_length() - 1))
    counted = len(sample.logits) // rows * rows
    arrays = encoding.encode(sample.logits[:counted], sample.keys[:counted])
    measured, each_more = 0, 0.0
    for suffix, spec in encoding.arrays(sample.output).items():
        array = arrays[suffix]
        shards = [_shard_bytes(array[start : start + rows], spec) for start in range(0, counted, rows)]
        measured += sum(shards)
        if rows < shard_rows:
            each_more += max(0, shards[0] - _shard_bytes(array[: rows // 2], spec)) / (rows - rows // 2)
    share = rows / shard_rows
    return measured / counted * share + each_more * (1 - share)


def _shard_bytes(array: NDArray[Any], spec: ArraySpec) -> int:
    """Of a shard of these rows, in one chunk; of none, what a chunk takes whatever it holds."""
    rows = max(1, len(array))
    layout = ArrayLayout(name="", **vars(spec), shard_rows=rows, chunk_rows=rows)
    if not len(array):
        return CRC_BYTES + index_bytes(layout)
    return sum(len(piece) for part in encode_shard(array, layout) for piece in part)


def kl_to_targets(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """KL(teacher || targets) in nats: a teacher's full logits `[..., C]` -> `[...]`, in float64.

    Sparse targets: over their k + 1 buckets. Infinite where the targets rule out a class that the teacher does not.
    """
    log_q = _widened(targets).log_probs(temperature)  # type: ignore[union-attr]
    log_p = teacher_log_probs(logits, targets, temperature)
    difference = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1)


def teacher_log_probs(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """The teacher's log-probabilities in float64, of what the targets tell apart: `[..., C]` or k + 1 buckets."""
    wide = logits.double()
    if isinstance(targets, SparseTargets):
        return bucket_log_probs(wide, targets.ids, ~torch.isneginf(targets.head), temperature)
    return torch.log_softmax(wide / temperature, dim=-1)


def made_up_student(logits: Tensor) -> Tensor:
    """Logits of a student in the middle of its training: 0.8 times the teacher's, and noise N(0, 1) of a fixed seed.

    Where the teacher masks a class, the student says what its teacher says about the least probable other one.
    """
    wide = logits.double()
    lowest = torch.where(torch.isneginf(wide), torch.inf, wide).amin(dim=-1, keepdim=True)
    noise = torch.randn(wide.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.8 * wide.maximum(lowest) + noise


def _fidelity(sample: Sample, draws: Sequence[Targets], temperature: float) -> Fidelity:
    targets, kl, mass, error = draws[0], None, None, None
    if _serves(targets, temperature):
        squares = [sample.squared_error(each, temperature) for each in draws]
        error = math.sqrt(sum(squares) / len(squares))
        if not isinstance(targets, SampledTargets):
            kl = max(0.0, float(kl_to_targets(sample.logits, targets, temperature).mean()))
        if isinstance(targets, SparseTargets):
            kept = teacher_log_probs(sample.logits, targets, temperature)[..., :-1]
            mass = float(kept.exp().sum(dim=-1).mean())
    return Fidelity(temperature=temperature, kl=kl, head_mass=mass, gradient_error=error)


def _serves(targets: Targets, temperature: float) -> bool:
    """Whether forward KL at T can be computed from targets, exactly or without bias."""
    match targets:
        case SampledTargets():
            return temperature == 1
        case SparseTargets():
            return temperature in targets.temperatures
    return True


def _widened(targets: Targets) -> Targets:
    """The same targets in float64, so that what is measured is the encoding's error alone."""
    floats: dict[str, Any] = {
        each.name: value.double()
        for each in fields(targets)
        if isinstance(value := getattr(targets, each.name), Tensor) and value.is_floating_point()
    }
    return replace(targets, **floats)


def _top1(targets: Targets) -> Tensor:
    match targets:
        case SparseTargets():
            place = targets.head.argmax(dim=-1, keepdim=True)
        case SampledTargets():
            place = targets.weights.argmax(dim=-1, keepdim=True)
        case _:
            assert not isinstance(targets, MixedTargets)  # which no store holds
            return targets.values.argmax(dim=-1)
    return targets.ids.gather(-1, place).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A measured encoding with its bytes per row in each profile; `refused` says which loss it cannot serve."""

    measured: Measured
    row_bytes: Mapping[str, float]
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an encoding must do: hold C classes of all rows (times views) that the teacher says so fast, on this disk.

    `places` are all rows times all views: `fast` has room for those of a view that the teacher is not shown, too;
    `compact` holds zeros there, in next to no bytes. `temperatures` are those of the student's losses.
    """

    num_classes: int
    rows: int
    places: int
    rows_per_s: float
    temperatures: Sequence[float]
    free_bytes: int
    write_bytes_per_s: float

    def profile(self, offer: Offer) -> str | None:
        """The profile that fits the free space, `fast` before `compact`."""
        return next((each for each in ("fast", "compact") if self.total(offer, each) <= self.free_bytes), None)

    def total(self, offer: Offer, profile: str) -> float:
        """Bytes of the whole store's logits in a profile."""
        return offer.row_bytes[profile] * (self.places if profile == "fast" else self.rows)

    def error(self, offer: Offer) -> float:
        """The largest gradient error at the losses' temperatures; infinite where it cannot serve them."""
        error = offer.measured.gradient_error(self.temperatures)
        return math.inf if error is None or offer.refused else error

    def size(self, offer: Offer) -> float:
        """Bytes of all rows, in the profile that fits, else in the smaller one."""
        profile = self.profile(offer)
        return self.total(offer, profile) if profile else min(self.total(offer, each) for each in offer.row_bytes)

    def write_rate(self, offer: Offer) -> float:
        """Bytes per second that the teacher would have written, in that profile."""
        return self.size(offer) / self.rows * self.rows_per_s


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The encoding and profile to take (None: there is none), and why."""

    encoding: TargetEncoding | None
    reason: str


def recommend(offers: Sequence[Offer], needs: Needs) -> Recommendation:
    """Which encoding to take, by this rule.

    1. Out is what cannot serve every loss of the student, and what does not fit the free space even when compact.
    2. Up to 4,000 classes: dense, else int8, if its gradient error is within 5 % and the disk keeps up.
    3. Otherwise the smallest whose gradient error is within 5 %; of those the disk keeps up with, if there are any.
    4. If none is within 5 %: the one with the smallest gradient error.
    """
    serving = [each for each in offers if math.isfinite(needs.error(each))]
    if not serving:
        return Recommendation(encoding=None, reason="no encoding can serve the losses of student.losses")
    fitting = [each for each in serving if needs.profile(each)]
    if not fitting:
        return Recommendation(encoding=None, reason=_too_large(min(serving, key=needs.size), needs))
    exact = [each for each in fitting if needs.error(each) <= GRADIENT_ERROR]
    if not exact:
        why = f"no encoding that fits has a gradient error within {GRADIENT_ERROR:.0%}; this one has the smallest"
        return _taken(min(fitting, key=needs.error), needs, why)
    keeping_up = [each for each in exact if needs.write_rate(each) <= needs.write_bytes_per_s]
    for name in ("dense", "int8") if needs.num_classes <= DENSE_CLASSES else ():
        for each in keeping_up:
            if each.measured.encoding.to_json()["name"] == name:
                return _taken(each, needs, f"{needs.num_classes:,} classes are few enough to keep every one")
    why = f"the smallest with a gradient error within {GRADIENT_ERROR:.0%}"
    if not keeping_up:
        why += ", though the disk is slower than the teacher"
    return _taken(min(keeping_up or exact, key=needs.size), needs, why)


def _taken(offer: Offer, needs: Needs, why: str) -> Recommendation:
    temperatures = ", ".join(f"{each:g}" for each in needs.temperatures)
    size, rate, speed = (
        decimal(round(each)) for each in (needs.size(offer), needs.write_rate(offer), needs.write_bytes_per_s)
    )
    measured = (
        f"gradient error {100 * needs.error(offer):.2g} % at T = {temperatures}; {size} of "
        f"{decimal(needs.free_bytes)} free; {rate}/s to write of {speed}/s"
    )
    encoding = profiled(offer.measured.encoding, needs.profile(offer) or "fast")
    return Recommendation(encoding=encoding, reason=f"{why} ({measured})")


def _too_large(smallest: Offer, needs: Needs) -> str:
    return (
        f"nothing that serves the losses of student.losses fits: the smallest, "
        f"{title_of(smallest.measured.encoding)}, needs {decimal(round(needs.size(smallest)))} and "
        f"{decimal(needs.free_bytes)} are free. Free some space, or cache fewer rows or views"
    )
