"""Real DVC in a real git repository, by its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def shell(folder, *command):
    """Run a command that must succeed; returns what it printed."""
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def repro(folder, *command):
    """Run `dvc repro` (or another command); returns the stages that really ran."""
    output = shell(folder, "dvc", *(command or ("repro",)))
    return re.findall(r"Running stage '([^']+)'", output)


def git_init(folder):
    """Make a folder a git repository."""
    shell(folder, "git", "init", "--quiet")
    shell(folder, "git", "config", "user.email", "test@localhost")
    shell(folder, "git", "config", "user.name", "test")


def commit(folder):
    """Everything that git does not ignore."""
    shell(folder, "git", "add", "--all")
    shell(folder, "git", "commit", "--quiet", "--message", "x")
