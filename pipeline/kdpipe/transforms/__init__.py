"""Transforms for views: random by the row's key alone, so that teacher and student see the same."""

from kdpipe.transforms.compose import Compose, PerExample
from kdpipe.transforms.images import Blur, ColourJitter, Erasing, Flip, Grey, PadAndCrop, RandomResizedCrop
from kdpipe.transforms.mixing import CutMix, Mixup
from kdpipe.transforms.rand_augment import RandAugment
from kdpipe.transforms.tables import Noise
from kdpipe.transforms.text import WordDropout

__all__ = [
    "Blur",
    "ColourJitter",
    "Compose",
    "CutMix",
    "Erasing",
    "Flip",
    "Grey",
    "Mixup",
    "Noise",
    "PadAndCrop",
    "PerExample",
    "RandAugment",
    "RandomResizedCrop",
    "WordDropout",
]
