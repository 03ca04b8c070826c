"""Class ids: which ones are kept, and how they are stored.

Shapes: B batch, C classes, K kept places; `...` stands for further axes (tokens).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import ArraySpec
from kdpipe.errors import ConfigError

MAX_CLASSES = 2**31


def check_num_classes(name: str, num_classes: int) -> None:
    """Refuse more classes than ids can name."""
    if num_classes > MAX_CLASSES:
        raise ConfigError(f"encoding {name!r} holds up to {MAX_CLASSES:,} classes; found {num_classes:,}")


def narrowest(largest: int) -> str:
    """The narrowest unsigned dtype (NumPy name) that holds numbers up to `largest`."""
    return "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "uint32"


def ids_array(num_classes: int, shape: tuple[int, ...], compact: bool) -> dict[str, ArraySpec]:
    """`.ids` or, compact, `.id_steps`: the same dtype, as narrow as the classes allow."""
    suffix = ".id_steps" if compact else ".ids"
    return {suffix: ArraySpec(dtype=narrowest(num_classes - 1), shape=shape, compressed=compact)}


def stored_ids(ids: Tensor, num_classes: int, compact: bool) -> dict[str, NDArray[np.unsignedinteger]]:
    """Sorted ids `[B, ..., K]` as they are stored: as they are, or the first one and then the differences."""
    if compact:
        ids = torch.cat([ids[..., :1], ids.diff(dim=-1)], dim=-1)
    return {".id_steps" if compact else ".ids": ids.cpu().numpy().astype(narrowest(num_classes - 1))}


def restored_ids(array: NDArray[np.unsignedinteger], compact: bool) -> Tensor:
    """Ids int64 `[B, ..., K]` of what is stored."""
    wide = torch.from_numpy(array.astype(np.int64))
    return wide.cumsum(dim=-1) if compact else wide


def largest_classes(values: Tensor, num_kept: Tensor, most: int) -> Tensor:
    """The `num_kept [...]` (1 to `most`) largest of values `[..., C]`, as a mask `[..., C]`.

    Of equal values at the last place the lower ids win.
    """
    ordered = values.topk(most, dim=-1).values
    last = ordered.gather(-1, num_kept.unsqueeze(-1) - 1)
    keep = values > last
    spare = num_kept.unsqueeze(-1) - keep.sum(dim=-1, keepdim=True)
    equal = values == last
    crowded = equal.sum(dim=-1, keepdim=True) > spare
    if bool(crowded.any()):
        rows = crowded.squeeze(-1)
        equal[rows] &= equal[rows].cumsum(dim=-1, dtype=torch.int32) <= spare[rows]
    return keep.logical_or_(equal)


def places_of(keep: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """Sorted ids `[..., K]` of a mask `[..., C]` with 1 to K classes in each row, and which places are used `[..., K]`.

    An unused place repeats the row's last id.
    """
    flat = keep.flatten(0, -2)
    class_id = flat.nonzero()[:, -1]
    num_kept = flat.sum(dim=-1)
    first = num_kept.cumsum(0) - num_kept
    place = torch.arange(num_places, device=keep.device).expand(len(flat), num_places)
    ids = class_id[first.unsqueeze(-1) + place.minimum(num_kept.unsqueeze(-1) - 1)]
    shape = (*keep.shape[:-1], num_places)
    return ids.view(shape), (place < num_kept.unsqueeze(-1)).view(shape)
