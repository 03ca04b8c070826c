"""Blocks of tokens as a language model takes them.

Shapes: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from kdpipe.data.columns import Columns
from kdpipe.inputs import Inputs
from kdpipe.preprocess.base import State


class TokenIds:
    """`tokens` int32 `[B, T + 1]` -> `input_ids` int64 `[B, T]`: all but the last, which is predicted only."""

    def __init__(
        self, vocab_size: int, max_length: int, tokens: Callable[[], Mapping[str, int] | None] | None = None
    ) -> None:
        """`vocab_size` and `max_length` are offered to the model's factory; `tokens` gives ids by token."""
        self.offers: Mapping[str, Any] = {"vocab_size": vocab_size, "max_length": max_length}
        self._tokens = tokens

    @property
    def tokens(self) -> Mapping[str, int] | None:
        """Ids by token, where they are known."""
        return None if self._tokens is None else self._tokens()

    def fit(self, blocks: Iterable[Columns]) -> None:
        """There is nothing to learn."""

    def state(self) -> State:
        """Nothing."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""

    def __call__(self, columns: Columns) -> Inputs:
        """`{input_ids [B, T]}`."""
        return {"input_ids": torch.from_numpy(np.array(columns["tokens"], np.int64)[:, :-1])}
