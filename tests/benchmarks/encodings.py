"""Every encoding: bytes as a store writes them, error, bias and speed, on simulated teachers and a real language model.

`BENCH_TEXT` names a folder with *.txt.gz (such as WikiText-2): a word-level LSTM is trained on all of it but its last
words, which are the tokens measured; some minutes on one core, its weights are kept in the system's temporary folder.

Shapes: B batch, C classes or vocabulary, K kept, T tokens, D width. p is the teacher, q the student.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measuring import cpu_s, machine, shown
from kdpipe.encodings import Dense, Int8, Sampled, TargetEncoding, TopK
from kdpipe.encodings.class_ids import stored_ids
from kdpipe.encodings.topk import tail_log_masses
from kdpipe.losses import forward_kl
from kdpipe.store.layout import CRC_BYTES, ArrayLayout, choose_shard_rows
from kdpipe.store.shard_file import ShardFile, encode_shard
from kdpipe.targets import DenseTargets, OutputSpec, SampledTargets, SparseTargets, Targets

TEMPERATURES = (1.0, 2.0, 4.0)
MORE_TEMPERATURES = (1.0, 4 / 3, 2.0, 4.0, 10.0)
BETWEEN = (1.25, 1.5, 1.75, 2.5, 3.0, 3.5, 5.0, 6.0, 7.0, 8.0, 9.0)
NEAR = "0.8 z + N(0, 1)"
WORSE = "worse LSTM"
BATCH_ROWS = 64

Arrays = dict[str, np.ndarray]


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


@dataclass(frozen=True, kw_only=True)
class Said:
    """Teacher logits `[B, C]`, and students' of the same rows by name."""

    logits: Tensor
    students: Callable[[], Mapping[str, Tensor]] = dict


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one encoding made of a teacher: arrays of every row, scores of the first ones by name."""

    encoding: TargetEncoding
    num_classes: int
    arrays: Arrays
    scores: dict[str, Tensor]

    def bytes_per_row(self) -> float:
        """Of all arrays, as a store writes them."""
        return sum(shard_bytes(self.encoding, self.arrays, self.num_classes).values())


# Teachers


def image_classes(num_rows: int, num_classes: int, own: float, sharpness: float) -> Iterator[Said]:
    """Random features near one of C random prototypes, whose products with all prototypes are the logits."""
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randn(num_classes, 64, generator=random) / 8
    for start in range(0, num_rows, BATCH_ROWS):
        rows = min(BATCH_ROWS, num_rows - start)
        nearest = torch.randint(num_classes, (rows,), generator=random)
        features = own * prototypes[nearest] + torch.randn(rows, 64, generator=random) / 8
        yield Said(logits=sharpness * features @ prototypes.T)


def next_words(num_tokens: int, vocabulary: int) -> Iterator[Said]:
    """Logits that fall with the log of the rank, ids uniformly random (the worst case); about 3.3 nats at 131,072."""
    random = torch.Generator().manual_seed(0)
    falling = -1.3 * torch.log(torch.arange(vocabulary) + 3.0)
    for start in range(0, num_tokens, BATCH_ROWS):
        rows = min(BATCH_ROWS, num_tokens - start)
        slope = 0.9 + 1.3 * torch.rand(rows, 1, generator=random)
        ranked = slope * falling + 0.8 * torch.randn(rows, vocabulary, generator=random)
        logits = torch.stack([row[torch.randperm(vocabulary, generator=random)] for row in ranked])
        yield Said(logits=logits, students=partial(nearby, logits, seed=start))


def nearby(logits: Tensor, seed: int) -> dict[str, Tensor]:
    """A student whose logits are the teacher's, shrunk and disturbed."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(10_000 + seed))
    return {NEAR: 0.8 * logits + noise}


