"""Two ranks over gloo: sharding, accumulation, tiers, checkpoints and noise, as `two_ranks.py` ran them."""

from typing import Any

import pytest
import torch

TwoRanks = dict[str, Any]


def test_two_ranks_train_as_one_does(two_ranks: TwoRanks) -> None:
    result = two_ranks["one_rank_against_two"]
    assert result["is_sharded"]
    assert torch.allclose(torch.tensor(result["alone"]), torch.tensor(result["shared"]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.tensor(result["alone"]), torch.tensor(result["grouped"]), rtol=1e-5, atol=1e-5)
    # Sharded modules: none, five blocks and the root, four blocks (in two units) and the root.
    assert result["num_units"] == [0, 6, 5]
    assert result["alone"][0][0] > result["alone"][-1][0] > 0


def test_parameter_names_and_values_are_the_same_in_every_form(two_ranks: TwoRanks) -> None:
    result = two_ranks["one_rank_against_two"]
    alone, shared = result["alone_parameters"], result["shared_parameters"]
    assert list(alone) == list(shared)
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5)


def test_a_batch_split_into_micro_batches_gives_the_same_losses_and_norms(two_ranks: TwoRanks) -> None:
    result = two_ranks["accumulation"]
    assert torch.allclose(torch.tensor(result[1]), torch.tensor(result[3]), rtol=1e-5, atol=1e-5)


def test_the_gradient_norm_is_that_of_the_whole_gradient(two_ranks: TwoRanks) -> None:
    result = two_ranks["norm_without_clipping"]
    assert result["shared"] == pytest.approx(result["alone"], rel=1e-5)
    assert result["sum_sq_alone"] == pytest.approx(result["alone"] ** 2, rel=1e-5)
    assert result["sum_sq_shared"] == pytest.approx(result["alone"] ** 2, rel=1e-5)


def test_a_tier_switch_under_sharding_keeps_parameters_and_optimizer_state(two_ranks: TwoRanks) -> None:
    result = two_ranks["tier_switch"]
    assert (result["changed"], result["back"], result["in_use"]) == (6, 6, {"bf16": 6})
    assert result["parameters_unchanged"]
    assert result["state_kept"]
    assert result["grad_dtypes"] == ["torch.float32"]


def test_after_a_tier_switch_training_goes_on_close_to_the_unswitched_run_but_not_in_it(two_ranks: TwoRanks) -> None:
    result = two_ranks["tier_switch"]
    steady, switched = torch.tensor(result["steady"]), torch.tensor(result["switched"])
    assert not torch.equal(steady, switched)
    assert torch.allclose(steady, switched, rtol=0.05, atol=0.02)
    assert result["eval_dtype"] == "torch.float32"
    assert 0 < result["eval_gap"] < 0.1


def test_a_sharded_block_may_itself_be_a_precision_layer(two_ranks: TwoRanks) -> None:
    result = two_ranks["a_block_that_is_a_linear_layer"]
    assert result == {"changed": 2, "survived": True, "grad_dtypes": {"torch.float32"}}


def test_a_commit_of_two_ranks_resumes_on_two_bit_for_bit(two_ranks: TwoRanks) -> None:
    result = two_ranks["resume_on_as_many_ranks"]
    assert result["extra"] == {"step": 4}
    assert result["resumed"] == result["straight"]
    assert result["parameters_equal"]
    assert "rng_rank1.pt" in result["files"]


def test_a_commit_moves_from_two_ranks_to_one_and_back(two_ranks: TwoRanks) -> None:
    result = two_ranks["resume_on_other_numbers_of_ranks"]
    assert result["loaded_equal"]
    assert result["steps"] == {9.0}
    assert torch.allclose(torch.tensor(result["losses"]), torch.tensor(result["straight"]), rtol=1e-5, atol=1e-5)
    for name, value in result["straight_parameters"].items():
        torch.testing.assert_close(result["parameters"][name], value, rtol=1e-5, atol=1e-5)


def test_a_commit_that_one_rank_refuses_is_refused_on_all_and_leaves_nothing(two_ranks: TwoRanks) -> None:
    result = two_ranks["a_refusal_of_one_rank"]
    assert result["texts"][0] == result["texts"][1]
    assert "rank 1: parameter 'blocks.0.0.weight' is not finite" in result["texts"][0]
    assert result["left"] == []


def test_gradients_are_exchanged_in_another_dtype_from_one_step_to_the_next(two_ranks: TwoRanks) -> None:
    result = two_ranks["exchange"]
    steady, turned = torch.tensor(result["steady"]), torch.tensor(result["turned"])
    assert torch.equal(steady[:3], turned[:3])
    assert not torch.equal(steady[3:], turned[3:])
    torch.testing.assert_close(steady, turned, rtol=0.02, atol=0.01)
    assert result["rounded"] == [False, True, False]
    assert (result["kept"], result["dtypes"]) == (True, {"torch.float32"})


@pytest.mark.parametrize("word", ["bf16", "fixed(8,16)"])
def test_a_checkpoint_crosses_tiers_with_the_same_masters(two_ranks: TwoRanks, word: str) -> None:
    result = two_ranks["a_checkpoint_crosses_tiers"][word]
    assert result["equal"], "bit for bit, there and back"
    assert result["dtypes"] == {"torch.float32"}
    if word == "bf16":  # fixed point rounds gradients at random, which no generator here repeats
        assert result["straight"] == result["gone_on"]
    assert result["straight"] != result["in fp32"], "the tiers are really different"


def test_a_probe_of_two_ranks_finds_what_one_rank_finds_and_both_know_it(two_ranks: TwoRanks) -> None:
    result = two_ranks["probe"]
    for alone, shared in zip(result["alone"], result["shared"], strict=True):
        assert shared == pytest.approx(alone, rel=0.02, abs=1e-4)
    assert result["everyone"][0] == result["everyone"][1]
    assert result["shared times"] == [0.5], "the mean over the ranks, by the way"
    bf16, floor = result["alone"]
    assert bf16[0] < 0.025 < floor[0]


def test_an_overflow_in_one_rank_is_one_on_all_and_harms_nothing(two_ranks: TwoRanks) -> None:
    result = two_ranks["overflow_in_one_rank"]
    assert result["everyone"] == [([True, False, True], 128.0)] * 2
    assert result["finite"]
