"""The optimizers that several jobs share. Knows parameters only; called by the jobs when a trial begins."""

from __future__ import annotations

import torch
from torch import nn

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings but neither biases nor norms.

    One fused kernel where the parameters are on a device that has it, also for the sharded parameters of FSDP2; the
    foreach form otherwise. Both compute the same up to rounding.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    is_fused = all(param.device.type in _FUSED_DEVICES for param in params)
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=is_fused, foreach=not is_fused)
