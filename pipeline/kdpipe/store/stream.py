"""Shuffled batches of a store's targets, read ahead in pools of whole chunks, within a memory budget.

Shapes: B batch, N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from kdpipe.distributed import rank, world_size
from kdpipe.errors import ConfigError
from kdpipe.order import BatchOrder, Group, Shuffle
from kdpipe.store.reading import RowPool
from kdpipe.store.rows import row_numbers
from kdpipe.store.target_store import TargetStore
from kdpipe.targets import Targets
from kdpipe.views import CLEAN, ViewSpec

RAM_BUDGET_BYTES = 512 * 2**20
_SLOTS = 2
"""One pool is read while the other is learnt from."""

RowNumbers = NDArray[np.int64]
StreamedBatch = tuple[RowNumbers, dict[str, Targets]]


class TargetPools:
    """Targets of groups of batches: one group is read by a thread while the one before it is served.

    `kept`: store rows that are read once and kept, when they fit in memory and have one view. `verify_always` checks a
    chunk's checksum at every reading, not at the first only.
    """

    def __init__(
        self,
        store: TargetStore,
        outputs: Sequence[str] | None = None,
        kept: RowNumbers | None = None,
        *,
        verify_always: bool = False,
    ) -> None:
        self._store, self._outputs, self._verify_always = store, outputs, verify_always
        self._layouts = [store.layouts[name] for name in store.array_names(outputs)]
        self._kept = None if kept is None else _ascending(kept)
        self._memory: RowPool | None = None
        self._free: list[RowPool] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, reads with a store of its own: this one's files are closed with it."""
        return {**self.__dict__, "_memory": None, "_free": []}

    def batches(self, groups: Iterable[tuple[int, Group]]) -> Iterator[StreamedBatch]:
        """(row numbers, targets by output) of every batch of `groups` of (view, store rows), in their order."""
        if self._kept is not None:
            yield from self._from_memory(groups, self._kept)
            return
        pools = self._free or [self._pool() for _ in range(_SLOTS)]
        self._free = []
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdpipe-read-ahead") as thread:
            read: tuple[RowPool, Group] | None = None
            for number, (view, group) in enumerate(groups):
                pool = pools[number % _SLOTS]
                known = read if read is not None and read[1].epoch == group.epoch else None
                carried = {} if known is None else known[0].tail(len(known[1].tail))
                reading = thread.submit(pool.load, view, group.rows, carried)
                if read is not None:
                    yield from self._serve(*read)
                reading.result()
                read = (pool, group)
            if read is not None:
                yield from self._serve(*read)
        self._free = pools

    def _serve(self, pool: RowPool, group: Group) -> Iterator[StreamedBatch]:
        start = 0
        for number, rows in enumerate(group.batches):
            arrays = pool.view(slice(start, start + len(rows)))
            if number == len(group.batches) - 1:  # whoever takes batches still holds this one when the pool is filled
                arrays = {name: array.copy() for name, array in arrays.items()}
            yield rows, self._store.decode(arrays, self._outputs)
            start += len(rows)

    def _from_memory(self, groups: Iterable[tuple[int, Group]], kept: RowNumbers) -> Iterator[StreamedBatch]:
        for view, group in groups:
            if self._memory is None:
                memory = self._pool()
                memory.load(view, kept)
                self._memory = memory  # whole: a load that was interrupted is begun again
            every = len(kept) == self._store.num_rows
            for rows in group.batches:
                arrays = self._memory.take(rows if every else np.searchsorted(kept, rows))
                yield rows, self._store.decode(arrays, self._outputs)

    def _pool(self) -> RowPool:
        return RowPool(self._store.reader, self._layouts, verify_always=self._verify_always)


