"""The transformer block that several jobs share: pre-norm attention and MLP, causal or not.

Every matrix product is a plain `nn.Linear`, so that the orchestrator may swap it for one with a precision tier.

Shapes: B samples, T positions, D features, H heads, E features per head.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the initial weights. Source: GPT-2, Radford et al. 2019."""


class Attention(nn.Module):
    """Multi-head self-attention; a causal one sees no later position."""

    def __init__(self, width: int, heads: int, dropout: float, *, is_causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix each position with those it may see; (B, T, D) to (B, T, D)."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTE, k_BHTE, v_BHTE = qkv.unbind(0)
        drop = self.dropout if self.training else 0.0
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=drop, is_causal=self.is_causal)
        return cast(Tensor, self.proj(mixed_BHTE.transpose(1, 2).reshape(B, T, D)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, *, is_causal: bool) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, is_causal=is_causal)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention, then the position-wise MLP, each added to its input; (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.drop(self.attention(self.norm_attention(x_BTD)))
        hidden = F.gelu(self.up(self.norm_mlp(x_BTD)), approximate="tanh")
        return cast(Tensor, x_BTD + self.drop(self.down(hidden)))


def init_weights(model: nn.Module, std: float, residual_std: float) -> None:
    """Normal weights and zero biases for every Linear and Embedding.

    What is added to the residual stream gets `residual_std`, smaller, so that its variance does not grow with depth
    (GPT-2).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=residual_std if name.endswith((".proj", ".down")) else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
