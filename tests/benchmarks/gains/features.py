"""What features add to logits: a residual network of digits teaches one a tenth as wide; labels for 150 rows."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gains import LABELS_ONLY, Arm, accuracies, digits, report

LOGITS = {"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 4, "weight": 0.9}
FEATURE = "blocks.2"
LAST = {"teacher": "big", "output": FEATURE, "student_output": FEATURE}
LOSSES: dict[str, dict[str, Any]] = {
    "HintMSE": {"factory": "kdpipe.losses:HintMSE", "projector": "conv1x1", "weight": 1.0},
    "CosineFeature": {"factory": "kdpipe.losses:CosineFeature", "projector": "conv1x1", "weight": 1.0},
    "AttentionTransfer": {"factory": "kdpipe.losses:AttentionTransfer", "weight": 1.0},
    "SimilarityPreserving": {"factory": "kdpipe.losses:SimilarityPreserving", "weight": 100.0},
    "RKD": {"factory": "kdpipe.losses:RKD", "distance_weight": 1, "angle_weight": 2, "weight": 1.0},
}
"""With weights of the size of their papers, not searched."""
ONLY_LOGITS = "ForwardKL"


def settings(num_seeds: int, epochs: int, teacher_epochs: int) -> dict[str, Any]:
    """Those of `digits`, with residual networks on both sides."""
    found = digits.settings(num_seeds, epochs)
    big, network = found["teachers"]["big"], {"factory": "kdpipe.models.resnet:ResNet", "depth": 8}
    big |= {"model": {**network, "width": 20}}
    big["train"] |= {"epochs": teacher_epochs, "learning_rate": 0.01}
    found["targets"]["big"] |= {"outputs": ["logits", FEATURE], "classifier": "head"}
    found["student"] |= {"model": {**network, "width": 2}, "losses": [LOGITS]}
    found["student"]["train"] |= {"learning_rate": 0.01}
    return found


def arms() -> list[Arm]:
    """Logits alone; with each feature loss; and feature losses without logits: beside labels, or as SimKD is meant."""
    beside = [
        Arm(name=f"{ONLY_LOGITS} and {name}", changes={"student": {"losses": [LOGITS, {**LAST, **loss}]}})
        for name, loss in LOSSES.items()
    ]
    alone = {"losses": [{**LAST, **LOSSES["AttentionTransfer"]}], "label_weight": 1.0}
    reused = {"losses": [{**LAST, "factory": "kdpipe.losses:SimKD", "projector": "conv1x1"}], "label_weight": 0.0}
    return [
        Arm(name=ONLY_LOGITS),
        *beside,
        Arm(name="AttentionTransfer and labels", changes={"student": alone}),
        Arm(name="SimKD alone", changes={"student": reused}),
    ]


def main(num_seeds: int = 10, epochs: int = 40, teacher_epochs: int = 30, folder: Path | None = None) -> None:
    """Print the table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = accuracies(Path(scratch), settings(num_seeds, epochs, teacher_epochs), arms())
    report("digits, 150 labels, features of a residual network", found, [LABELS_ONLY, ONLY_LOGITS], began)
