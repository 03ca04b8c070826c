"""What is measured, always beside each other: accuracy, agreement with the teacher, KL, entropy, calibration.

Shapes: N rows, C classes. All at T = 1, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.losses import forward_kl
from kdpipe.preprocess import Preprocess
from kdpipe.targets import Targets

CALIBRATION_BINS = 15
PREDICT_ROWS = 1024


@torch.inference_mode()
def predict(model: nn.Module, inputs: PreparedInputs, rows: NDArray[np.int64], preprocess: Preprocess) -> Tensor:
    """Logits `[N, C]` of prepared rows, in the given order, on the CPU in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    blocks = [rows[start : start + PREDICT_ROWS] for start in range(0, len(rows), PREDICT_ROWS)]
    return torch.cat([model(preprocess(inputs.read(block)).to(device)).float().cpu() for block in blocks])


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says about rows at T = 1: its class `[N]`, the class's probability, and the entropy in nats.

    `spoken [N]` is False where it abstained.
    """

    top1: NDArray[np.int64]
    confidence: NDArray[np.float64]
    entropy: NDArray[np.float64]
    spoken: NDArray[np.bool_]

    @classmethod
    def of_logits(cls, logits: Tensor) -> Answers:
        """Answers of logits `[N, C]`."""
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        confidence, top1 = log_probs.exp().max(dim=-1)
        entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
        spoken = np.ones(len(logits), np.bool_)
        return cls(top1=top1.numpy(), confidence=confidence.numpy(), entropy=entropy.numpy(), spoken=spoken)

    @classmethod
    def of_statistics(cls, statistics: Mapping[str, NDArray[np.float32]], covered: Tensor | None) -> Answers:
        """A teacher's answers, as its store keeps them whatever the encoding."""
        spoken = np.ones(len(statistics["top1"]), np.bool_) if covered is None else covered.numpy()
        confidence, entropy = (statistics[name].astype(np.float64) for name in ("confidence", "entropy"))
        return cls(top1=statistics["top1"].astype(np.int64), confidence=confidence, entropy=entropy, spoken=spoken)

    def correct(self, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Confidence, and whether the class is right, of the rows that are labelled and spoken about."""
        known = (labels != MISSING_LABEL) & self.spoken
        return self.confidence[known], self.top1[known] == labels[known]


@dataclass(frozen=True, kw_only=True)
class Said:
    """A teacher's answers, and the targets that a student is compared with, for the same rows."""

    answers: Answers
    targets: Targets


def answer_metrics(answers: Answers, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and calibration on labelled rows, entropy on all; NaN where there are none."""
    confidence, correct = answers.correct(labels)
    return {
        "accuracy": float(correct.mean()) if len(correct) else math.nan,
        "ece": expected_calibration_error(confidence, correct),
        "entropy": float(answers.entropy[answers.spoken].mean()) if answers.spoken.any() else math.nan,
    }


def classification_metrics(logits: Tensor, labels: NDArray[np.int64], teachers: Mapping[str, Said]) -> dict[str, float]:
    """Accuracy and calibration on labelled rows; agreement with, and KL to, each teacher on the rows it speaks about.

    `agreement` and `kl_to_teacher` are about the first teacher; those of further ones end in the teacher's name.
    """
    answers = Answers.of_logits(logits)
    result = answer_metrics(answers, labels)
    for index, (name, said) in enumerate(teachers.items()):
        suffix = f"_{name}" if index else ""
        spoken = said.answers.spoken
        same = answers.top1 == said.answers.top1
        kl = forward_kl(logits.double(), said.targets).numpy()
        result[f"agreement{suffix}"] = float(same[spoken].mean()) if spoken.any() else math.nan
        result[f"kl_to_teacher{suffix}"] = max(0.0, float(kl[spoken].mean())) if spoken.any() else math.nan
    return result


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """ECE over 15 equal-width bins of the confidence (Guo et al. 2017, equation 5); NaN without rows."""
    if not len(correct):
        return math.nan
    return float(sum(abs(each.accuracy - each.confidence) * each.share for each in reliability(confidence, correct)))


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Rows whose confidence lies in one bin: their share of all rows, mean confidence and accuracy."""

    share: float
    confidence: float
    accuracy: float


def reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """Non-empty bins of the confidence, ascending."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        ReliabilityBin(
            share=float((bins == index).mean()),
            confidence=float(confidence[bins == index].mean()),
            accuracy=float(correct[bins == index].mean()),
        )
        for index in np.unique(bins)
    ]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Mean difference of paired runs, with the 95 % Student t interval of the mean, and what it says."""

    mean: float
    low: float
    high: float
    verdict: str


def paired_gain(ours: Sequence[float], theirs: Sequence[float]) -> Gain:
    """How much `ours` exceeds `theirs`, seed by seed.

    BEATS when the interval lies above 0, WORSE below, NO DIFFERENCE when it holds 0, UNDECIDED for fewer than 2 seeds.
    """
    difference = np.subtract(ours, theirs)
    mean = float(difference.mean())
    if len(difference) < 2:
        return Gain(mean=mean, low=math.nan, high=math.nan, verdict="UNDECIDED")
    from scipy.stats import t as student_t

    half = float(student_t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / math.sqrt(len(difference)))
    low, high = mean - half, mean + half
    verdict = "BEATS" if low > 0 else "WORSE" if high < 0 else "NO DIFFERENCE"
    return Gain(mean=mean, low=low, high=high, verdict=verdict)
