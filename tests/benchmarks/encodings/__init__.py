"""Every encoding: bytes as a store writes them, error, bias and speed, on simulated teachers and a real language model.

`BENCH_TEXT` names a folder with *.txt.gz (such as WikiText-2): a word-level LSTM is trained on all of it but its last
words, which are the tokens measured; some minutes on one core, its weights are kept in the system's temporary folder.

Shapes in these modules: B batch, C classes or vocabulary, K kept, T tokens, D width. p is the teacher, q the student.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from benchmarks.encodings.bias import unbiased
from benchmarks.encodings.images import dense_teachers
from benchmarks.encodings.sizes import FULL, Sizes
from benchmarks.encodings.speed import speed
from benchmarks.encodings.words import real_words, sampled_words, simulated_words
from benchmarks.measuring import machine


def main(
    sizes: Sizes = FULL,
    text: str | None = os.environ.get("BENCH_TEXT"),
    cache: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Print the tables; without a text, those of the real language model are left out."""
    torch.set_num_threads(1)
    print(machine("numpy", "torch", "numcodecs") + "\n")
    dense_teachers(sizes)
    simulated_words(sizes)
    sampled_words(sizes)
    if text is None:
        print("No real language model: set BENCH_TEXT to a folder with *.txt.gz\n")
    else:
        real_words(sizes, Path(text), cache or Path(tempfile.gettempdir()) / "kdpipe-benchmarks")
    unbiased(sizes.draws)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        speed(sizes, Path(scratch))
