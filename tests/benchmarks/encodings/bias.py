"""Whether draws are right on average."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.encodings.printing import table
from benchmarks.encodings.teachers import next_words
from kdpipe.encodings import Sampled
from kdpipe.targets import OutputSpec


def unbiased(draws: int) -> None:
    """z-test: the mean weight of each class over many rows of the same logits, against its probability."""
    logits = next(next_words(1, 2000)).logits
    probs = torch.softmax(logits.double(), dim=-1)[0]
    rows = []
    for name, encoding in {
        "n = 50": Sampled(draws=50),
        "n = 50, stratified": Sampled(draws=50, stratified=True),
        "head 12 + 8": Sampled(draws=8, head=12),
        "head 12 + 8, stratified": Sampled(draws=8, head=12, stratified=True),
    }.items():
        num_rows = -(-draws // encoding.draws)
        keys = np.random.default_rng(1).integers(0, 2**64, num_rows, dtype=np.uint64)
        arrays = encoding.encode(logits.expand(num_rows, -1), keys)
        targets = encoding.decode(arrays, OutputSpec(name="logits", shape=(len(probs),)))
        head = targets.ids[0, : encoding.head]
        exact = (targets.weights[0, : encoding.head].double() / probs[head] - 1).abs()
        bins, expected = grouped(probs, head, least=50 / num_rows / encoding.draws)
        drawn = bins[targets.ids[:, encoding.head :]]
        weights = torch.zeros(num_rows, len(expected), dtype=torch.float64)
        weights.scatter_add_(1, drawn, targets.weights[:, encoding.head :].double())
        z = (weights.mean(dim=0) - expected) / (weights.std(dim=0) / num_rows**0.5)
        chance = min(1.0, len(z) * 2 * float(stats.norm.sf(z.abs().max())))
        biggest = f"{exact.max():.1e}" if encoding.head else "-"
        rows.append(
            [
                name,
                f"{num_rows * encoding.draws:,}",
                f"{len(z)}",
                f"{z.abs().max():.2f}",
                f"{chance:.2f}",
                f"{z.square().mean():.2f}",
                biggest,
            ]
        )
    header = [
        "encoding",
        "draws",
        "groups",
        "largest z",
        "its p (Bonferroni)",
        "mean z^2",
        "head: largest relative error",
    ]
    table(header, rows)


def grouped(probs: Tensor, head: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """A group number for each class `[C]`, classes in order of probability until a group has `least`; group masses.

    Classes of the head, which are never drawn, are in no group: they add nothing to the first one.
    """
    rest = probs.clone()
    rest[head] = 0.0
    bins, masses, mass = torch.zeros(len(probs), dtype=torch.long), [0.0], 0.0
    for class_id in rest.argsort(descending=True).tolist():
        if masses[-1] >= least:
            masses.append(0.0)
        bins[class_id] = len(masses) - 1
        masses[-1] += rest[class_id].item()
        mass += rest[class_id].item()
    if masses[-1] < least and len(masses) > 1:
        bins[bins == len(masses) - 1] -= 1
        last = masses.pop()
        masses[-1] += last
    return bins, torch.tensor(masses, dtype=torch.float64)
