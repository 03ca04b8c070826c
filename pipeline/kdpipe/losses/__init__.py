"""Distances between a student and cached targets. Unreduced first; the mean over valid rows is the caller's.

base            what a loss is, what it may need, what of it counts
divergences     forward and reverse KL, soft-target cross-entropy, Jensen-Shannon, total variation, the kept head alone
logits          squared differences of logits, or of probabilities
decoupled       DKD and NKD: the label's class apart from all others
relational      DIST: correlations within rows and, over the batch, within classes
vocabularies    ULD: two vocabularies, compared rank by rank
features        hints, cosine, attention transfer: what is computed inside
similarities    SP and RKD: how the rows of a batch relate to each other in features
projectors      from the width of a student's features to its teacher's
balanced        KL in which rare classes weigh more
labels          the task's own loss, with class weights and logit adjustment
mixtures        several teachers as one
schedules       weights that change over a training
by_name         `kd_loss` for your own loop
distributions, buckets    what teacher and student say at a temperature: of all classes, or of those that were kept

Shapes everywhere: B batch, C classes, K kept classes; `...` stands for further axes (tokens). T is the temperature,
p = softmax(teacher / T), q = softmax(student / T); sums run over classes, logarithms are natural. All is computed in
float32 log-space whatever the autocast, or in float64 where the student's logits are.

A row whose targets are not `covered`, or that has no label where one is needed, gets some finite number, which means
nothing.
"""

from __future__ import annotations

from kdpipe.losses.balanced import BalancedKL
from kdpipe.losses.base import (
    DistillLoss,
    LossTerm,
    needs_labels,
    needs_whole_batch,
    reuses_classifier,
    valid_rows,
    values_of,
)
from kdpipe.losses.buckets import bucket_log_probs
from kdpipe.losses.by_name import LOSSES, kd_loss
from kdpipe.losses.decoupled import DKD, NKD
from kdpipe.losses.distributions import standardised
from kdpipe.losses.divergences import (
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    SoftTargetCE,
    TopKRenormKL,
    TotalVariation,
    forward_kl,
    reverse_kl,
)
from kdpipe.losses.features import AttentionTransfer, CosineFeature, HintMSE, SimKD
from kdpipe.losses.labels import LabelLoss, class_weighted, cross_entropy, logit_adjusted
from kdpipe.losses.logits import LogitMSE
from kdpipe.losses.mixtures import Mix, mixed
from kdpipe.losses.projectors import Projector, make_projector
from kdpipe.losses.relational import DIST
from kdpipe.losses.schedules import CONSTANT, Schedule
from kdpipe.losses.similarities import RKD, SimilarityPreserving
from kdpipe.losses.vocabularies import ULD

__all__ = [
    "CONSTANT",
    "DIST",
    "DKD",
    "LOSSES",
    "NKD",
    "RKD",
    "ULD",
    "AttentionTransfer",
    "BalancedKL",
    "CosineFeature",
    "DistillLoss",
    "ForwardKL",
    "GeneralisedJSD",
    "HintMSE",
    "LabelLoss",
    "LogitMSE",
    "LossTerm",
    "Mix",
    "Projector",
    "ReverseKL",
    "Schedule",
    "SimKD",
    "SimilarityPreserving",
    "SoftTargetCE",
    "TopKRenormKL",
    "TotalVariation",
    "bucket_log_probs",
    "class_weighted",
    "cross_entropy",
    "forward_kl",
    "kd_loss",
    "logit_adjusted",
    "make_projector",
    "mixed",
    "needs_labels",
    "needs_whole_batch",
    "reuses_classifier",
    "reverse_kl",
    "standardised",
    "valid_rows",
    "values_of",
]
