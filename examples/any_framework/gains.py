"""Gains of the student over labels only, in the metrics for rare classes too.

`python gains.py` pairs the seeds of per_seed.json. `python gains.py FILE FILE …` pairs runs whose students knew other
labels: each file is a run's per_seed.json, and counts by the mean over its seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdpipe.evaluation import gain_text, mean_text

METRICS = ("accuracy", "balanced_accuracy", "auc")
ARMS = ("student", "baseline")


def values(files: Sequence[Path], metric: str) -> dict[str, list[float]]:
    """By arm: one value per seed of a file, or of several files one per file."""
    runs = [json.loads(file.read_text()) for file in files]
    seeds = {arm: [[float(each[metric]) for each in run[arm]] for run in runs] for arm in ARMS}
    return {arm: of[0] if len(files) == 1 else [float(np.mean(each)) for each in of] for arm, of in seeds.items()}


def show(files: Sequence[Path]) -> None:
    """Mean ± standard deviation of both, %; the gain in points with its 95 % interval."""
    for metric in METRICS:
        found = values(files, metric)
        shown = [f"{arm} {mean_text(of)}" for arm, of in found.items()]
        print(f"{metric}: {', '.join(shown)}, gain {gain_text(found['student'], found['baseline'])}")


if __name__ == "__main__":
    show([Path(name) for name in sys.argv[1:]] or [Path("per_seed.json")])
