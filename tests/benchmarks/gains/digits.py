"""Every loss on logits: scikit-learn's digits, labels for 150 of 1,075 rows, a student of one hidden layer of 16."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gains import LABELS_ONLY, REPOSITORY, Arm, accuracies, report
from kdpipe.config import load_yaml

LOSSES: dict[str, tuple[float, dict[str, Any]]] = {
    "ForwardKL": (0.9, {"temperature": 4}),
    "ForwardKL, standardised": (0.9, {"temperature": 2, "standardise": True}),
    "SoftTargetCE": (0.9, {"temperature": 4}),
    "ReverseKL": (0.9, {"temperature": 4}),
    "GeneralisedJSD": (10.0, {"temperature": 4}),
    "TotalVariation": (3.0, {"temperature": 4}),
    "LogitMSE": (0.1, {}),
    "LogitMSE, centred": (0.1, {"centred": True}),
    "DKD": (0.9, {"temperature": 4, "beta": 2}),
    "NKD": (0.9, {"temperature": 1}),
    "DIST": (2.0, {"temperature": 4}),
    "ULD": (1.5, {}),
}
"""Name -> weight and arguments. Weights by the size of each loss in its first steps, not searched."""


def settings(num_seeds: int, epochs: int) -> dict[str, Any]:
    """The demo's settings, with more seeds and a smaller student."""
    found: dict[str, Any] = load_yaml(REPOSITORY / "params.yaml")
    found["data"]["path"] = str(REPOSITORY / found["data"]["path"])
    found["student"] |= {"seeds": num_seeds, "model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [16]}}
    found["student"]["train"] |= {"epochs": epochs}
    return found


def arms() -> list[Arm]:
    """One per loss."""
    result = []
    for name, (weight, arguments) in LOSSES.items():
        loss = {"factory": f"kdpipe.losses:{name.partition(',')[0]}", "teacher": "big", "weight": weight, **arguments}
        result.append(Arm(name=name, changes={"student": {"losses": [loss]}}))
    return result


def main(num_seeds: int = 40, epochs: int = 60, folder: Path | None = None) -> None:
    """Print the table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = accuracies(Path(scratch), settings(num_seeds, epochs), arms())
    report("digits, 150 labels", found, [LABELS_ONLY, "ForwardKL"], began)
