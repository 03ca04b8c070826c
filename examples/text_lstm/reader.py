"""A text classifier as many are written: an LSTM of PyTorch, and a forward that returns a tuple."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Reader(nn.Module):
    """Embedding, LSTM in both directions, mean over the tokens: `(logits [B, C], hidden [B, 2 hidden])`."""

    def __init__(
        self, vocab_size: int, num_classes: int, pad_id: int, width: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the state of the whole text that they come from."""
        lengths = attention_mask.sum(dim=1).clamp(min=1)
        embedded = self.dropout(self.embedding(input_ids))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        hidden = torch.sum(states, dim=1) / lengths.unsqueeze(1)
        return self.head(self.dropout(hidden)), hidden