class LanguageModel(nn.Module):
    """Words before -> logits of the next one: an LSTM, input and output embeddings tied."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, words_BT: Tensor) -> Tensor:
        """Logits `[B, T, C]`."""
        logits: Tensor = self.lstm(self.embedding(words_BT))[0] @ self.embedding.weight.T + self.bias
        return logits


def read_words(folder: Path) -> tuple[Tensor, int]:
    """The words of all texts as ids `[T]`, the most frequent word first, and how many different ones there are."""
    texts = [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.rglob("*.txt.gz"))]
    words = [word for text in texts for word in re.findall(r"<unk>|[\w'@-]+|[^\w\s]", text)]
    ids = {word: index for index, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([ids[word] for word in words]), len(ids)


def train(model: LanguageModel, words: Tensor, epochs: int, streams: int = 32, length: int = 35) -> None:
    """Train on `streams` parallel texts with a sampled softmax: candidates drawn by frequency, weighted for it."""
    frequency = torch.bincount(words, minlength=len(model.bias)).double() + 0.5
    frequency /= frequency.sum()
    nn.init.normal_(model.embedding.weight, std=0.1)
    model.bias.data = frequency.log().float()
    drawn = 4096
    included = torch.log(-torch.expm1((drawn + streams * length) * torch.log1p(-frequency))).float()
    text = words[: len(words) // streams * streams].view(streams, -1)
    starts = range(0, text.shape[1] - length, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(starts))
    for _ in range(epochs):
        state = None
        for start in starts:
            asked = text[:, start + 1 : start + length + 1].flatten()
            drawn_too = torch.cat([asked, torch.multinomial(frequency, drawn, True)])
            candidates, place = torch.unique(drawn_too, return_inverse=True)
            hidden, state = model.lstm(model.embedding(text[:, start : start + length]), state)
            state = tuple(each.detach() for each in state)
            hidden = functional.dropout(hidden.flatten(0, 1), 0.4)
            logits = hidden @ model.embedding.weight[candidates].T + model.bias[candidates] - included[candidates]
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(logits, place[: len(asked)]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def trained(words: Tensor, vocabulary: int, width: int, epochs: int, cache: Path) -> LanguageModel:
    """A model from the cache, or trained now."""
    model, path = (
        LanguageModel(vocabulary, width),
        cache / f"lstm_{len(words)}_{vocabulary}_{width}_{epochs}.safetensors",
    )
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        torch.manual_seed(0)
        train(model, words, epochs)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def read_on(teacher: LanguageModel, worse: LanguageModel, words: Tensor, sharpness: float = 1.0) -> Iterator[Said]:
    """What a teacher and a worse student say of held-out words `[T]`, in texts of `BATCH_ROWS` words."""
    for start in range(0, len(words), BATCH_ROWS):
        part = words[None, start : start + BATCH_ROWS]
        logits = sharpness * teacher(part)[0]

        def students(part: Tensor = part, logits: Tensor = logits, seed: int = start) -> dict[str, Tensor]:
            return {**nearby(logits, seed), WORSE: worse(part)[0].detach()}

        yield Said(logits=logits, students=students)


# Measures


def layouts(encoding: TargetEncoding, num_classes: int, num_rows: int) -> dict[str, ArrayLayout]:
    """How a store lays out shards of so many rows."""
    specs = encoding.arrays(OutputSpec(name="logits", shape=(num_classes,)))
    shard_rows = min(choose_shard_rows(specs.values(), 10**9), num_rows)
    return {suffix: ArrayLayout.of(f"logits{suffix}", spec, shard_rows) for suffix, spec in specs.items()}


def shard_bytes(encoding: TargetEncoding, arrays: Arrays, num_classes: int) -> dict[str, float]:
    """Bytes per row of each array's shards, their checksums and indexes counted."""
    num_rows = len(next(iter(arrays.values())))
    return {
        suffix: sum(
            len(encode_shard(arrays[suffix][start : start + layout.shard_rows], layout))
            for start in range(0, num_rows, layout.shard_rows)
        )
        / num_rows
        for suffix, layout in layouts(encoding, num_classes, num_rows).items()
    }


