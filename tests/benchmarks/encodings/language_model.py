"""A teacher that has read: a word-level LSTM."""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.encodings.teachers import BATCH_ROWS, Said, nearby

WORSE = "worse LSTM"


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
