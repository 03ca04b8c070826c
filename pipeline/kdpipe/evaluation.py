"""What is measured, always beside each other: accuracy, agreement with the teacher, KL, entropy, calibration.

Shapes: N positions (rows, or tokens that count), C classes. All at T = 1, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from kdpipe.answers import Answers, Distance
from kdpipe.errors import ConfigError

CALIBRATION_BINS = 15
KEPT_CLASSES = 100
"""For the AUC the probabilities of every class are kept; of more classes than these they are not."""


def keeps_probabilities(names: Sequence[str], num_classes: int) -> bool:
    """Whether metrics need the probability of every class, and there are few enough of them."""
    return "auc" in names and num_classes <= KEPT_CLASSES


def check_metrics(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a metric that does not exist."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"the task names the metric {name!r}; there are {', '.join(METRICS)}")


def answer_metrics(answers: Answers, names: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy, calibration and those of `METRICS` on labelled positions, entropy on all; NaN where there are none.

    A metric that cannot be known from what is stored of a teacher is left out.
    """
    labelled = answers.labelled()
    correct = labelled.top1 == labelled.labels
    result = {
        "accuracy": _mean(correct),
        "ece": expected_calibration_error(labelled.confidence, correct),
        "entropy": _mean(answers.entropy[answers.spoken]),
    }
    further = {name: METRICS[name](labelled) for name in names}
    return result | {name: value for name, value in further.items() if value is not None}


def distance_metrics(
    answers: Answers, teachers: Mapping[str, Answers], distances: Mapping[str, Distance]
) -> dict[str, float]:
    """Agreement with, and KL to and from, each teacher at the positions it speaks about.

    `agreement`, `kl_to_teacher` (teacher || model) and `reverse_kl_to_teacher` (model || teacher) are about the first
    teacher; those of further ones end in the teacher's name.
    """
    result = {}
    for index, (name, said) in enumerate(teachers.items()):
        suffix = f"_{name}" if index else ""
        distance = distances[name]
        result[f"agreement{suffix}"] = _mean((answers.top1 == said.top1)[said.spoken])
        for key, values in (("kl_to_teacher", distance.kl), ("reverse_kl_to_teacher", distance.reverse_kl)):
            if values is not None:
                result[f"{key}{suffix}"] = float(np.maximum(0.0, _mean(values[said.spoken])))
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

    def interval(self, scale: float = 100, digits: int = 2) -> str:
        """As text, in points: "+3.15 [2.84, 3.45]"; the mean alone where there is no interval."""
        between = f" [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"
        return f"{scale * self.mean:+.{digits}f}{'' if math.isnan(self.low) else between}"


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


def gain_text(ours: Sequence[float], theirs: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """`paired_gain` for a table: "+3.15 [2.84, 3.45]: BEATS"."""
    gain = paired_gain(ours, theirs)
    return f"{gain.interval(scale, digits)}: {gain.verdict}"


def mean_text(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """Mean and standard deviation for a table, in %: "85.46 ± 0.03"; the mean alone of a single value."""
    spread = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{spread}"


def _macro_f1(labelled: Answers) -> float:
    """Mean F1 of the classes that are labels or answers, as scikit-learn has it."""
    if not len(labelled.labels):
        return math.nan
    return float(f1_score(labelled.labels, labelled.top1, average="macro", zero_division=0.0))


def _balanced_accuracy(labelled: Answers) -> float:
    """Mean recall of the classes that are labels (Brodersen et al. 2010)."""
    if not len(labelled.labels):
        return math.nan
    present = np.unique(labelled.labels)
    return float(recall_score(labelled.labels, labelled.top1, labels=present, average="macro", zero_division=0.0))


def _auc(labelled: Answers) -> float | None:
    """Area under the ROC curve of class 1; of more than two classes the mean of each against the rest.

    NaN where a class is no row's label.
    """
    if labelled.probabilities is None:
        return None
    num_classes = labelled.probabilities.shape[-1]
    if len(np.unique(labelled.labels)) < num_classes:
        return math.nan
    if num_classes == 2:
        return float(roc_auc_score(labelled.labels, labelled.probabilities[:, 1]))
    return float(roc_auc_score(labelled.labels, labelled.probabilities, multi_class="ovr", average="macro"))


def _label_nll(labelled: Answers) -> float | None:
    """Mean negative log-likelihood of the labels."""
    return None if labelled.nll is None else _mean(labelled.nll)


def _perplexity(labelled: Answers) -> float | None:
    """The exponential of the mean negative log-likelihood per token."""
    nll = _label_nll(labelled)
    with np.errstate(over="ignore"):
        return None if nll is None else float(np.exp(nll))


METRICS: Mapping[str, Callable[[Answers], float | None]] = {
    "macro_f1": _macro_f1,
    "balanced_accuracy": _balanced_accuracy,
    "auc": _auc,
    "nll": _label_nll,
    "perplexity": _perplexity,
}
"""What a task may name in `metrics`, of labelled positions; None where it cannot be known."""


def _mean(values: NDArray[Any]) -> float:
    """NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan
