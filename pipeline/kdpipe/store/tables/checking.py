"""A batch of a table's rows, each number checked where the teacher spoke.

Shapes: B rows of a batch, C classes, K places, N temperatures; `...` stands for further axes (tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from kdpipe.encodings import TargetEncoding, TopK
from kdpipe.errors import DataError
from kdpipe.inputs import look_like_probabilities
from kdpipe.store.manifest import COVERED
from kdpipe.store.tables.columns import depth_of, entry_type, list_lengths, numbers, padded, spoken, token_lengths
from kdpipe.targets import OutputSpec

SLACK = 1e-3
"""How far a log-probability may lie above 0 and a sum of probabilities above 1: rounding of whoever wrote them."""
MASS_SLACK = 1e-2
"""How far head and tail together may lie from 1: float16 log-probabilities are off by up to 2^-11 of their size."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a table's columns are about: `tokens` is `()` or `(T,)`, `temperatures` are those of `tail_log_mass`.

    `stored` is how an exported table's logits were stored.
    """

    path: Path
    tokens: tuple[int, ...]
    num_classes: int
    temperatures: tuple[float, ...]
    stored: TargetEncoding | None = None


def read_lists(
    path: Path, batch: pa.RecordBatch, name: str, shape: Sequence[int | None]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """See `columns.padded`. Raises `DataError`."""
    try:
        return padded(batch[name], shape, as_integers=name == "class_ids")
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: column {name}: {error}") from None


def read_lengths(path: Path, batch: pa.RecordBatch, name: str, depth: int) -> list[NDArray[np.int64]]:
    """See `columns.list_lengths`. Raises `DataError`."""
    try:
        return list_lengths(batch[name], depth)
    except ValueError as error:
        raise DataError(f"{path}: column {name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Head:
    """Sorted `ids [B, ..., K]`, their log-probs (-inf: an unused place) and `tails [B, ..., N]` at `temperatures`."""

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    tails: NDArray[np.float64]
    temperatures: Sequence[float]


class CheckedRows:
    """Rows of one batch. Raises `DataError` naming samples whose numbers mean nothing."""

    def __init__(self, meaning: Meaning, batch: pa.RecordBatch, sample_ids: NDArray[np.str_]) -> None:
        self._path, self._tokens, self._num_classes = meaning.path, meaning.tokens, meaning.num_classes
        self._given, self._batch, self._ids = meaning.temperatures, batch, sample_ids
        self._stored = meaning.stored
        self.covered = self._coverage()

    def logits(self) -> Tensor:
        """Logits `[B, ..., C]`, zeros where the teacher did not speak."""
        num_classes = self._num_classes
        values, lengths = self._read("logits", (*self._tokens, num_classes))
        self._refuse(lengths != num_classes, f"have other than {num_classes} logits")
        largest = values.max(axis=-1)  # of NaN and others, the maximum is NaN
        beyond = ~_in_float32(largest) | (np.isfinite(values) & ~_in_float32(values)).any(axis=-1)
        self._refuse(beyond, "have logits that are NaN, +inf, all -inf or beyond float32")
        said = torch.from_numpy(values[self.covered])
        if len(said) > 1 and look_like_probabilities(said):
            raise DataError(
                f"{self._path}: logits are numbers from 0 to 1 with a sum of 1: probabilities; expected logits. Give "
                "their logarithm"
            )
        return torch.from_numpy(np.where(self.covered[..., np.newaxis], values, values.dtype.type(0)))

    def features(self, output: OutputSpec) -> Tensor:
        """Numbers `[B, ..., D]`, zeros where the teacher did not speak."""
        values, lengths = self._read(output.name, output.shape)
        where = spoken(self.covered, values, of_features=True)
        wrong = ((lengths != output.shape[-1])[..., np.newaxis] | ~_in_float32(values)) & where
        expected = f"have {output.name} that are NaN, beyond float32 or of another shape than {list(output.shape)}"
        self._refuse_rows(wrong.reshape(len(values), -1).any(axis=1), expected)
        return torch.from_numpy(np.where(where, values, values.dtype.type(0)))

    def head(self, encoding: TopK) -> Head:
        """Those that the encoding keeps of the classes that each row names; what the others have joins the tail."""
        temperatures = list(encoding.temperatures)
        ids, log_probs = self._classes(encoding.k)
        tails = self._tails(temperatures, log_probs)
        if ids.shape[-1] > encoding.k or (encoding.top_p is not None and not self._keeps_as(encoding)):
            dropped = np.where(_kept(log_probs, encoding), -np.inf, log_probs)
            joined = np.stack([logsumexp(dropped / each, axis=-1) for each in temperatures], axis=-1)
            tails, log_probs = np.logaddexp(tails, joined), np.where(np.isneginf(dropped), log_probs, -np.inf)
        ids, log_probs = _in_order(ids, log_probs)
        ids, log_probs = ids[..., : encoding.k], log_probs[..., : encoding.k]
        # An unused place repeats the last id.
        ids = np.maximum.accumulate(np.where(np.isneginf(log_probs), 0, ids), axis=-1)
        return Head(ids=ids, log_probs=log_probs, tails=tails, temperatures=temperatures)

    def _keeps_as(self, encoding: TopK) -> bool:
        """Whether an encoding keeps the very classes that the table's own kept: rounded numbers would keep others."""
        was = self._stored
        return isinstance(was, TopK) and (was.k, was.top_p, was.min_k) == (encoding.k, encoding.top_p, encoding.min_k)

    def _classes(self, least: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids in order and log-probs `[B, ..., K]`, unused places last; K is `least` or more.

        Where the teacher did not speak: the lowest ids, all classes equally probable.
        """
        num_classes, shape = self._num_classes, (*self._tokens, None)
        ids, num_ids = self._read("class_ids", shape)
        log_probs, num_log_probs = self._read("log_probs", shape)
        self._refuse(num_ids != num_log_probs, "have more class_ids than log_probs, or fewer")
        if ids.size and ids.dtype.kind not in "iu":
            raise DataError(f"{self._path}: class_ids hold null or other things than integers")
        width = max(least, ids.shape[-1], log_probs.shape[-1])
        ids, log_probs = (
            _widened(ids.astype(np.int64), width, 0),
            _widened(log_probs.astype(np.float64), width, -np.inf),
        )
        silent = ~self.covered
        ids[silent], log_probs[silent] = np.arange(width), -np.inf
        log_probs[silent, :least] = -np.log(num_classes)
        used = log_probs != -np.inf
        self._refuse((np.isnan(log_probs) | (log_probs > SLACK)).any(axis=-1), "have log_probs that are NaN or above 0")
        self._refuse(~used.any(axis=-1), "name no class of a probability above 0")
        outside = used & ((ids < 0) | (ids >= num_classes))
        self._refuse(outside.any(axis=-1), f"name classes outside 0..{num_classes - 1}")
        above = np.exp(log_probs).sum(axis=-1) > 1 + SLACK
        self._refuse(above, "have probabilities that sum to more than 1 (are log_probs logits?)")
        ids, log_probs = _in_order(ids, log_probs)
        twice = (ids[..., 1:] == ids[..., :-1]) & (log_probs[..., 1:] != -np.inf)
        self._refuse(twice.any(axis=-1), "name a class twice")
        return ids, np.minimum(log_probs, 0.0)

    def _tails(self, temperatures: Sequence[float], log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """`log R_T [B, ..., N]` of the classes that rows do not name; at T = 1 what is left, if not given."""
        tails = np.empty((*log_probs.shape[:-1], len(temperatures)))
        given = self._given
        if given:
            values, lengths = self._read("tail_log_mass", (*self._tokens, len(given)))
            self._refuse(lengths != len(given), f"have other than {len(given)} values of tail_log_mass")
            wrong = np.isnan(values) | np.isposinf(values)
            self._refuse(wrong.any(axis=-1), "have a tail_log_mass that is NaN or +inf")
        for number, temperature in enumerate(temperatures):
            if temperature in given:
                tails[..., number] = values[..., given.index(temperature)]
            else:
                tails[..., number] = self._remaining(log_probs)
            if temperature == 1:
                mass = np.exp(log_probs).sum(axis=-1) + np.exp(np.minimum(tails[..., number], 1.0))
                far = abs(mass - 1) > MASS_SLACK
                named = "class_ids and tail_log_mass" if 1.0 in given else "log_probs of all classes"
                self._refuse(far, f"have {named} whose probabilities do not sum to 1")
        others = self._num_classes - (log_probs > -np.inf).sum(axis=-1, keepdims=True)
        at_1 = tails[..., temperatures.index(1.0)]
        least, most = at_1, at_1
        if 1.0 not in given:  # what is left of 1 is as exact as the log_probs' rounding allows
            rest = np.exp(at_1)
            with np.errstate(divide="ignore"):
                least, most = np.log(np.maximum(rest - MASS_SLACK, 0.0)), np.log(rest + MASS_SLACK)
        for number, temperature in enumerate(temperatures):
            if temperature != 1:
                what = f"have a tail_log_mass at temperature {temperature:g} that does not go with the one at 1"
                wrong = _impossible(tails[..., number], temperature, (least, most), others[..., 0])
                self._refuse(wrong, f"{what}; are its values in the order of the temperatures?")
        with np.errstate(divide="ignore"):
            blank = np.log(others) - np.log(self._num_classes) / np.array(temperatures)
        return np.where(self.covered[..., np.newaxis], tails, blank)

    def _remaining(self, log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """`log(1 - sum p) [B, ...]`, -inf where no class is left."""
        rest = 1 - np.exp(log_probs).sum(axis=-1)
        is_whole = (log_probs > -np.inf).sum(axis=-1) == self._num_classes
        with np.errstate(divide="ignore"):
            return np.log(np.where(is_whole, 0.0, np.maximum(rest, 0.0)))

    def _coverage(self) -> NDArray[np.bool_]:
        """Where the teacher spoke, bool `[B, ...]`: where `covered` says so; by itself, about tokens with an entry."""
        said = self._num_said() > 0 if self._tokens else np.ones(self._batch.num_rows, np.bool_)
        if COVERED not in self._batch.schema.names:
            return said
        column = self._batch[COVERED]
        if column.null_count:
            raise DataError(f"{self._path}: column covered holds null; expected true or false in every row")
        if not pa.types.is_boolean(entry_type(column.type)):
            raise DataError(f"{self._path}: column covered holds {column.type}; expected true and false")
        if not depth_of(column.type):
            covered: NDArray[np.bool_] = said & numbers(column).reshape(-1, *[1] * len(self._tokens))
            return covered
        told, lengths = self._read(COVERED, self._tokens)
        untold = said & (np.arange(told.shape[-1]) >= lengths[:, np.newaxis])
        self._refuse_rows(np.asarray(untold.any(axis=-1)), "have fewer values of covered than tokens")
        return told

    def _num_said(self) -> NDArray[np.int64]:
        """How many logits, or classes, there are of each token `[B, T]`."""
        names = [each for each in ("logits", "class_ids", "log_probs") if each in self._batch.schema.names]
        try:
            first, *others = [token_lengths(self._batch[name], *self._tokens) for name in names]
        except ValueError as error:
            raise DataError(f"{self._path}: {' and '.join(names)}: {error}") from None
        return np.asarray(np.maximum(first, *others)) if others else first

    def _read(self, name: str, shape: Sequence[int | None]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return read_lists(self._path, self._batch, name, shape)

    def _refuse(self, wrong: NDArray[np.bool_], what: str) -> None:
        """Raise `DataError` if anything `wrong [B, ...]` is covered."""
        self._refuse_rows(np.logical_or.reduce((wrong & self.covered).reshape(len(wrong), -1), axis=1), what)

    def _refuse_rows(self, wrong: NDArray[np.bool_], what: str) -> None:
        """Raise `DataError` naming the samples of rows that are `wrong [B]`."""
        rows = np.flatnonzero(wrong)
        if len(rows):
            examples = ", ".join(self._ids[rows[:5]].tolist())
            raise DataError(f"{self._path}: {len(rows)} rows of a batch {what}, such as {examples}")


def _in_float32(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a number stays finite in float32, in which losses compute."""
    within: NDArray[np.bool_] = np.abs(values) <= np.finfo(np.float32).max
    return within


def _impossible(
    tails: NDArray[np.float64],
    temperature: float,
    at_1: tuple[NDArray[np.float64], NDArray[np.float64]],
    others: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Where `log R_T [B, ...]` cannot be that of `others [B, ...]` classes, their `log R_1` within two bounds `at_1`.

    Sums of powers (Jensen): with b = 1 / T, log R_T lies between b log R_1 and b log R_1 + (1 - b) log others.
    """
    low, high = (each / temperature for each in at_1)
    spread = (1 - 1 / temperature) * np.log(np.maximum(others, 1))  # below 0 where T is below 1
    with np.errstate(invalid="ignore"):
        below = tails < low + np.minimum(spread, 0) - MASS_SLACK * (1 + np.abs(low))
        above = tails > high + np.maximum(spread, 0) + MASS_SLACK * (1 + np.abs(high))
    return np.where(np.isneginf(high) | (others == 0), ~np.isneginf(tails), below | above)


def _in_order(ids: NDArray[np.int64], log_probs: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Both `[..., K]` by ascending id, unused places last."""
    order = np.argsort(np.where(np.isneginf(log_probs), np.iinfo(np.int64).max, ids), axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(log_probs, order, axis=-1)


def _kept(log_probs: NDArray[np.float64], encoding: TopK) -> NDArray[np.bool_]:
    """Which of the places `[..., K]`, ids ascending, an encoding keeps: as it does with logits."""
    order = np.argsort(-log_probs, axis=-1, kind="stable")  # of equals the lower id is kept
    num_kept = np.full(log_probs.shape[:-1], encoding.k)
    if encoding.top_p is not None:
        mass = np.exp(np.take_along_axis(log_probs, order, axis=-1)).cumsum(axis=-1)
        num_kept = ((mass < encoding.top_p).sum(axis=-1) + 1).clip(encoding.min_k, encoding.k)
    keep = np.zeros(log_probs.shape, np.bool_)
    np.put_along_axis(keep, order, np.arange(log_probs.shape[-1]) < num_kept[..., np.newaxis], axis=-1)
    return keep


def _widened(values: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    """Values `[..., K]` with more places, or a copy."""
    result = np.full((*values.shape[:-1], width), fill, values.dtype)
    result[..., : values.shape[-1]] = values
    return result
