"""A small Transformer encoder for text classification (Vaswani et al. 2017).

Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdpipe.errors import ConfigError


class Transformer(nn.Module):
    """Embeddings of tokens and positions, pre-norm encoder layers, mean over the tokens of a row, logits `[B, C]`.

    Tokens that `attention_mask` hides change nothing. `max_length` is the most tokens that a row may have.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width is {width}; expected a multiple of heads, {heads}")
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.positions = nn.Embedding(max_length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=4 * width, dropout=dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, C]` of tokens `[B, T]`; which of two texts they belong to, the tokens between them tell."""
        place_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_BT = attention_mask == 0
        hidden_BT = hidden_BT & (place_T > 0)  # a row without any token still has something to look at
        states_BTD = self.dropout(self.tokens(input_ids) + self.positions(place_T))
        states_BTD = self.encoder(states_BTD, src_key_padding_mask=hidden_BT)
        seen_BT1 = (~hidden_BT).unsqueeze(-1)
        logits_BC: Tensor = self.head((states_BTD * seen_BT1).sum(dim=1) / seen_BT1.sum(dim=1))
        return logits_BC
