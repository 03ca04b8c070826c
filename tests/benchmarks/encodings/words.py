"""Language models, simulated and real: topk, and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.encodings.language_model import WORSE, perplexity, read_on, read_words, sharpness_of, trained
from benchmarks.encodings.measures import (
    MORE_TEMPERATURES,
    TEMPERATURES,
    Found,
    draws_of_bytes,
    measure,
    shard_bytes,
)
from benchmarks.encodings.printing import bytes_and_kl, describe, sampling, table
from benchmarks.encodings.sizes import Sizes
from benchmarks.encodings.teachers import BATCH_ROWS, NEAR, Said, next_words
from benchmarks.measuring import cpu_s
from kdpipe.encodings import Sampled, TargetEncoding, TopK
from kdpipe.encodings.class_ids import stored_ids


def top_classes(k: int, temperatures: Sequence[float] = TEMPERATURES) -> TopK:
    """The encoding that `ASKED` is about."""
    return TopK(k=k, values="int8", temperatures=temperatures, compact=True)


ASKED = {(64, 50_304): "170", (64, 151_936): "186", (128, 151_936): "340"}
"""(k, vocabulary) -> bytes per token, at most."""


def simulated_words(sizes: Sizes) -> None:
    """Language models with uniformly random ids: topk of every vocabulary."""
    for vocabulary in sizes.vocabularies:
        encodings: dict[str, TargetEncoding] = {f"topk, k = {k}": top_classes(k) for k in sizes.kept}
        k = sizes.kept[0]
        encodings[f"topk, k = {k}, 5 T"] = top_classes(k, MORE_TEMPERATURES)
        encodings["topk, k = 12, 5 T"] = top_classes(12, MORE_TEMPERATURES)
        found = measure(encodings, next_words(sizes.tokens, vocabulary), sizes.error_tokens // 4)
        describe("words, simulated", next(iter(found.values())), sizes.tokens)
        bytes_and_kl(found, {f"topk, k = {k}": ASKED.get((k, vocabulary), "-") for k in sizes.kept})


def samplings(teacher: Callable[[], Iterable[Said]]) -> tuple[dict[str, TargetEncoding], str]:
    """`sampled` with 50 draws, draws alone in 40 bytes and in those of head 12 + 8; the last plain one's name."""
    head = Sampled(draws=8, head=12, compact=True)
    aims = [40.0, measure({"head": head}, _first(teacher, 2048), 0)["head"].bytes_per_row()]
    encodings: dict[str, TargetEncoding] = {"n = 50": Sampled(draws=50, compact=True)}
    for stratified in (False, True):
        for aim, draws in zip(aims, draws_of_bytes(_first(teacher, 2048), stratified, aims), strict=True):
            name = f"n = {draws}, stratified" if stratified else f"n = {draws}"
            encodings[name] = Sampled(draws=draws, stratified=stratified, compact=True)
            if aim == aims[-1] and not stratified:
                base = name
    encodings["head 12 + 8"] = head
    encodings["head 12 + 8, stratified"] = Sampled(draws=8, head=12, stratified=True, compact=True)
    return encodings, base


def _first(teacher: Callable[[], Iterable[Said]], num_rows: int) -> Iterator[Said]:
    for index, said in enumerate(teacher()):
        if index * BATCH_ROWS >= num_rows:
            return
        yield said


def sampled_words(sizes: Sizes) -> None:
    """The simulated language model of 3.3 nats: `sampled`."""
    teacher = partial(next_words, 2 * sizes.tokens, sizes.vocabularies[len(sizes.vocabularies) // 2])
    encodings, base = samplings(teacher)
    found = measure(encodings, teacher(), sizes.error_tokens)
    describe("words, simulated", found[base], 2 * sizes.tokens)
    sampling(found, base, NEAR)


def real_words(sizes: Sizes, text: Path, cache: Path) -> None:
    """A trained language model on words that it has not read: topk against random ids, and `sampled`."""
    words, vocabulary = read_words(text)
    held = min(20_000, len(words) // 4)
    began = cpu_s()
    teacher = trained(words[:-held], vocabulary, sizes.width, sizes.epochs, cache)
    worse = trained(words[:-held], vocabulary, max(1, sizes.width // 4), 1, cache)
    print(
        f"LSTM of width {sizes.width}, {len(words) - held:,} words read {sizes.epochs} times; "
        f"{cpu_s() - began:.0f} CPU s"
    )
    asked = words[-held:][: 2 * sizes.tokens + 1]
    nll = [perplexity(model, asked) for model in (teacher, worse)]
    print(f"perplexity on held-out words {nll[0]:.0f}, of the worse student {nll[1]:.0f}\n")
    k = sizes.kept[0]
    for sharpness in (1.0, sharpness_of(teacher, asked[: 16 * BATCH_ROWS], nats=3.3)):
        said = partial(read_on, teacher, worse, asked[:-1], sharpness)
        encodings, base = samplings(said)
        kept = {f"topk, k = {k}": top_classes(k), f"topk, k = {k}, 5 T": top_classes(k, MORE_TEMPERATURES)}
        found = measure(encodings | kept, said(), sizes.error_tokens)
        describe(f"words, LSTM, logits x {sharpness:.2f}", found[base], len(asked) - 1)
        bytes_and_kl({name: found[name] for name in kept}, {})
        against_random_ids(found[f"topk, k = {k}"])
        shown_too = {name: each for name, each in found.items() if "5 T" not in name}
        for student in (NEAR, WORSE):
            sampling(shown_too, base, student)


def against_random_ids(found: Found) -> None:
    """Print what real ids save: the same rows with uniformly random ids, and with the vocabulary in random order."""
    encoding, random = found.encoding, np.random.default_rng(0)
    assert isinstance(encoding, TopK)
    num_rows, num_classes = len(found.arrays[".tails"]), found.num_classes
    ids = found.arrays[".id_steps"].astype(np.int64).cumsum(axis=1)
    anyhow = np.stack([np.sort(random.choice(num_classes, encoding.k, replace=False)) for _ in range(num_rows)])
    shuffled = random.permutation(num_classes)[ids]
    order = np.argsort(shuffled, axis=1)
    codes = np.take_along_axis(found.arrays[".codes"], order, axis=1)
    kinds = {
        "uniformly random ids": found.arrays | stored_ids(torch.from_numpy(anyhow), num_classes, compact=True),
        "its own ids, the most frequent word first": found.arrays,
        "its own ids, the words in random order": found.arrays
        | stored_ids(torch.from_numpy(np.take_along_axis(shuffled, order, axis=1)), num_classes, compact=True)
        | {".codes": codes},
    }
    sizes = {name: shard_bytes(encoding, arrays, num_classes) for name, arrays in kinds.items()}
    base = sum(next(iter(sizes.values())).values())
    table(
        [f"topk, k = {encoding.k}", "B/token", "against random ids", "ids", "codes", "scale and tails"],
        [
            [
                name,
                f"{sum(each.values()):.1f}",
                f"{100 * (sum(each.values()) / base - 1):+.1f} %",
                *(f"{value:.1f}" for value in (each[".id_steps"], each[".codes"], each[".scale"] + each[".tails"])),
            ]
            for name, each in sizes.items()
        ],
    )
