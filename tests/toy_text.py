"""Texts in memory, and tiny checkpoints of Hugging Face Transformers on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.columns import Ragged

TEXTS = [
    "a fine film",
    "",
    "Not a FINE film, not at all; [SEP] is a word here.",
    "naïve café — Ελλάδα",
    "电影很好看 映画 영화",
    "👩‍👩‍👧 🎬🍿 !!",
    "tab\tand\nnewline ",
    "word " * 400,
]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def ragged(texts: Sequence[str]) -> Ragged:
    """Rows of UTF-8 bytes."""
    rows = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Ragged(values=np.frombuffer(b"".join(rows), np.uint8), offsets=offsets)


def save_tokenizer(folder: Path, words: Sequence[str] = ("a", "fine", "film", "##s", "not"), **settings: Any) -> Path:
    """The folder of a BERT tokenizer, of letters and some words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    return folder


def save_bert(folder: Path, num_classes: int = 3, vocab_size: int = 12, seed: int = 0) -> Path:
    """The folder of a BERT with a head for `num_classes`."""
    import torch

    from kdpipe.huggingface import quietly
    from kdpipe.models.pretrained import sequence_classifier

    torch.manual_seed(seed)
    model: Any = sequence_classifier(num_classes, config=BERT, vocab_size=vocab_size, pad_id=0)
    with quietly():
        model.save_pretrained(folder)
    return folder
