"""A small GPT with six plain `nn.Linear` per block, each of which can carry a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the demo's model.

    Attributes:
        vocabulary: number of tokens; 2048 keeps the head a small part of the work.
        width: d, a multiple of `heads`; 192 lets 8 x 128 tokens take some 0.09 s on two cores.
        layers: number of blocks.
        heads: number of attention heads.
        context: longest sequence in tokens.
    """

    vocabulary: int = 2048
    width: int = 192
    layers: int = 4
    heads: int = 3
    context: int = 128


class Block(nn.Module):
    """Pre-norm attention and MLP with separate q, k, v and output projections."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(d)
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.o_proj = nn.Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d)
        self.up_proj = nn.Linear(d, 4 * d)
        self.down_proj = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        h = self.attention_norm(x)
        q, k, v = (
            proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        hidden = functional.gelu(self.up_proj(self.mlp_norm(x)))
        out: Tensor = x + self.down_proj(hidden)
        return out


class GPT(nn.Module):
    """Decoder-only transformer whose head shares the embedding's weights.

    Args:
        config: sizes.

    Example:
        >>> import torch
        >>> model = GPT(GPTConfig(vocabulary=16, width=8, layers=1, heads=2, context=4))
        >>> model(torch.zeros(2, 4, dtype=torch.long)).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        # No nn.Linear here: the tied head stays frozen whatever "all-linear" selects.
        return functional.linear(self.norm(x), self.tokens.weight)