def measure(encodings: Mapping[str, TargetEncoding], teacher: Iterable[Said], error_rows: int) -> dict[str, Found]:
    """Every encoding on what a teacher says, batch by batch; `Teacher` holds how the teacher is."""
    parts: dict[str, list[Arrays]] = {name: [] for name in encodings}
    scores: dict[str, list[dict[str, Tensor]]] = {name: [] for name in encodings}
    random, num_rows, num_classes = np.random.default_rng(0), 0, 0
    for said in teacher:
        num_classes = said.logits.shape[-1]
        keys = random.integers(0, 2**64, len(said.logits), dtype=np.uint64)
        students = said.students() if num_rows < error_rows else {}
        exact = {name: _gradient(student, _full(said.logits)) for name, student in students.items()}
        for name, encoding in encodings.items():
            parts[name].append(encoding.encode(said.logits, keys))
            if num_rows < error_rows:
                targets = encoding.decode(parts[name][-1], OutputSpec(name="logits", shape=(num_classes,)))
                score = errors(targets, said.logits) | teacher_scores(said.logits)
                for student, full in exact.items():
                    difference = (_gradient(students[student], targets) - full).norm(dim=-1)
                    score |= {f"error at {student}": difference, f"gradient at {student}": full.norm(dim=-1)}
                scores[name].append(score)
        num_rows += len(said.logits)
    return {
        name: Found(
            encoding=encoding,
            num_classes=num_classes,
            arrays={key: np.concatenate([part[key] for part in parts[name]]) for key in parts[name][0]},
            scores={key: torch.cat([score[key] for score in scores[name]]) for key in next(iter(scores[name]), {})},
        )
        for name, encoding in encodings.items()
    }


def teacher_scores(logits: Tensor) -> dict[str, Tensor]:
    """Entropy, largest probability and range of each row."""
    probs = torch.softmax(logits.double(), dim=-1)
    span = logits.amax(dim=-1) - logits.amin(dim=-1)
    return {"entropy": torch.special.entr(probs).sum(dim=-1), "top-1": probs.amax(dim=-1), "range": span}


def errors(targets: Targets, logits: Tensor) -> dict[str, Tensor]:
    """KL from the exact distribution (over K + 1 buckets where targets are sparse), and of the head's mass."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    if isinstance(targets, DenseTargets):
        return {f"KL at {t:g}": _kl(torch.log_softmax(log_p / t, dim=-1), targets.log_probs(t)) for t in TEMPERATURES}
    if isinstance(targets, SampledTargets):
        return {"unique": (targets.weights > 0).sum(dim=-1).double()}
    assert isinstance(targets, SparseTargets)
    asked = sorted({*targets.temperatures, *BETWEEN})
    exact = SparseTargets(
        ids=targets.ids,
        head=log_p.gather(-1, targets.ids),
        tails=tail_log_masses(log_p, targets.ids, asked),
        temperatures=tuple(asked),
        num_classes=targets.num_classes,
    )
    found = {f"KL at {t:g}": _kl(exact.log_probs(t), targets.log_probs(t)) for t in targets.temperatures}
    off = {t: _head_mass(targets, t) - _head_mass(exact, t) for t in asked if t <= max(targets.temperatures)}
    stored = torch.stack([off[t].abs() for t in targets.temperatures]).amax(dim=0)
    between = torch.stack([each.abs() for t, each in off.items() if t not in targets.temperatures]).amax(dim=0)
    return found | {"head mass, stored": stored, "head mass, between": between}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q.double())).sum(dim=-1)


def _head_mass(targets: SparseTargets, temperature: float) -> Tensor:
    return -torch.expm1(targets.log_probs(temperature, allow_interpolation=True)[..., -1].double())


def _full(logits: Tensor) -> DenseTargets:
    row_max = logits.amax(dim=-1)
    return DenseTargets(values=logits - row_max.unsqueeze(-1), row_max=row_max)


def _gradient(student: Tensor, targets: Targets) -> Tensor:
    """Gradient of the forward KL at T = 1 in the student's logits `[B, C]`."""
    logits = student.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(forward_kl(logits, targets).sum(), logits)[0]


