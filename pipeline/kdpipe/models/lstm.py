"""A text classifier of LSTMs (Hochreiter and Schmidhuber 1997).

Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """Embeddings, LSTM layers, mean over the tokens of a row, logits `[B, C]`.

    `width` of the embeddings, `hidden` of each direction. Tokens that `attention_mask` hides, all of them behind those
    that it shows, change nothing.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        width: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        directions = 2 if bidirectional else 1
        widths = [width, *[directions * hidden] * (layers - 1)]
        self.layers = nn.ModuleList(_Layer(width_in, hidden, directions) for width_in in widths)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(directions * hidden, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, C]` of tokens `[B, T]`; which of two texts they belong to, the tokens between them tell."""
        lengths_B = attention_mask.sum(dim=1)
        states_BTD = self.dropout(self.embedding(input_ids))
        for layer in self.layers:
            states_BTD = self.dropout(layer(states_BTD, lengths_B))
        sums_BD = (states_BTD * attention_mask.unsqueeze(-1)).sum(dim=1)
        logits_BC: Tensor = self.head(sums_BD / lengths_B.clamp(min=1).unsqueeze(-1))
        return logits_BC


class _Layer(nn.Module):
    """One LSTM per direction, beside each other; the second reads each row from its last token to its first."""

    def __init__(self, width: int, hidden: int, directions: int) -> None:
        super().__init__()
        self.directions = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for _ in range(directions))

    def forward(self, states_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        outputs = [self.directions[0](states_BTD)[0]]
        if len(self.directions) == 2:
            backward, _ = self.directions[1](_reversed(states_BTD, lengths_B))
            outputs.append(_reversed(backward, lengths_B))
        return torch.cat(outputs, dim=-1)


def _reversed(states_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Each row's first `lengths_B` tokens in reverse order; the others stay where they are."""
    place_T = torch.arange(states_BTD.shape[1], device=states_BTD.device)
    mirrored_BT = lengths_B.unsqueeze(1) - 1 - place_T
    source_BT = torch.where(mirrored_BT >= 0, mirrored_BT, place_T)
    return states_BTD.gather(1, source_BT.unsqueeze(-1).expand_as(states_BTD))
