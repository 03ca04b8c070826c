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


def largest_classes(values: Tensor, num_kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Sorted ids `[..., most]` of the `num_kept [...]` (1 to `most`) largest of values `[..., C]`, and used places.

    Of equal values at the last place the lower ids win. An unused place repeats the row's last id.
    """
    flat, kept = values.flatten(0, -2), num_kept.flatten()
    ordered = flat.topk(most, dim=-1).values
    last = ordered.gather(-1, kept.unsqueeze(-1) - 1)
    num_equal = kept - (ordered > last).sum(dim=-1)
    row, class_id = (flat >= last).nonzero(as_tuple=True)
    equal = flat[row, class_id] == last[row, 0]
    rank = _ranks(equal, row, len(flat))
    class_id = class_id[~equal | (rank < num_equal[row])]
    place = torch.arange(most, device=values.device)
    first = kept.cumsum(0) - kept
    ids = class_id[first.unsqueeze(-1) + place.minimum(kept.unsqueeze(-1) - 1)]
    shape = (*values.shape[:-1], most)
    return ids.view(shape), (place < kept.unsqueeze(-1)).view(shape)


def _ranks(marked: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """How many marked entries of the same row come before each of them; entries are sorted by row."""
    before = marked.cumsum(0) - marked.long()
    marked_in_row = torch.zeros(num_rows, dtype=torch.long, device=row.device).index_add_(0, row, marked.long())
    return before - (marked_in_row.cumsum(0) - marked_in_row)[row]
