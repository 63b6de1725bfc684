"""Tiers under torch.compile: the same numbers, one graph for each tier, none when a tier returns, all kept on disk.

Compiled in a process of its own: torch.compile keeps tables of the whole process, which other tests disturb.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from orchestrator.policies.tier import Tier
from orchestrator.train.precision.half import half_linear
from orchestrator.train.precision.tiers import install, lowered, set_tier

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


def compile_half_products() -> None:
    """Products are the same to the bit; a bias's gradient is rounded to 16 bits where otherwise it is not."""
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for linear in (half_linear, torch.compile(half_linear, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(2)
            x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 7, 32), (48, 32), (48,)))
            y = linear(x, weight, bias, dtype)
            y.backward(torch.randn_like(y))  # type: ignore[no-untyped-call]
            assert all(part.grad is not None and part.grad.dtype is torch.float32 for part in (x, weight, bias))
            found.append((y, x.grad, weight.grad, bias.grad))
        *equal, bias_grads = zip(*found, strict=True)
        assert all(torch.equal(one, other) for one, other in equal)
        torch.testing.assert_close(*bias_grads, rtol=2**-7, atol=2**-5)


def keep_graphs_on_disk() -> None:
    """What torch refuses to keep, every process would trace anew."""
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    model, kept = model_of(), []

    def look(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        check_cacheable(graph)
        kept.append(graph)
        return graph.forward

    model.compile(backend=look, fullgraph=True)
    for tier in (Tier.FP32, Tier.BF16, Tier.FP16):
        set_tier(model, tier)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as on a GPU: on a CPU `lowered` looks at attention too
            model(torch.randn(37, 64)).float().sum().backward()
    assert len(kept) == 3


PARTS = {"tiers": compile_every_tier, "half": compile_half_products, "disk": keep_graphs_on_disk}


@pytest.mark.parametrize("part", PARTS)
def test_compiled(part: str) -> None:
    root = Path(__file__).parents[5]
    done = subprocess.run(
        [sys.executable, __file__, part],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    PARTS[sys.argv[1]]()