class TargetStream(IterableDataset[StreamedBatch]):
    """Batches `(row numbers [B], targets by output)` of a store, one epoch per iteration, every row exactly once.

    The order depends on `(seed, epoch)` and the rows only: not on ranks, workers or memory. Under torchrun rank r of n
    takes every n-th row of each batch; loader worker w of n takes every n-th batch. Rows that fit `ram_budget_bytes`
    in a single view are kept in memory, otherwise two pools of rows are. `state_dict` says where the stream stands, in
    mid-epoch too, and `load_state_dict` goes on from there; both are about the process that iterates. A thread reads
    ahead, so that loader workers are not needed for speed; each worker has a copy of the stream, so that with workers
    `set_epoch` must be called before each epoch (before the first with persistent ones, which go from epoch to epoch,
    whatever it says). Two iterations at once need a stream each.

        for rows, targets in TargetStream(open_store("data/targets/big"), batch_size=256): ...
    """

    def __init__(
        self,
        store: TargetStore,
        *,
        batch_size: int,
        seed: int = 0,
        rows: RowNumbers | None = None,
        outputs: Sequence[str] | None = None,
        views: ViewSpec = CLEAN,
        ram_budget_bytes: int = RAM_BUDGET_BYTES,
        verify_always: bool = False,
    ) -> None:
        """`rows [N]`: the store's rows to meet, one that is named n times n times (None: all, once).

        A budget of 0 keeps nothing but the two pools. Raises `ConfigError` for a budget that the pools do not fit in,
        and for a mask of rows.
        """
        if ram_budget_bytes < 0:
            raise ConfigError(f"ram_budget_bytes is {ram_budget_bytes}; expected 0 or more")
        wanted = np.arange(store.num_rows) if rows is None else row_numbers(rows).copy()
        for view in range(1, views.num_views) if views.count else (0,):
            store.check_rows(wanted, view)
        width = store.row_bytes(outputs)
        self._views = views
        self._order = BatchOrder(
            rows=wanted,
            batch_size=batch_size,
            seed=seed,
            shuffle=Shuffle.for_row_bytes(width),
            rank=rank(),
            world_size=world_size(),
        )
        kept = views.count == 0 and len(wanted) * width <= ram_budget_bytes
        if not kept and ram_budget_bytes:
            self._order.check_budget(width, ram_budget_bytes)
        self._pools = TargetPools(store, outputs, wanted if kept else None, verify_always=verify_always)
        self._step = 0
        self._epoch_is_set = self._in_worker = False
        self._num_iterations = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._order.steps_per_epoch

    def __iter__(self) -> Iterator[StreamedBatch]:
        """The rest of the current epoch."""
        first, steps = self._step, self._order.steps_per_epoch
        if not steps:
            return
        groups = self._order.groups(first, (first // steps + 1) * steps)
        worker = get_worker_info()
        if worker is not None and not self._epoch_is_set:
            raise ConfigError(
                "loader workers cannot know which epoch it is: call stream.set_epoch(epoch) before each epoch, or "
                "leave num_workers at 0 (a thread reads ahead anyhow)"
            )
        if worker is not None and self._in_worker and first % steps:
            raise ConfigError(
                "the epoch before this one was left in the middle, and persistent workers have read ahead, each to "
                "another batch: make the DataLoader with persistent_workers=False, or leave num_workers at 0 (a thread "
                "reads ahead anyhow)"
            )
        self._in_worker = worker is not None
        self._num_iterations += 1
        this = self._num_iterations
        views = ((self._views.view_of_epoch(group.epoch), group) for group in groups)
        for number, batch in enumerate(self._pools.batches(views)):
            if self._num_iterations != this:
                raise ConfigError(
                    "another iteration of this stream has begun, or its place was set meanwhile; two at once need a "
                    "stream each, and a place that is set is that of the next iteration"
                )
            self._step = first + number + 1
            if worker is None or number % worker.num_workers == worker.id:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of an epoch, counted from 0."""
        if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or epoch < 0:
            raise ConfigError(f"epoch is {epoch!r}; expected a whole number, 0 or more")
        self._go_to(int(epoch) * self._order.steps_per_epoch)
        self._epoch_is_set = True

    def _go_to(self, step: int) -> None:
        self._step = int(step)
        self._num_iterations += 1  # one that goes on would move the place again

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: batches since the start of epoch 0, and what the batches depend on."""
        return {"step": self._step, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state_dict` was called, on any number of ranks.

        Raises `ConfigError` for what is no state of a stream, or that of a stream of other batches.
        """
        if (
            not isinstance(state, dict)
            or state.keys() != {"step", *self._settings}
            or type(state["step"]) is not int
            or not 0 <= state["step"] < 2**63
        ):
            raise ConfigError(f"found {state}; expected what a stream's state_dict() gave")
        others = [f"{key} {state[key]!r}, here {here!r}" for key, here in self._settings.items() if state[key] != here]
        if others:
            raise ConfigError(
                f"the state is of a stream of other batches ({'; '.join(others)}); make this stream with the arguments "
                "that it had, on a store of the same rows"
            )
        self._go_to(state["step"])

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What the batches of a step depend on; ranks and memory change only who reads which part of them."""
        order = self._order
        return {
            "batch_size": int(order.batch_size),
            "seed": int(order.seed),
            "rows": hashlib.blake2b(np.ascontiguousarray(order.rows).data, digest_size=8).hexdigest(),
            "block_rows": order.shuffle.block_rows,
            "views": self._views.count,
        }


def _ascending(rows: RowNumbers) -> RowNumbers:
    """Each row once; the rows themselves where they ascend already."""
    return rows if bool((rows[1:] > rows[:-1]).all()) else np.unique(rows)
