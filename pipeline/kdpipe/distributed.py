"""Who does which part: row shards, and this process's place among its peers under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A row range `[start, stop)`: the unit of writing, of commit and of resume."""

    index: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows in this shard; the last shard of a store may hold fewer than the others."""
        return self.stop - self.start


def shards_of(num_rows: int, shard_rows: int) -> list[Shard]:
    """Cut `num_rows` rows into shards of `shard_rows`; the last one may be shorter."""
    return [
        Shard(index=index, start=start, stop=min(start + shard_rows, num_rows))
        for index, start in enumerate(range(0, num_rows, shard_rows))
    ]


def rank() -> int:
    """This process's number under torchrun; 0 without it. Raises `ConfigError` for half of torchrun's variables."""
    return _place()[0]


def world_size() -> int:
    """How many processes torchrun started; 1 without it. Raises `ConfigError` for half of torchrun's variables."""
    return _place()[1]


def _place() -> tuple[int, int]:
    """Rank and world size: torchrun sets both variables."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not any(found.values()):
        return 0, 1
    if not all(value.isdecimal() for value in found.values()):
        said = ", ".join(f"{name} is {value!r}" if value else f"{name} is not set" for name, value in found.items())
        raise ConfigError(f"{said}; torchrun sets both, to numbers. Unset them, or use torchrun")
    return int(found["RANK"]), int(found["WORLD_SIZE"])


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` CPU threads (None: as many as torch chooses).

    Last bits depend on the number. On a machine with other work, threads wait for each other in every operation: small
    models are many times faster on one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def join_peers() -> PartialState:
    """This process among its peers: by NCCL where there are GPUs, by gloo on CPUs.

    Raises `TrainingError` when Accelerate was set up before for another number of processes.
    """
    import torch
    from accelerate import PartialState

    # Without GPUs Accelerate sees torchrun only when it is told to use the CPU.
    state = PartialState(cpu=world_size() > 1 and not torch.cuda.is_available())
    if state.num_processes != world_size():
        raise TrainingError(
            f"there are {world_size()} processes (WORLD_SIZE), but Accelerate was set up for {state.num_processes}. "
            "Make no PartialState or Accelerator in this process before kdpipe.distributed.join_peers()."
        )
    return state
