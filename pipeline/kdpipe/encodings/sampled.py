"""Draws from the teacher's distribution: unbiased, few bytes, nothing truncated.

Shapes: B batch, R rows x tokens, C classes, K places; `...` stands for further axes (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import ArraySpec, as_json, check_kind
from kdpipe.encodings.class_ids import (
    check_num_classes,
    ids_array,
    largest_classes,
    narrowest,
    restored_ids,
    stored_ids,
)
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform
from kdpipe.targets import OutputSpec, SampledTargets

_MAX_DRAWS = 2**16 - 1
_PURPOSE = int.from_bytes(b"sampled")
"""Keeps the draws apart from a view's transform, which has the same keys and perhaps the same seed."""
_CLASSES_AT_ONCE = 2**23


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """`draws` classes drawn with replacement from p at T = 1: unique ids and how often each was drawn.

    `count / draws` is an unbiased estimate of p: of variance p (1 - p) / draws (Anshumann et al. 2025, "Sparse logit
    sampling"). With `head: k` the k largest classes are kept exactly and the draws are from the others, which have the
    mass r: `r count / draws`, of variance p (r - p) / draws. `stratified` takes one draw in each of `draws` equal parts
    of the mass, ids in order, instead of independent ones: as unbiased, and no variance is ever larger.

    Bytes per row with ids of i bytes, counts of c bytes (1 up to 255 draws, else 2): (i + c) draws + 2, and
    (i + 2) k + 2 for a head. The head's log-probs, r and the entropy are float16 (|error| <= |x| * 2^-11 + 2^-25).
    Draws depend on `seed`, the row's key and the token's position only (inverse CDF in float64, Philox).

    docs/benchmarks/encodings.md has compact bytes and gradient errors; stratified draws were the better choice there.
    """

    name: ClassVar[str] = "sampled"
    draws: int
    head: int = 0
    seed: int = 0
    stratified: bool = False
    compact: bool = False

    def __post_init__(self) -> None:
        """Refuse parameters out of range."""
        if not 1 <= self.draws <= _MAX_DRAWS:
            raise ConfigError(f"draws is {self.draws}; expected 1 to {_MAX_DRAWS}")
        if not 0 <= self.head <= _MAX_DRAWS:
            raise ConfigError(f"head is {self.head}; expected 0 (no exact head) to {_MAX_DRAWS}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; expected 0 to 2^64 - 1")

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse features, a head that leaves no class to draw, and more classes than ids can name."""
        check_kind(self.name, output, "logits")
        check_num_classes(self.name, output.shape[-1])
        if self.head >= output.shape[-1]:
            raise ConfigError(
                f"head is {self.head}, but the output {output.name!r} has {output.shape[-1]} classes; expected fewer "
                "than that, or encoding: dense"
            )

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """Ids and `.counts [..., draws]`, `.entropy [...]`; for a head its ids and log-probs, and `.tail_mass`."""
        tokens, num_classes = output.shape[:-1], output.shape[-1]
        drawn, kept = (*tokens, self.draws), (*tokens, self.head)
        specs = {".counts": (narrowest(self.draws), drawn), ".entropy": ("float16", tokens)}
        arrays = ids_array(num_classes, drawn, self.compact)
        if self.head:
            specs |= {".head.log_probs": ("float16", kept), ".tail_mass": ("float16", tokens)}
            arrays |= {f".head{suffix}": spec for suffix, spec in ids_array(num_classes, kept, self.compact).items()}
        return arrays | {
            suffix: ArraySpec(dtype=dtype, shape=shape, compressed=self.compact)
            for suffix, (dtype, shape) in specs.items()
        }

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of logits `[B, ..., C]`; `keys [B]` decide the draws."""
        if keys is None or len(keys) != len(values):
            raise ConfigError(
                f"encoding 'sampled' draws by one key per row; found {'none' if keys is None else len(keys)} for "
                f"{len(values)} rows"
            )
        points = torch.from_numpy(uniform(keys, (*values.shape[1:-1], self.draws), self.seed ^ _PURPOSE)).flatten(0, -2)
        logits = values.flatten(0, -2)
        at_once = max(1, _CLASSES_AT_ONCE // values.shape[-1])
        parts = [
            self._encode(part, place.to(values.device))
            for part, place in zip(torch.split(logits, at_once), torch.split(points, at_once), strict=True)
        ]
        joined = {suffix: np.concatenate([part[suffix] for part in parts]) for suffix in parts[0]}
        return {suffix: each.reshape(*values.shape[:-1], *each.shape[1:]) for suffix, each in joined.items()}

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> SampledTargets:
        """Targets of stored rows: the head's places first, then the draws'. Weights in float32."""
        suffix = ".id_steps" if self.compact else ".ids"
        ids = restored_ids(arrays[suffix], self.compact)
        weights = torch.from_numpy(arrays[".counts"].astype(np.float32)) / self.draws
        if self.head:
            ids = torch.cat([restored_ids(arrays[f".head{suffix}"], self.compact), ids], dim=-1)
            weights = weights * torch.from_numpy(arrays[".tail_mass"]).float().unsqueeze(-1)
            weights = torch.cat([torch.from_numpy(arrays[".head.log_probs"]).float().exp(), weights], dim=-1)
        entropy = torch.from_numpy(arrays[".entropy"]).float()
        return SampledTargets(ids=ids, weights=weights, entropy=entropy, num_classes=output.shape[-1])

    def _encode(self, logits: Tensor, points: Tensor) -> dict[str, NDArray[Any]]:
        """Arrays of logits `[R, C]` and uniform numbers `[R, draws]`."""
        num_classes = logits.shape[-1]
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs.nan_to_num(neginf=0.0)).sum(dim=-1)
        arrays: dict[str, NDArray[Any]] = {".entropy": _half(entropy)}
        if self.head:
            num_kept = torch.full(logits.shape[:-1], self.head, device=logits.device)
            head_ids, _ = largest_classes(log_probs, num_kept, self.head)
            probs = probs.scatter(-1, head_ids, 0.0)
            arrays |= {
                **{f".head{key}": each for key, each in stored_ids(head_ids, num_classes, self.compact).items()},
                ".head.log_probs": _half(log_probs.gather(-1, head_ids)),
                ".tail_mass": _half(probs.sum(dim=-1)),
            }
        ids, counts = counted(self._drawn(probs, points))
        counts = counts * (probs.amax(dim=-1, keepdim=True) > 0)
        arrays[".counts"] = counts.cpu().numpy().astype(narrowest(self.draws))
        return arrays | stored_ids(ids, num_classes, self.compact)

    def _drawn(self, probs: Tensor, points: Tensor) -> Tensor:
        """Classes `[R, draws]`, ascending, of unnormalised probabilities `[R, C]`: the inverse CDF at the points."""
        if self.stratified:
            points = (torch.arange(self.draws, device=points.device) + points) / self.draws
        else:
            points = points.sort(dim=-1).values
        cdf = probs.cumsum(dim=-1)
        total = cdf[:, -1:]
        points = (points * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cdf, points.contiguous(), right=True).clamp(max=probs.shape[-1] - 1)


def counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ids and their counts `[R, K]` of ascending ids `[R, K]`; an unused place repeats the last id, count 0."""
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(dim=-1) - 1
    ids = drawn[:, -1:].repeat(1, drawn.shape[1]).scatter(-1, place, drawn)
    return ids, torch.zeros_like(drawn).scatter_add(-1, place, torch.ones_like(drawn))


def _half(values: Tensor) -> NDArray[np.float16]:
    return values.clamp(min=torch.finfo(torch.float16).min).half().cpu().numpy()
