"""How targets are laid out in a store's arrays: a closed set, name -> class. What is written says what it is.

| name | holds | bytes per row | error |
| --- | --- | --- | --- |
| `dense` | every class, float16 or float32 | 2C + 4, 4C + 4 | relative to `z - max`: 2^-11; none |
| `int8` | every class, one byte | C + 8 | half a step of range / 255 |
| `topk` | k classes, the tail's mass at each temperature | (id + 2) k + 4N; int8 (id + 1) k + 4N + 4 | as above |
| `sampled` | unique ids of n draws and their counts, an exact head | (id + count) n + 2 | none: unbiased |
| `features` | D numbers, float16 or float32 | 2D, 4D | relative: 2^-11; none |
| `features_int8` | D numbers, one byte | D + 8 | half a step of range / 255 |

Per row or per token `[T, ...]`; ids are 1, 2 or 4 bytes. `compact: true` compresses every array of an encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdpipe.encodings.base import ArraySpec, TargetEncoding
from kdpipe.encodings.dense import Dense
from kdpipe.encodings.features import Features, FeaturesInt8
from kdpipe.encodings.int8 import Int8
from kdpipe.encodings.sampled import Sampled
from kdpipe.encodings.topk import TopK
from kdpipe.errors import ConfigError

__all__ = [
    "ENCODINGS",
    "ArraySpec",
    "Dense",
    "Features",
    "FeaturesInt8",
    "Int8",
    "Sampled",
    "TargetEncoding",
    "TopK",
    "encoding_from_json",
]

ENCODINGS: Mapping[str, Callable[..., TargetEncoding]] = {
    encoding.name: encoding for encoding in (Dense, Int8, TopK, Sampled, Features, FeaturesInt8)
}


def encoding_from_json(value: Mapping[str, Any]) -> TargetEncoding:
    """The encoding that a manifest names. Raises `ConfigError` for an unknown name or parameter."""
    parameters = {key: parameter for key, parameter in value.items() if key != "name"}
    if value["name"] not in ENCODINGS:
        raise ConfigError(f"encoding {value['name']!r} is unknown; the choices are {', '.join(ENCODINGS)}")
    try:
        return ENCODINGS[value["name"]](**parameters)
    except TypeError as error:
        raise ConfigError(f"encoding {value['name']!r} has other parameters than {parameters}: {error}") from None
