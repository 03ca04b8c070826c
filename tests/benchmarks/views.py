"""Augmented views: built-in transforms of batches beside Pillow, image by image, and kornia where it is installed."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks.measuring import cpu_s, machine, shown
from kdpipe.transforms import Blur, ColourJitter, Compose, Flip, PadAndCrop, RandAugment, RandomResizedCrop
from kdpipe.views import Transform, ViewSpec

Images = NDArray[np.uint8]
PerImage = Callable[[Any, random.Random], Any]

BUILT_IN: Mapping[str, Transform] = {
    "pad and crop, flip": Compose([PadAndCrop(padding=4), Flip()]),
    "resized crop, flip": Compose([RandomResizedCrop(), Flip()]),
    "jitter, no hue": ColourJitter(hue=0),
    "jitter": ColourJitter(),
    "blur": Blur(probability=1),
    "RandAugment": RandAugment(num_ops=2, magnitude=9),
}


def _flip(image: Any, rng: random.Random) -> Any:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _pad_crop_flip(image: Any, rng: random.Random) -> Any:
    padded, (width, height) = ImageOps.expand(image, 4), image.size
    left, top = rng.randint(0, 8), rng.randint(0, 8)
    return _flip(padded.crop((left, top, left + width, top + height)), rng)


def _resized_crop_flip(image: Any, rng: random.Random) -> Any:
    width, height = image.size
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = rng.randint(0, width - wide), rng.randint(0, height - tall)
            box = (left, top, left + wide, top + tall)
            return _flip(image.resize(image.size, Image.Resampling.BILINEAR, box=box), rng)
    return _flip(image, rng)


def _jitter_without_hue(image: Any, rng: random.Random) -> Any:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.6, 1.4))
    return image


def _jitter(image: Any, rng: random.Random) -> Any:
    hue, saturation, value = _jitter_without_hue(image, rng).convert("HSV").split()
    turn = round(rng.uniform(-0.1, 0.1) * 255)
    turned = Image.fromarray((np.asarray(hue).astype(np.int16) + turn).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _blur(image: Any, rng: random.Random) -> Any:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))


def _moved(image: Any, *matrix: float) -> Any:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


_STRENGTH = 9 / 30
_RAND_AUGMENT: Sequence[Callable[[Any, int], Any]] = [
    lambda image, sign: image,
    lambda image, sign: _moved(image, 1, sign * 0.3 * _STRENGTH, 0, 0, 1, 0),
    lambda image, sign: _moved(image, 1, 0, 0, sign * 0.3 * _STRENGTH, 1, 0),
    lambda image, sign: _moved(image, 1, 0, sign * int(150 / 331 * image.width * _STRENGTH), 0, 1, 0),
    lambda image, sign: _moved(image, 1, 0, 0, 0, 1, sign * int(150 / 331 * image.height * _STRENGTH)),
    lambda image, sign: image.rotate(sign * 30 * _STRENGTH),
    lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * _STRENGTH),
    lambda image, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * _STRENGTH),
    lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * _STRENGTH),
    lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * _STRENGTH),
    lambda image, sign: ImageOps.posterize(image, 8 - round(4 * _STRENGTH)),
    lambda image, sign: ImageOps.solarize(image, math.ceil(255 * (1 - _STRENGTH))),
    lambda image, sign: ImageOps.autocontrast(image),
    lambda image, sign: ImageOps.equalize(image),
]


def _rand_augment(image: Any, rng: random.Random) -> Any:
    for _ in range(2):
        image = rng.choice(_RAND_AUGMENT)(image, rng.choice((-1, 1)))
    return image


PILLOW: Mapping[str, PerImage] = {
    "pad and crop, flip": _pad_crop_flip,
    "resized crop, flip": _resized_crop_flip,
    "jitter, no hue": _jitter_without_hue,
    "jitter": _jitter,
    "blur": _blur,
    "RandAugment": _rand_augment,
}


def by_pillow(change: PerImage) -> Callable[[Images], Images]:
    """Image by image, from array to array."""
    rng = random.Random(0)
    return lambda images: np.stack([np.asarray(change(Image.fromarray(each), rng)) for each in images])


def by_kornia(side: int) -> Mapping[str, Callable[[Images], Images]]:
    """Batches as float tensors and back; without RandAugment, as kornia's draws its operations once per batch."""
    from kornia import augmentation

    flip, size = augmentation.RandomHorizontalFlip(), (side, side)
    changes = {
        "pad and crop, flip": [augmentation.RandomCrop(size, padding=4), flip],
        "resized crop, flip": [augmentation.RandomResizedCrop(size), flip],
        "jitter, no hue": [augmentation.ColorJitter(0.4, 0.4, 0.4)],
        "jitter": [augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "blur": [augmentation.RandomGaussianBlur((13, 13), (0.1, 2.0), p=1.0)],
    }

    def run(operations: Sequence[Any], images: Images) -> Images:
        with torch.inference_mode():
            found = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            for operation in operations:
                found = operation(found)
            return np.asarray((found * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1))

    return {name: lambda images, each=each: run(each, images) for name, each in changes.items()}


def images_of(count: int, side: int) -> Images:
    """Smooth colours with some noise."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in coarse]
    noisy = np.stack(smooth) + generator.normal(scale=8, size=(count, side, side, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def compare(side: int, num_images: int, batch_size: int, rounds: int) -> None:
    """Print CPU microseconds per image of every way, rounds interleaved, and their ratio to Pillow in each round."""
    images, ids = images_of(num_images, side), [f"image-{number}" for number in range(num_images)]
    batches = [slice(start, start + batch_size) for start in range(0, num_images, batch_size)]
    kornia = by_kornia(side) if find_spec("kornia") else {}
    for name, transform in BUILT_IN.items():
        spec = ViewSpec(count=1, transform=transform)
        ways: dict[str, Callable[[slice], Any]] = {
            "Pillow": partial(_part_of, images, by_pillow(PILLOW[name])),
            "kdpipe": lambda part, spec=spec: spec.of({"image": images[part]}, ids[part], 1),
        }
        if name in kornia:
            ways["kornia"] = partial(_part_of, images, kornia[name])
        costs = {way: [] for way in ways}
        for _ in range(rounds + 1):  # the first one warms up
            for way, change in ways.items():
                gc.collect()
                began = cpu_s()
                for part in batches:
                    change(part)
                costs[way].append((cpu_s() - began) / num_images * 1e6)
        measured = {way: values[1:] for way, values in costs.items()}
        times = [
            shown([slow / quick for slow, quick in zip(measured["Pillow"], values, strict=True)])
            for way, values in measured.items()
            if way != "Pillow"
        ]
        blank = ["-"] * (3 - len(measured))
        row = [*map(shown, measured.values()), *blank, *times, *blank]
        print(f"| {side} | {name} | {' | '.join(row)} |", flush=True)


def _part_of(images: Images, change: Callable[[Images], Images], part: slice) -> Images:
    return change(images[part])


def main(sizes: Mapping[int, tuple[int, int]] | None = None, rounds: int = 7, folder: Path | None = None) -> None:
    """Print the table; `sizes` maps a side to a number of images and a batch size."""
    torch.set_num_threads(1)
    packages = ["numpy", "torch", "pillow", *(["kornia"] if find_spec("kornia") else [])]
    print(machine(*packages))
    if not find_spec("kornia"):
        print("kornia: left out, it is not installed")
    print(f"\nCPU us per image of one thread, uint8 RGB in and out: median (min-max) of {rounds} rounds\n")
    print("| side | what | Pillow | kdpipe | kornia | Pillow / kdpipe | Pillow / kornia |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for side, (num_images, batch_size) in (sizes or {32: (1024, 256), 224: (64, 32)}).items():
        compare(side, num_images, batch_size, rounds)
