"""Networks for pictures: a small vision transformer, a small residual network and a small U-Net.

All normalise within a sample (LayerNorm, GroupNorm), never over a batch: the orchestrator cuts batches as it sees fit.

Shapes: B samples, C channels, S side of the picture, P side of a patch, T patches, D features, K classes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.transformer import INIT_STD, Block, init_weights

MAX_GROUPS = 8
"""Groups that GroupNorm cuts channels into, where they divide."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with as many groups up to `MAX_GROUPS` as divide the channels. Source: Wu and He 2018."""
    return nn.GroupNorm(math.gcd(channels, MAX_GROUPS), channels)


class VisionTransformer(nn.Module):
    """Patches through one linear layer, learned positions, transformer blocks, the mean of all patches, a head.

    Source: Dosovitskiy et al. 2021; mean pooling after Beyer et al. 2022.
    """

    def __init__(
        self, *, channels: int, side: int, patch: int, width: int, layers: int, heads: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.positions = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, heads, is_causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        init_weights(self, INIT_STD, INIT_STD / math.sqrt(2 * layers))
        # A patch has few inputs, of unit variance: GPT-2's 0.02 would leave nothing of it beside the positions.
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Logits of the classes; (B, C, S, S) to (B, K)."""
        B, C, S, _ = images_BCSS.shape
        P = self.patch
        cut = images_BCSS.view(B, C, S // P, P, S // P, P).permute(0, 2, 4, 1, 3, 5)
        patches_BTE = cut.reshape(B, (S // P) ** 2, C * P * P)
        positions_T = torch.arange(patches_BTE.shape[1], device=images_BCSS.device)
        x_BTD = self.embed(patches_BTE) + self.positions(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return cast(Tensor, self.head(self.norm(x_BTD).mean(dim=1)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, normalised first. Source: He et al. 2016, identity mappings."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = group_norm(num_in), group_norm(num_out)
        self.conv_in = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.conv_out = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        changes = num_in != num_out or stride != 1
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, S, S) to (B, num_out, S / stride, S / stride)."""
        hidden = F.relu(self.norm_in(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        hidden = F.relu(self.norm_out(self.conv_in(hidden)))
        return cast(Tensor, shortcut + self.conv_out(hidden))


class ResidualNet(nn.Module):
    """Three stages of residual blocks, each of half the side and twice the channels of the one before."""

    def __init__(self, *, channels: int, width: int, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        num_in = width
        for stage in range(3):
            num_out = width << stage
            for number in range(blocks_per_stage):
                self.blocks.append(ResidualBlock(num_in, num_out, 2 if stage and not number else 1))
                num_in = num_out
        self.norm = group_norm(num_in)
        self.head = nn.Linear(num_in, num_classes)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Logits of the classes; (B, C, S, S) to (B, K)."""
        x = self.stem(images_BCSS)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(F.relu(self.norm(x)).mean(dim=(2, 3))))


class ConvPair(nn.Module):
    """Two 3 x 3 convolutions, each normalised and rectified."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
        self.norm_in = group_norm(num_out)
        self.conv_out = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm_out = group_norm(num_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, S, S) to (B, num_out, S, S)."""
        x = F.relu(self.norm_in(self.conv_in(x)))
        return F.relu(self.norm_out(self.conv_out(x)))


class UNet(nn.Module):
    """Halves the side `levels` times, doubling the channels, and goes back up past what each level saw.

    Source: Ronneberger et al. 2015; nearest-neighbour upsampling, padded convolutions and GroupNorm.
    """

    def __init__(self, *, channels: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.blocks = nn.ModuleList(ConvPair(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.levels = levels
        for level in reversed(range(levels)):
            self.blocks.append(ConvPair(widths[level] + widths[level + 1], widths[level]))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """One logit per pixel; (B, C, S, S) to (B, 1, S, S). S is a multiple of 2 ** levels."""
        x = images_BCSS
        seen: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number > self.levels:
                x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), seen.pop()], dim=1)
            elif number:
                seen.append(x)
                x = F.max_pool2d(x, 2)
            x = block(x)
        return cast(Tensor, self.head(x))
