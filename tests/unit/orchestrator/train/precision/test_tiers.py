"""Precision tiers of linear layers: what they compute, and turning them."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from orchestrator.policies.tier import NAMED_TIERS, TIER_FACTS, Tier
from orchestrator.train.precision.attention import LONGEST
from orchestrator.train.precision.half import sum_rows
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.products import bf16_linear, function_of
from orchestrator.train.precision.tiers import (
    TIER_FUNCTIONS,
    coverage,
    facts_of,
    install,
    is_real,
    lowered,
    set_tier,
    tiers_in_use,
)


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 2)))


def bf16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def test_every_tier_has_one_function() -> None:
    assert set(TIER_FUNCTIONS) == set(NAMED_TIERS) == set(TIER_FACTS)


def test_install_changes_every_linear_layer_and_no_parameter() -> None:
    model = model_of()
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    assert install(model) == 3
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert tiers_in_use(model) == {Tier.FP32: 3}


def test_install_twice_changes_nothing() -> None:
    model = model_of()
    install(model)
    set_tier(model, Tier.BF16)
    assert install(model) == 0
    assert tiers_in_use(model) == {Tier.BF16: 3}


def test_only_layers_that_may_keep_cast_weights_do() -> None:
    for keeps in (False, True):
        model = model_of()
        install(model, keeps_weights=keeps)
        set_tier(model, Tier.BF16)
        layers = [module for module in model.modules() if isinstance(module, PrecisionLinear)]
        assert layers
        assert {layer.keeps_weight for layer in layers} == {keeps}
        assert {layer.function for layer in layers} == {function_of(Tier.BF16, keeps_weight=keeps)}


def test_a_model_that_is_one_linear_layer_is_changed_itself() -> None:
    model = nn.Linear(3, 3)
    assert install(model) == 1
    assert isinstance(model, PrecisionLinear)
    assert "tier=fp32" in repr(model)


def test_other_kinds_of_linear_layer_are_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert install(attention) == 0


def test_set_tier_counts_the_layers_that_changed() -> None:
    model = model_of()
    install(model)
    assert set_tier(model, Tier.BF16) == 3
    assert set_tier(model, Tier.BF16) == 0
    assert set_tier(model, Tier.FP32) == 3


def test_an_unknown_tier_is_refused_and_the_allowed_are_named() -> None:
    with pytest.raises(ValueError, match="allowed: fp32, tf32, bf16"):
        set_tier(model_of(), "fp7")  # type: ignore[arg-type]


def test_the_tier_is_set_on_the_instance_only() -> None:
    install(model_of())
    assert "tier" not in vars(PrecisionLinear)


def test_fp32_is_bit_equal_to_the_plain_layer() -> None:
    plain, model, x = model_of(), model_of(), torch.randn(5, 6)
    install(model)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    for expected, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected.grad, got.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6), (2, 0, 6)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bf16_computes_all_three_products_from_bf16_operands(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(4, 6, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if has_bias else None
    grad = torch.randn(*shape[:-1], 4)
    y = bf16_linear(x, weight, bias)
    y.backward(grad)  # type: ignore[no-untyped-call]
    expected = F.linear(bf16(x), bf16(weight), None if bias is None else bf16(bias)).float()
    assert torch.equal(y, expected)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, (bf16(grad) @ bf16(weight)).float())
    expected_weight = (bf16(grad).reshape(-1, 4).t() @ bf16(x).reshape(-1, 6)).float()
    assert torch.equal(weight.grad, expected_weight)
    assert not torch.equal(expected, F.linear(x, weight, bias)) or x.numel() == 0
    if bias is not None:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, grad.reshape(-1, 4).sum(0))


def test_the_output_has_the_dtype_of_the_input() -> None:
    weight = torch.randn(4, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert bf16_linear(torch.randn(2, 6, dtype=dtype), weight, None).dtype is dtype


def test_gradients_arrive_in_fp32_and_a_plain_layer_may_follow() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    install(model)
    set_tier(model, Tier.BF16)
    nn.Linear(2, 1)(model(torch.randn(3, 6))).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters())


def test_the_input_is_kept_in_bf16_and_no_copy_of_the_weight() -> None:
    x, weight = torch.randn(32, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        bf16_linear(x, weight, None)
    assert [t.dtype for t in kept] == [torch.bfloat16, torch.float32]
    assert kept[1].data_ptr() == weight.data_ptr()


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same() -> None:
    x, weight = torch.randn(3, 6), torch.randn(4, 6, requires_grad=True)
    with torch.no_grad():
        y = bf16_linear(x, weight, None)
    assert not y.requires_grad
    assert torch.equal(y, bf16_linear(x, weight, None))


def test_a_frozen_weight_or_input_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 6), torch.randn(4, 6, requires_grad=True)
    bf16_linear(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert weight.grad is not None
    x, weight = x.requires_grad_(), weight.detach()
    bf16_linear(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


@pytest.mark.parametrize("tier", [*NAMED_TIERS, Tier("fixed(8,16)")])
@pytest.mark.parametrize("shape", [(5, 16), (16,), (2, 3, 16), (2, 0, 16)])
def test_every_tier_takes_every_shape_and_keeps_fp32_gradients(tier: Tier, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 32)
    install(layer)
    set_tier(layer, tier)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert (y.shape, y.dtype) == ((*shape[:-1], 32), torch.float32)
    for leaf in (x, layer.weight, layer.bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype is torch.float32
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()


def test_under_autocast_a_layer_answers_in_the_lowered_dtype_and_norms_and_losses_do_not() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    install(model)
    for tier in (Tier.BF16, Tier.FP8, Tier.INT8):
        set_tier(model, tier)
        with lowered(tier, torch.device("cpu")):
            assert model[0](torch.randn(4, 16)).dtype is torch.bfloat16
            assert F.conv1d(torch.randn(1, 2, 8), torch.randn(2, 2, 3)).dtype is torch.bfloat16
            assert F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8)).dtype is torch.bfloat16
            assert F.mse_loss(model[0](torch.randn(4, 16)), torch.randn(4, 16)).dtype is torch.float32
    with lowered(Tier.FP32, torch.device("cpu")):
        assert F.conv1d(torch.randn(1, 2, 8), torch.randn(2, 2, 3)).dtype is torch.float32


@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_on_a_cpu_attention_over_short_windows_computes_in_fp32(mask: torch.dtype | None) -> None:
    torch.manual_seed(0)
    q, k, v = (bf16(x) for x in torch.randn(3, 2, 4, 32, 16))
    where = None if mask is None else torch.ones(32, 32).tril().to(mask)
    raised = where.float() if where is not None and mask is torch.bfloat16 else where
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=raised)
    with lowered(Tier.BF16, torch.device("cpu")):
        assert F.scaled_dot_product_attention(q, k, value=v, attn_mask=where).equal(bf16(exact))
        assert F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=where).equal(bf16(exact))


def test_on_a_cpu_attention_over_long_windows_stays_as_autocast_has_it() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LONGEST + 1, 16)
    with lowered(Tier.BF16, torch.device("cpu")):
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got.equal(F.scaled_dot_product_attention(bf16(q), bf16(k), bf16(v), is_causal=True))


def test_the_gradient_of_a_bias_is_as_exact_as_that_of_a_weight() -> None:
    torch.manual_seed(0)
    grad = bf16(torch.randn(4, 4096, 16) + 1)
    got = sum_rows(grad)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, grad.double().sum((0, 1)).float(), rtol=2.0**-7, atol=0.0)


def test_a_layer_whose_shape_forbids_its_tier_falls_back_and_is_counted() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 10))
    install(model)
    set_tier(model, Tier.FP8)
    assert tiers_in_use(model) == {Tier.FP8: 1, Tier.BF16: 2}
    assert (coverage(model).num_layers, coverage(model).num_in_tier) == (3, 1)
    set_tier(model, Tier.INT8)
    assert tiers_in_use(model) == {Tier.INT8: 2, Tier.BF16: 1}


def test_a_cpu_emulates_what_it_has_no_unit_for_and_other_kinds_of_device_are_refused() -> None:
    cpu = torch.device("cpu")
    assert is_real(Tier.FP32, cpu)
    assert not is_real(Tier.FP8, cpu)
    assert not is_real(Tier("fixed(8,16)"), cpu)
    with pytest.raises(ValueError, match="'meta' is not supported"):
        facts_of(torch.device("meta"))
