from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import settings

# Threads of small tensors only wait for each other; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline would make tests depend on how busy the machine is.
settings.register_profile("kdpipe", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("kdpipe")


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Projects add their folders to `sys.path`; thousands of tests' folders would make every import slow."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def system_calls(tmp_path_factory):
    """A function that runs a script and gives its calls of fsync and rename, with the first path of each."""

    def run(script, *arguments, within):
        trace = tmp_path_factory.mktemp("trace") / "calls"
        python = [sys.executable, "-c", script, *arguments]
        strace = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", trace]
        if shutil.which("strace") is None or subprocess.run([*strace, "true"], check=False).returncode != 0:
            pytest.skip("needs strace, and the right to trace a process")
        subprocess.run([*strace, *python], check=True)
        call = re.compile(rf'(fsync|rename)\w*\(.*?[<"]({re.escape(str(within))}[^>"]*)[>"]')
        return [" ".join(found.groups()) for line in trace.read_text().splitlines() if (found := call.search(line))]

    return run
