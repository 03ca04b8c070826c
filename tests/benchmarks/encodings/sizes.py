"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured: rows whose bytes are counted (a power of two; twice as many for `sampled`) and so on."""

    tokens: int = 4096
    error_tokens: int = 1024
    vision_classes: tuple[int, int] = (1000, 21_841)
    vocabularies: tuple[int, ...] = (50_304, 131_072, 151_936)
    kept: tuple[int, int] = (64, 128)
    draws: int = 100_000
    speed_rows: int = 1024
    rounds: int = 5
    width: int = 128
    epochs: int = 5


FULL = Sizes()
"""What docs/benchmarks/encodings.md was measured with."""