def draws_of_bytes(teacher: Iterable[Said], stratified: bool, bytes_per_row: Sequence[float]) -> list[int]:
    """How many draws, up to 255, take so many bytes, compact, by the parabola through three measured counts."""
    counts = (35, 55, 85)
    encodings = {str(draws): Sampled(draws=draws, stratified=stratified, compact=True) for draws in counts}
    sizes = [found.bytes_per_row() for found in measure(encodings, teacher, 0).values()]
    return [min(max(round(each), 2), 255) for each in np.polyval(np.polyfit(sizes, counts, 2), bytes_per_row).tolist()]


# What is printed


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print Markdown."""
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def describe(name: str, found: Found, num_rows: int) -> None:
    """Print how a teacher is."""
    means = {key: found.scores[key].mean().item() for key in ("entropy", "top-1", "range")}
    print(
        f"{name}: C = {found.num_classes:,}, {num_rows:,} rows (errors on {len(found.scores['range']):,}); "
        f"entropy {means['entropy']:.2f} nats, top-1 {means['top-1']:.2f}, range {means['range']:.1f}\n"
    )


def worst(values: Tensor) -> str:
    """Mean, and the largest."""
    return f"{values.mean():.1e}, {values.max():.1e}"


def bytes_and_kl(found: Mapping[str, Found], asked: Mapping[str, str]) -> None:
    """Print bytes per row and KL of dense, int8 and topk."""
    rows = []
    for name, each in found.items():
        kl = [worst(each.scores[f"KL at {t:g}"]) for t in TEMPERATURES]
        mass = [worst(each.scores[key]) if key in each.scores else "-" for key in MASSES]
        rows.append([name, asked.get(name, "-"), f"{each.bytes_per_row():.1f}", *kl, *mass])
    columns = [f"KL at T = {t:g}: mean, max" for t in TEMPERATURES]
    table(["encoding", "asked: B", "B/row", *columns, *(f"{key}: mean, max" for key in MASSES)], rows)


MASSES = ("head mass, stored", "head mass, between")


def sampling(found: Mapping[str, Found], base: str, student: str) -> None:
    """Print bytes and the gradient's error of `sampled`, beside that of `base`."""

    def of(each: Found) -> tuple[float, float, float]:
        error, full = each.scores[f"error at {student}"], each.scores[f"gradient at {student}"]
        ratio = error / full
        return (error.mean() / full.mean()).item(), ratio.mean().item(), ratio.median().item()

    rows, bases = [], of(found[base])
    for name, each in found.items():
        unique = each.scores.get("unique")
        metrics = [
            f"{value:.3f} ({100 * (value / other - 1):+.0f} %)" for value, other in zip(of(each), bases, strict=True)
        ]
        rows.append([name, f"{each.bytes_per_row():.1f}", "-" if unique is None else f"{unique.mean():.1f}", *metrics])
    print(f"student: {student}; in brackets: against {base}\n")
    header = ["encoding", "B/token", "unique ids", "mean error / mean gradient", "error / gradient: mean", "median"]
    table(header, rows)


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


def top_classes(k: int, temperatures: Sequence[float] = TEMPERATURES) -> TopK:
    """The encoding that the issue's budgets are about."""
    return TopK(k=k, values="int8", temperatures=temperatures, compact=True)


ASKED = {(64, 50_304): "170", (64, 151_936): "186", (128, 151_936): "340"}


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
    """`sampled` as the issue asks, draws alone in 40 bytes and in those of head 12 + 8; the last plain one's name."""
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


