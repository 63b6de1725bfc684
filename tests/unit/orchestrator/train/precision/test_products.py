"""What each tier makes of a linear layer's three products: numbers, what is kept, and what passes through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from orchestrator.policies.tier import NAMED_TIERS, FixedPoint, Rounding, Tier
from orchestrator.train.precision import fp8, int8
from orchestrator.train.precision.products import function_of, tier_of_layer
from orchestrator.train.precision.rounding import fixed_point, to_tf32

FIXED = Tier("fixed(8,16)")
ERRORS = {Tier.TF32: 1e-3, Tier.BF16: 8e-3, Tier.FP16: 1e-3, Tier.FP8: 8e-2, Tier.INT8: 3e-2, FIXED: 1e-2}
"""Relative errors of 64-wide random products that each format is known for, with room."""


def products(tier: Tier, rows: int = 48, seed: int = 0, *, keeps_weight: bool = False) -> dict[str, Tensor]:
    """Result and gradients of one layer in `tier`; the same random numbers for every tier."""
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(rows, 64), torch.randn(32, 64), torch.randn(32)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    grad = torch.randn(rows, 32)
    y = function_of(tier, keeps_weight=keeps_weight)(*leaves)
    y.backward(grad)  # type: ignore[no-untyped-call]
    names = ("x", "weight", "bias")
    gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}
    return {"y": y.detach(), **gradients}


@pytest.mark.parametrize("tier", ERRORS)
@pytest.mark.parametrize("rows", [48, 37])
def test_all_three_products_are_as_exact_as_the_format(tier: Tier, rows: int) -> None:
    exact, rounded = products(Tier.FP32, rows), products(tier, rows)
    for name, value in exact.items():
        error = ((rounded[name] - value).norm() / value.norm()).item()
        assert error < ERRORS[tier], f"{name}: {error}"
        assert error > 0 or name == "bias", f"{name} was not computed in {tier}"


@pytest.mark.parametrize("tier", [*NAMED_TIERS, FIXED])
def test_a_kept_weight_changes_no_bit(tier: Tier) -> None:
    for name, value in products(tier).items():
        assert torch.equal(products(tier, keeps_weight=True)[name], value), name


@pytest.mark.parametrize(("keeps_weight", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_what_is_kept_of_the_weight(keeps_weight: bool, dtype: torch.dtype) -> None:
    """Under FSDP2 the parameter itself, which is gathered again; else what was cast, so that it is cast once."""
    x, weight = torch.randn(8, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function_of(Tier.BF16, keeps_weight=keeps_weight)(x, weight, None)
    assert [each.dtype for each in kept if each.shape == weight.shape] == [dtype]


def saved_bytes(tier: Tier) -> int:
    """Bytes kept for the backward pass, parameters (which exist anyway) left out."""
    x, weight = torch.randn(256, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function_of(tier)(x, weight, None)
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != weight.data_ptr())


def test_what_is_kept_for_backward_is_the_quantised_copy() -> None:
    assert saved_bytes(Tier.FP32) == 256 * 64 * 4
    assert saved_bytes(Tier.BF16) == saved_bytes(Tier.FP16) == 256 * 64 * 2
    assert saved_bytes(Tier.FP8) <= 0.55 * saved_bytes(Tier.BF16)
    assert saved_bytes(Tier.INT8) <= 0.6 * saved_bytes(Tier.BF16)


@pytest.mark.parametrize("tier", [*NAMED_TIERS, FIXED])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish(tier: Tier, bad: float) -> None:
    x, weight = torch.randn(32, 64), torch.randn(32, 64)
    x[3, 5] = bad
    if tier is FIXED and bad == float("inf"):
        pytest.skip("a word that saturates makes a number of infinity, which is what it is for")
    assert not function_of(tier)(x, weight, None).isfinite().all()


@pytest.mark.parametrize("tier", [*NAMED_TIERS, FIXED])
def test_zeros_stay_zeros(tier: Tier) -> None:
    x, weight = torch.zeros(32, 64, requires_grad=True), torch.zeros(32, 64, requires_grad=True)
    y = function_of(tier)(x, weight, None)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_emulated_fp8_is_what_the_scaled_product_computes() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(32, 64), torch.randn(16, 64)
    scales = fp8.scale_of(a, fp8.FORWARD), fp8.scale_of(b, fp8.FORWARD)
    a8, b8 = (fp8.quantise(x, scale, fp8.FORWARD) for x, scale in zip((a, b), scales, strict=True))
    real = torch._scaled_mm(a8, b8.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.float32)
    torch.testing.assert_close(fp8.multiply(a8, b8, scales, torch.float32, is_fast=True), real, rtol=1e-5, atol=1e-4)


def test_emulated_int8_is_the_integer_product() -> None:
    a, b = (torch.randint(-127, 128, (32, 64), dtype=torch.int8) for _ in range(2))
    assert torch.equal(torch._int_mm(a, b.t()).float(), F.linear(a.float(), b.float()))
    assert torch.equal(int8.multiply(a, b), F.linear(a.float(), b.float()))


def test_rounded_gradients_have_no_bias() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(48, 64), torch.randn(32, 64, requires_grad=True), torch.randn(32)
    grad = torch.randn(48, 32)
    expected = grad.t() @ x
    draws: list[Tensor] = []
    for _ in range(64):
        weight.grad = None
        function_of(Tier.INT8)(x, weight, bias).backward(grad)  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        draws.append(weight.grad)
    single = (draws[0] - expected).norm()
    assert (torch.stack(draws).mean(0) - expected).norm() < 0.8 * single


def test_a_layer_falls_back_by_its_shape() -> None:
    assert tier_of_layer(Tier.FP8, 16, 32) is Tier.FP8
    assert tier_of_layer(Tier.FP8, 16, 8) is Tier.BF16
    assert tier_of_layer(Tier.INT8, 16, 8) is Tier.INT8
    assert tier_of_layer(Tier.INT8, 3, 8) is Tier.BF16
    assert tier_of_layer(FIXED, 3, 5) is FIXED


def test_the_textbook_sample_fails_in_plain_torch_and_trains_here() -> None:
    x = torch.tensor([0.3, 200.0, -0.2], requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        (x * 2**8).int().sum().backward()  # type: ignore[no-untyped-call]
    y = fixed_point(x, FixedPoint(k=8, bits=16, mode=Rounding.NEAREST))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.tolist() == [77 / 256, 32767 / 256, -51 / 256]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 1.0], "no gradient through what saturates"


def test_thirty_two_digits_behind_the_point_are_the_identity_for_most_fp32_values() -> None:
    classic = FixedPoint(k=32, bits=None, mode=Rounding.FLOOR)
    x = torch.cat((torch.randn(1000), torch.tensor([2.0**-9, -(2.0**-9)])))
    x = x[x.abs() >= 2.0**-9]
    assert torch.equal(fixed_point(x, classic), x)
    assert fixed_point(torch.tensor([-1e-11]), classic).item() == -(2.0**-32)


def test_tf32_has_ten_digits_and_rounds_halves_away() -> None:
    x = torch.tensor([1.0 + 2.0**-10, 1.0 + 2.0**-11, 1.0 + 2.0**-12, -1.0 - 2.0**-11, float("inf")])
    assert to_tf32(x).tolist() == [1.0 + 2.0**-10, 1.0 + 2.0**-10, 1.0, -1.0 - 2.0**-10, float("inf")]
    assert to_tf32(torch.tensor([float("nan")])).isnan().all()


def test_stochastic_rounding_is_right_in_the_mean_and_floor_is_not() -> None:
    torch.manual_seed(0)
    x = torch.full((20_000,), 0.3)
    for mode, low, high in ((Rounding.STOCHASTIC, -0.002, 0.002), (Rounding.FLOOR, -0.06, -0.04)):
        bias = (fixed_point(x, FixedPoint(k=2, bits=8, mode=mode)) - x).mean().item()
        assert low < bias < high
