"""Stages in processes of their own, started in milliseconds, to be killed or to run beside each other."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kdpipe.store import TargetStore
from projects import project_in

# A server that has imported everything and never ran a kernel: each child is a real process, ready in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["kdpipe_stages.cache_teacher", "kdpipe_stages.train_student", "torch._dynamo", "pyarrow.dataset"]
)


def cache_in(folder: Path) -> None:
    """`kdpipe cache-teacher big` in a project's folder."""
    from kdpipe_stages import cache_teacher

    cache_teacher.run(project_in(folder), "big")


def start(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process at work, in today's environment (the server that forks it has that of its own beginning)."""
    child = processes.Process(target=_work, args=(dict(os.environ), target, arguments))
    child.start()
    return child


def _work(environment: dict[str, str], target: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    target(*arguments)


def run(target: Callable[..., object], *arguments: Any) -> int | None:
    """Exit code of a process that works to its end."""
    child = start(target, *arguments)
    child.join()
    return child.exitcode


def wait_for(child: BaseProcess, started: Callable[[], object]) -> None:
    """Wait until `started()` turns true, or the process has ended."""
    while child.is_alive() and not started():
        time.sleep(0.001)


def seconds_of(target: Callable[..., object], folder: Path, started: Callable[[], object]) -> float:
    """How long a process works, from when `started()` turns true to its end."""
    child = start(target, folder)
    wait_for(child, started)
    began = time.monotonic()
    child.join()
    return time.monotonic() - began


def run_and_kill(target: Callable[..., object], folder: Path, started: Callable[[], object], seconds: float) -> bool:
    """SIGKILL a process `seconds` after `started()` turns true; returns whether it was still alive then."""
    child = start(target, folder)
    wait_for(child, started)
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode == -9


def work_folders(folder: Path) -> list[Path]:
    """Stores in the work area of a project."""
    return [manifest.parent for manifest in (folder / "data" / ".work").glob("*/manifest.json")]


def committed_rows(*stores: Path) -> int:
    """Rows of all shards that have a commit record."""
    total = 0
    for folder in stores:
        store = TargetStore.open(folder)
        total += store.num_rows - sum(shard.num_rows for _, shard in store.missing())
    return total


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: a SIGKILL loses nothing of it, and hundreds of fsyncs cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