@torch.no_grad()
def perplexity(model: LanguageModel, words: Tensor) -> float:
    """Of words `[T]`, in texts of `BATCH_ROWS`."""
    parts = words[: (len(words) - 1) // BATCH_ROWS * BATCH_ROWS + 1]
    answers = parts[1:].view(-1, BATCH_ROWS)
    losses = [
        functional.cross_entropy(model(part[None])[0], answer)
        for part, answer in zip(parts[:-1].view(-1, BATCH_ROWS), answers, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


@torch.no_grad()
def sharpness_of(teacher: LanguageModel, words: Tensor, nats: float) -> float:
    """The factor on a teacher's logits that brings its mean entropy to so many nats, by bisection."""
    logits = teacher(words[: len(words) // BATCH_ROWS * BATCH_ROWS].view(-1, BATCH_ROWS)).flatten(0, 1)
    low, high = 0.2, 5.0
    for _ in range(12):
        middle = (low + high) / 2
        entropy = torch.special.entr(torch.softmax(middle * logits, dim=-1)).sum(dim=-1).mean()
        low, high = (middle, high) if entropy > nats else (low, middle)
    return (low + high) / 2


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


def speed(sizes: Sizes, folder: Path) -> None:
    """CPU us per row: to encode and write the shards' bytes, and to read them (page cache warm) and decode."""
    few, vocabulary = sizes.vision_classes[0], sizes.vocabularies[0]
    images = torch.cat([said.logits for said in image_classes(sizes.speed_rows, few, 1.0, 12.0)])
    words = torch.cat([said.logits for said in next_words(sizes.speed_rows, vocabulary)])
    k = sizes.kept[0]
    cases: dict[str, tuple[TargetEncoding, Tensor]] = {}
    for compact in (False, True):
        end = ", compact" if compact else ""
        topk = TopK(k=k, values="int8", temperatures=TEMPERATURES, compact=compact)
        cases |= {
            f"dense, C = {few:,}{end}": (Dense(compact=compact), images),
            f"int8, C = {few:,}{end}": (Int8(compact=compact), images),
            f"topk, k = {k} of {vocabulary:,}{end}": (topk, words),
            f"sampled, n = 50 of {vocabulary:,}{end}": (Sampled(draws=50, compact=compact), words),
            f"sampled, head 12 + 8{end}": (Sampled(draws=8, head=12, compact=compact), words),
        }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    keys = np.random.default_rng(0).integers(0, 2**64, sizes.speed_rows, dtype=np.uint64)
    for number in range(-1, sizes.rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            cost = written_and_read(*cases[name], keys, folder)
            if number >= 0:  # the first round warms up
                found[name].append(cost)
    print(f"{sizes.speed_rows:,} rows, {sizes.rounds} interleaved rounds; CPU us/row: median (min-max)\n")
    header = ["encoding", "encode and write", "read and decode"]
    table(header, [[name, *(shown(costs) for costs in zip(*each, strict=True))] for name, each in found.items()])


def written_and_read(encoding: TargetEncoding, logits: Tensor, keys: np.ndarray, folder: Path) -> tuple[float, float]:
    """CPU us per row of each way; files are written between them."""
    num_rows, num_classes = logits.shape
    plan = layouts(encoding, num_classes, num_rows)
    began = cpu_s()
    arrays = encoding.encode(logits, keys)
    shards = {suffix: encode_shard(arrays[suffix][: plan[suffix].shard_rows], plan[suffix]) for suffix in arrays}
    wrote = cpu_s() - began
    for suffix, content in shards.items():
        (folder / f"shard{suffix}").write_bytes(content.tobytes())
    began = cpu_s()
    read: Arrays = {}
    for suffix, layout in plan.items():
        file = ShardFile(folder / f"shard{suffix}", layout, num_rows, len(shards[suffix]))
        read[suffix] = np.empty((num_rows, *layout.shape), layout.numpy_dtype)
        scratch = np.empty(layout.chunk_bytes + CRC_BYTES, np.uint8)
        for chunk in range(layout.num_chunks):
            rows = slice(chunk * layout.chunk_rows, (chunk + 1) * layout.chunk_rows)
            read[suffix][rows] = file.read_chunk(chunk, scratch)
    encoding.decode(read, OutputSpec(name="logits", shape=(num_classes,)))
    return wrote / num_rows * 1e6, (cpu_s() - began) / num_rows * 1e6


def main(
    sizes: Sizes = Sizes(),
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
