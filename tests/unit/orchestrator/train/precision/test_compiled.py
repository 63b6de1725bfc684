"""Tiers under torch.compile: the same numbers, one graph for each tier, none when a tier returns.

Compiled in a process of its own: torch.compile keeps tables of the whole process, which other tests disturb.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from orchestrator.train.precision.tiers import install, lowered, set_tier
from policies.tier import Tier

TIERS = tuple(Tier(word) for word in ("fp32", "bf16", "fp8", "int8", "fixed(k=8,bits=16)"))


class Block(nn.Module):
    """Attributes read one by one, as the blocks of the jobs do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


def model_of() -> Block:
    torch.manual_seed(0)
    model = Block()
    install(model)
    return model


def gradient(model: nn.Module, tier: Tier) -> Tensor:
    torch.manual_seed(1)
    model.zero_grad()
    set_tier(model, tier)
    with lowered(tier, torch.device("cpu")):
        loss = model(torch.randn(37, 64)).float().square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compile_every_tier() -> None:
    plain, compiled = model_of(), model_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter)
    counts = []
    for tier in TIERS:
        expected = gradient(plain, tier)
        assert (gradient(compiled, tier) - expected).norm() < 0.05 * expected.norm()
        counts.append(counter.frame_count)
    assert counts == list(range(1, len(TIERS) + 1)), counts
    for tier in reversed(TIERS):
        gradient(compiled, tier)
    assert counter.frame_count == counts[-1], "returning to a known tier compiles nothing"


def test_a_tier_compiles_once_and_is_the_same_compiled() -> None:
    root = Path(__file__).parents[5]
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    compile_every_tier()
