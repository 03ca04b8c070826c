"""The k most probable classes, and the mass of all others at every temperature that is asked for.

Shapes: B batch, C classes, K kept places, N temperatures; `...` stands for further axes (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import ArraySpec, as_json, check_choice, check_kind, narrowed
from kdpipe.encodings.class_ids import (
    check_num_classes,
    ids_array,
    largest_classes,
    narrowest,
    restored_ids,
    stored_ids,
)
from kdpipe.encodings.int8 import quantised
from kdpipe.errors import ConfigError
from kdpipe.targets import OutputSpec, SparseTargets, check_temperatures, widened

UNUSED = 255
"""The int8 code of a place without a class; 0 to 254 are log-probs."""
_MAX_K = 2**16 - 1
_VALUES = ("float16", "int8")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """k classes: sorted ids, log-probs at T = 1, and the unnormalised tail log-mass `log R_T` at each temperature.

    With ids of i bytes (1, 2 or 4, as the classes need) and N temperatures, T = 1 always among them, in bytes per row:
    `float16` values (i + 2) k + 4N with |error| <= |log-prob| * 2^-11 + 2^-22, one below -65504 counting as -65504;
    `int8` values (i + 1) k + 4N + 4 with |error| <= scale + (1 + |log-prob|) 2^-20, scale = the kept log-probs' range /
    254, after the head is rescaled to its exact mass `1 - R_1`. The last terms are float32's rounding.

    `top_p` keeps the fewest classes whose mass reaches it, at least `min_k` and at most k; `.num_kept` says how many.
    `compact` stores the ids' steps, compressed. Measured with int8 values, three temperatures and uniformly random ids
    (the worst): k = 64 of 50,304 classes 165 bytes, of 151,936 175; k = 128 of 151,936 323; k = 100 of 21,841 228.
    """

    name: ClassVar[str] = "topk"
    k: int
    values: str = "float16"
    temperatures: Sequence[float] = (1.0,)
    top_p: float | None = None
    min_k: int = 1
    compact: bool = False

    def __post_init__(self) -> None:
        """Refuse parameters that mean nothing; temperatures are sorted and T = 1 is added."""
        if not 1 <= self.min_k <= self.k <= _MAX_K:
            raise ConfigError(f"k is {self.k} and min_k {self.min_k}; expected 1 <= min_k <= k <= {_MAX_K}")
        check_choice("values", self.values, _VALUES)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a probability above 0, up to 1")
        check_temperatures([1.0, *self.temperatures])
        object.__setattr__(self, "temperatures", tuple(sorted({1.0, *map(float, self.temperatures)})))

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse features, fewer classes than k, and more than ids can name."""
        check_kind(self.name, output, "logits")
        check_num_classes(self.name, output.shape[-1])
        if self.k > output.shape[-1]:
            raise ConfigError(f"k is {self.k}, but the output {output.name!r} has {output.shape[-1]} classes")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """Ids, log-probs (or codes and `.scale`), `.tails [..., N]` and, for `top_p`, `.num_kept [...]`."""
        tokens, places = output.shape[:-1], (*output.shape[:-1], self.k)
        specs = {".tails": ("float32", (*tokens, len(self.temperatures)))}
        if self.values == "int8":
            specs |= {".codes": ("uint8", places), ".scale": ("float32", tokens)}
        else:
            specs |= {".log_probs": ("float16", places)}
        if self.top_p is not None:
            specs |= {".num_kept": (narrowest(self.k), tokens)}
        others = {
            suffix: ArraySpec(dtype=dtype, shape=shape, compressed=self.compact)
            for suffix, (dtype, shape) in specs.items()
        }
        return {**ids_array(output.shape[-1], places, self.compact), **others}

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of logits `[B, ..., C]`; of equal classes at the last place the lower id is kept."""
        log_probs = _log_probs(widened(values))
        ids, used = largest_classes(log_probs, self._num_kept(log_probs), self.k)
        head = log_probs.gather(-1, ids).masked_fill(~used, -torch.inf)
        tails = tail_log_masses(log_probs, ids, self.temperatures)
        mass = head.double().exp().sum(dim=-1)
        at_1 = self.temperatures.index(1.0)
        tails[..., at_1] = torch.where(mass < _SMALL_MASS, torch.log1p(-mass).to(tails.dtype), tails[..., at_1])
        return self.encode_kept(ids, head, tails, values.shape[-1])

    def encode_kept(self, ids: Tensor, head: Tensor, tails: Tensor, num_classes: int) -> dict[str, NDArray[Any]]:
        """Arrays of sorted ids `[..., k]`, their log-probs at T = 1 (-inf where unused) and `log R_T [..., N]`."""
        arrays = {**stored_ids(ids, num_classes, self.compact), ".tails": tails.float().cpu().numpy()}
        if self.values == "int8":
            arrays |= _codes_of(head)
        else:
            arrays[".log_probs"] = narrowed("float16", head, head).cpu().numpy()
        if self.top_p is not None:
            arrays[".num_kept"] = (~torch.isneginf(head)).sum(dim=-1).cpu().numpy().astype(narrowest(self.k))
        return arrays

    def encode_alike(self, shape: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Arrays `[1, ..., *]` of `alike`."""
        return self.encode_kept(*self.alike(shape), shape[-1])

    def alike(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probs and `log R_T` `[1, ..., *]` of a row of `shape` `(..., C)` whose classes are all alike.

        What stands where a teacher said nothing: the lowest ids, as `encode` keeps them of equal logits. C may be any
        number.
        """
        *tokens, num_classes = shape
        num_kept = self.k
        if self.top_p is not None:
            num_kept = min(max(math.ceil(self.top_p * num_classes), self.min_k), self.k)
        place, others = torch.arange(self.k).expand(1, *tokens, self.k), num_classes - num_kept
        head = torch.where(place < num_kept, -math.log(num_classes), -math.inf)
        log_others = math.log(others) if others else -math.inf
        tails = torch.tensor([log_others - math.log(num_classes) / each for each in self.temperatures])
        return place.clamp(max=num_kept - 1), head, tails.expand(1, *tokens, -1)

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> SparseTargets:
        """Targets of stored rows, head and tails in float32."""
        tails = torch.from_numpy(arrays[".tails"])
        if self.values == "int8":
            head = _head_of(arrays[".codes"], arrays[".scale"], tails[..., self.temperatures.index(1.0)])
        else:
            head = torch.from_numpy(arrays[".log_probs"]).float()
        return SparseTargets(
            ids=restored_ids(arrays[".id_steps" if self.compact else ".ids"], self.compact),
            head=head,
            tails=tails,
            temperatures=tuple(self.temperatures),
            num_classes=output.shape[-1],
        )

    def _num_kept(self, log_probs: Tensor) -> Tensor:
        """How many classes each row keeps `[B, ...]`."""
        if self.top_p is None:
            return torch.full(log_probs.shape[:-1], self.k, device=log_probs.device)
        mass = log_probs.topk(self.k, dim=-1).values.exp().cumsum(dim=-1)
        return ((mass < self.top_p).sum(dim=-1) + 1).clamp(self.min_k, self.k)


def _log_probs(logits: Tensor) -> Tensor:
    """`[..., C]`. The largest class is added last: `torch.log_softmax` on a CPU loses small ones that come after it."""
    largest, place = logits.max(dim=-1, keepdim=True)
    below = logits - largest
    others = below.exp().scatter_(-1, place, 0.0).sum(dim=-1, keepdim=True)
    return below.sub_(others.log1p_())


def tail_log_masses(log_probs: Tensor, ids: Tensor, temperatures: Sequence[float]) -> Tensor:
    """`log R_T [..., N]`: logsumexp of log-prob / T over the classes other than `ids [..., K]`; -inf where none is."""
    tail = log_probs.scatter(-1, ids, -torch.inf)
    largest = tail.amax(dim=-1, keepdim=True)
    below = tail.sub_(torch.where(torch.isneginf(largest), 0.0, largest))
    masses = [(below / each).exp_().sum(dim=-1).log_() + largest.squeeze(-1) / each for each in temperatures]
    return torch.stack(masses, dim=-1)


def _codes_of(head: Tensor) -> dict[str, NDArray[Any]]:
    """Codes uint8 `[..., K]` below the row's largest log-prob, and `.scale [...]`."""
    below = head.amax(dim=-1, keepdim=True) - head
    unused = torch.isposinf(below)
    codes, scale = quantised(below.masked_fill(unused, 0.0), num_steps=UNUSED - 1)
    return {".codes": codes.masked_fill(unused, UNUSED).cpu().numpy(), ".scale": scale.cpu().numpy()}


def _head_of(codes: NDArray[np.uint8], scale: NDArray[np.float32], tail: Tensor) -> Tensor:
    """Log-probs `[..., K]` whose mass is exactly `1 - R_1`, which is why the row's largest need not be stored."""
    unused = torch.from_numpy(codes == UNUSED)
    shape = (torch.from_numpy(codes) * -torch.from_numpy(scale).unsqueeze(-1)).masked_fill(unused, -torch.inf)
    mass = torch.log(-torch.expm1(tail.double().clamp(max=_LARGEST_TAIL)))
    return (shape - torch.logsumexp(shape, dim=-1, keepdim=True) + mass.unsqueeze(-1)).float()


_SMALL_MASS = 0.5
"""A head of less than this is not told from `1 - R_1`, a difference of numbers near 1, but the other way round."""
_LARGEST_TAIL = -1e-12
"""log R_1 of a head that holds next to nothing, and of a row that the teacher did not answer."""
