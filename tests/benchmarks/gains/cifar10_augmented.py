"""CIFAR-10 under augmentation, on rows that the teacher has not learnt; it was trained under that augmentation."""

from __future__ import annotations

from functools import partial

from benchmarks.gains import cifar10_unseen

main = partial(cifar10_unseen.main, augmented=True)
"""The settings of `cifar10_unseen` but for the teacher's training."""
