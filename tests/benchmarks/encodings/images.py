"""Image teachers: dense, int8, topk."""

from __future__ import annotations

from benchmarks.encodings.measures import MORE_TEMPERATURES, TEMPERATURES, measure
from benchmarks.encodings.printing import bytes_and_kl, describe
from benchmarks.encodings.sizes import Sizes
from benchmarks.encodings.teachers import image_classes
from kdpipe.encodings import Dense, Int8, TargetEncoding, TopK


def dense_teachers(sizes: Sizes) -> None:
    """Image teachers: dense, int8, topk."""
    few, many = sizes.vision_classes
    kept = min(100, many // 4)
    small: dict[str, TargetEncoding] = {
        "dense": Dense(),
        "dense, compact": Dense(compact=True),
        "int8": Int8(),
        "int8, compact": Int8(compact=True),
        "topk, k = 10": TopK(k=min(10, few // 2), values="int8", temperatures=MORE_TEMPERATURES, compact=True),
    }
    large: dict[str, TargetEncoding] = {
        f"topk, k = {kept}": TopK(k=kept, values="int8", temperatures=TEMPERATURES),
        f"topk, k = {kept}, compact": TopK(k=kept, values="int8", temperatures=TEMPERATURES, compact=True),
        f"topk, k = {kept}, compact, 5 T": TopK(k=kept, values="int8", temperatures=MORE_TEMPERATURES, compact=True),
    }
    for name, classes, own, sharpness, encodings in (
        ("images, soft", few, 0.5, 12.0, small),
        ("images, sharp", few, 1.0, 12.0, small),
        ("images, soft x 2.5", few, 0.5, 30.0, small),
        ("images, soft", many, 0.5, 20.0, large),
        ("images, sharp", many, 1.0, 16.0, large),
    ):
        found = measure(encodings, image_classes(sizes.tokens, classes, own, sharpness), sizes.error_tokens)
        describe(name, next(iter(found.values())), sizes.tokens)
        bytes_and_kl(found, {"int8": "1,010", f"topk, k = {kept}, compact": "238"})
