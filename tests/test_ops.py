"""The pure layer against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.advantages import AdvantageInput, gae, group, group_relative
from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.losses import clipped_surrogate, preference_loss, value_loss
from rlhf.ops.masking import explained_variance, masked_mean, masked_sum, masked_variance, masked_whiten

T, F = True, False


def close(found: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def advantage_input(rewards: Tensor, mask: Tensor, values: Tensor | None = None, **changes: object) -> AdvantageInput:
    rows = len(rewards)
    inputs: dict[str, object] = {
        "rewards": rewards,
        "mask": mask,
        "group": torch.arange(rows),
        "valid": mask.any(1),
        "values": values,
        "bootstrap": torch.zeros(rows, dtype=torch.bool),
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "group_scale": "std",
        "whiten": False,
    }
    return AdvantageInput(**(inputs | changes))  # type: ignore[arg-type]


# ---- masking


def test_masked_reductions() -> None:
    x, mask = torch.tensor([1.0, 2.0, 6.0, math.nan]), torch.tensor([T, T, T, F])
    assert masked_sum(x, mask) == 9
    assert masked_mean(x, mask) == 3
    assert masked_variance(x, mask) == pytest.approx((4 + 1 + 9) / 3)  # the population's
    assert masked_mean(x, torch.zeros(4, dtype=torch.bool)) == 0


def test_trap_6_whitening_ignores_padding() -> None:
    """trap 6: kept are 1, 2, 6: mean 3, variance 14 / 3; what stands in the padding, NaN too, has no influence."""
    mask = torch.tensor([[T, T, F], [T, F, F]])
    expected = [[-2 / 2.160247, -1 / 2.160247, 0], [3 / 2.160247, 0, 0]]
    for padding in (0.0, 1000.0, math.nan):
        close(masked_whiten(torch.tensor([[1.0, 2.0, padding], [6.0, padding, padding]]), mask), expected)


def test_whitening_constants_gives_zero() -> None:
    third = torch.tensor([0.1, 0.1, 0.1, 7.0])
    assert masked_whiten(third, torch.tensor([T, T, T, F])).tolist() == [0, 0, 0, 0]
    assert masked_whiten(third, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_trap_15_explained_variance() -> None:
    """trap 15: 1 - Var(returns - values) / Var(returns): perfect 1, a constant 0, wrong way round -3."""
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[T, T, T, F]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))


# ---- logprobs


def test_trap_16_logprobs_and_entropy_at_a_temperature() -> None:
    """trap 16: logits log(1), log(3) at temperature 0.5 are log(1), log(9): probabilities 0.1 and 0.9."""
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), 0.5)
    close(logprobs, [math.log(0.1), math.log(0.9)])
    close(entropy, [-(0.1 * math.log(0.1) + 0.9 * math.log(0.9))] * 2)


def test_logprobs_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).bfloat16()
    logprobs, _ = token_logprobs(logits, torch.tensor([1]))
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-2.440190, abs=1e-6)  # 1 - log(1 + e + e^2 + e^3) = 1 - 3.440190


def test_annotations_are_checked() -> None:
    with pytest.raises(Exception, match="Type-check error"):
        masked_sum(torch.ones(2), torch.ones(2))  # a mask of floats


# ---- advantages


def test_gae_by_hand() -> None:
    # gamma 0.9, lambda 0.5, values 1, 2, 3, (7), reward 10 at the end, which is terminal.
    # delta_2 = 10 - 3 = 7; delta_1 = 0.9 * 3 - 2 = 0.7; delta_0 = 0.9 * 2 - 1 = 0.8.
    # A_2 = 7; A_1 = 0.7 + 0.45 * 7 = 3.85; A_0 = 0.8 + 0.45 * 3.85 = 2.5325. Returns are A + V.
    rewards, mask = torch.tensor([[0.0, 0.0, 10.0]]), torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([[1.0, 2.0, 3.0, 7.0]])
    result = gae(advantage_input(rewards, mask, values, gamma=0.9, gae_lambda=0.5))
    close(result.advantages, [[2.5325, 3.85, 7.0]])
    assert result.returns is not None
    close(result.returns, [[3.5325, 5.85, 10.0]])


def test_trap_13_bootstrap_uses_the_value_after_the_last_token() -> None:
    """trap 13: a cut response of 2 tokens, no reward: delta_1 = 0.9 * 3 - 2 = 0.7, A_0 = (0.9 * 2 - 1) + 0.45 * 0.7 = 1.115.

    The value after the last token is 3, although the window is wider; the 7 behind it is not read.
    """
    rewards, mask = torch.zeros(1, 3), torch.tensor([[T, T, F]])
    values = torch.tensor([[1.0, 2.0, 3.0, 7.0]])
    cut = advantage_input(rewards, mask, values, gamma=0.9, gae_lambda=0.5, bootstrap=torch.tensor([True]))
    close(gae(cut).advantages, [[1.115, 0.7, 0.0]])
    terminal = advantage_input(rewards, mask, values, gamma=0.9, gae_lambda=0.5)
    close(gae(terminal).advantages, [[0.8 - 0.45 * 2, -2.0, 0.0]])


def test_trap_12_gae_steps_over_observation_tokens() -> None:
    """trap 12: tokens 1 and 2 are tool output: tokens 0 and 3 are neighbours, as if the others were not there."""
    rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 10.0]]), torch.tensor([[T, F, F, T]])
    values = torch.tensor([[1.0, 50.0, -50.0, 3.0, 0.0]])
    found = gae(advantage_input(rewards, mask, values, gamma=0.9, gae_lambda=0.5))
    short = gae(
        advantage_input(torch.tensor([[0.0, 10.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 3.0, 0.0]]), gamma=0.9, gae_lambda=0.5)
    )
    # A_3 = 7; A_0 = 0.9 * 3 - 1 + 0.45 * 7 = 4.85
    close(found.advantages, [[4.85, 0.0, 0.0, 7.0]])
    close(short.advantages, [[4.85, 7.0]])
    assert found.returns is not None
    close(found.returns, [[5.85, 0.0, 0.0, 10.0]])


@given(st.data())
def test_trap_12_padding_and_observations_never_matter(data: st.DataObject) -> None:
    """trap 12: numbers outside the mask can be anything."""
    width = data.draw(st.integers(1, 8))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=width, max_size=width))])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    rewards, values = torch.randn(1, width, generator=generator), torch.randn(1, width + 1, generator=generator)
    rewards = torch.where(mask, rewards, torch.zeros(()))
    found = gae(advantage_input(rewards, mask, values, gamma=0.9, gae_lambda=0.8))
    noisy = torch.where(mask, values[:, :-1], torch.randn(1, width, generator=generator) * 100)
    again = gae(advantage_input(rewards, mask, torch.cat([noisy, values[:, -1:]], 1), gamma=0.9, gae_lambda=0.8))
    assert torch.equal(found.advantages, again.advantages)
    kept = mask[0].nonzero().squeeze(1)
    if len(kept):
        dense = torch.cat([values[:, kept], values[:, :1]], 1)
        short = gae(advantage_input(rewards[:, kept], torch.ones(1, len(kept), dtype=torch.bool), dense, gamma=0.9, gae_lambda=0.8))
        assert torch.equal(found.advantages[:, kept], short.advantages)


def test_gae_whitens_advantages_and_not_returns() -> None:
    # Advantages 3, 1 (lambda 1, no values) -> 1, -1; returns stay.
    rewards, mask = torch.tensor([[3.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool)
    result = gae(advantage_input(rewards, mask, torch.zeros(2, 2), whiten=True))
    close(result.advantages, [[1.0], [-1.0]])
    assert result.returns is not None
    close(result.returns, [[3.0], [1.0]])


def test_group_by_hand() -> None:
    # Group 0: scores 1, 2, 6: mean 3, sample deviation sqrt(14 / 2) = 2.645751. Group 1: 0 and 4: mean 2, deviation 2.828427.
    score = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0])
    groups, valid = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    close(group_relative(score, groups, valid, "std"), [-0.755929, -0.377964, 1.133893, -0.707107, 0.707107])
    close(group_relative(score, groups, valid, "none"), [-2.0, -1.0, 3.0, -2.0, 2.0])


def test_trap_10_groups_of_unequal_size_and_of_one() -> None:
    """trap 10: lost rows leave the statistics: of group 0 remain 1 and 6 (mean 3.5, deviation 3.535534), of group 1 only one row."""
    score = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0])
    groups, valid = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([T, F, T, F, T])
    close(group_relative(score, groups, valid, "std"), [-0.707107, 0.0, 0.707107, 0.0, 0.0])


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 1e8])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_trap_11_group_without_variance_is_exactly_zero(value: float, scale: str) -> None:
    """trap 11: the mean of seven times 0.1 is not 0.1 in float32; the advantage is 0 all the same."""
    found = group_relative(torch.full((7,), value), torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool), scale)
    assert found.tolist() == [0.0] * 7


def test_group_spreads_the_advantage_over_the_mask() -> None:
    rewards, mask = torch.tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([[T, T, F], [T, F, F]])
    result = group(advantage_input(rewards, mask, group=torch.tensor([4, 4])))
    close(result.advantages, [[-0.707107, -0.707107, 0.0], [0.707107, 0.0, 0.0]])
    assert result.returns is None


# ---- losses


def surrogate(ratio: list[float], advantages: list[float], low: float = 0.2, high: float = 0.3) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    logprobs = torch.tensor([ratio]).log().requires_grad_(True)
    mask = torch.ones(1, len(ratio), dtype=torch.bool)
    loss, metrics = clipped_surrogate(logprobs, torch.zeros(1, len(ratio)), torch.tensor([advantages]), mask, low, high)
    loss.sum().backward()
    assert logprobs.grad is not None
    return loss.detach(), metrics, logprobs.grad


def test_clipped_surrogate_by_hand() -> None:
    # -min(r A, clip(r, 0.8, 1.3) A):
    #   r 1.5, A 2: min(3, 2.6) = 2.6, no gradient;     r 1.5, A -2: min(-3, -2.6) = -3, gradient -r A = 3
    #   r 0.5, A 2: min(1, 1.6) = 1, gradient -1;       r 0.5, A -2: min(-1, -1.6) = -1.6, none;      r 1.1, A 2: 2.2, gradient -2.2
    loss, metrics, gradient = surrogate([1.5, 1.5, 0.5, 0.5, 1.1], [2.0, -2.0, 2.0, -2.0, 2.0])
    close(loss, [[-2.6, 3.0, -1.0, 1.6, -2.2]])
    close(gradient, [[0.0, 3.0, -1.0, 0.0, -2.2]])
    assert metrics["actor/pg_clipfrac"] == 2
    assert metrics["actor/ratio"] == pytest.approx(5.1)
    assert metrics["actor/ppo_kl"] == pytest.approx(-math.log(1.5 * 1.5 * 0.5 * 0.5 * 1.1), abs=1e-5)


def test_clipped_surrogate_ignores_what_is_not_kept() -> None:
    """Beyond a response the logprobs are undefined; even an overflow there leaves loss and gradient finite."""
    logprobs = torch.tensor([[-1.0, 500.0]], requires_grad=True)
    loss, metrics = clipped_surrogate(logprobs, torch.tensor([[-1.0, -500.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([[T, F]]), 0.2, 0.2)
    loss.sum().backward()
    assert loss.tolist() == [[-2.0, 0.0]]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.0, 0.0]]
    assert metrics["actor/ratio"] == 1


def test_trap_7_value_clip_is_around_the_rollouts_values() -> None:
    """trap 7: value 2, the rollout said 1, clip 0.5 -> at most 1.5.

    Return 3: errors (2 - 3)^2 = 1 and (1.5 - 3)^2 = 2.25: the clipped one counts, and has no gradient.
    Return 0: errors 4 and 2.25: the plain one counts. Third token: not kept. Clipping around the return or around the new value
    would give (2 - 3)^2 = 1 for the first.
    """
    values = torch.tensor([[2.0, 2.0, 9.0]], requires_grad=True)
    loss, metrics = value_loss(values, torch.ones(1, 3), torch.tensor([[3.0, 0.0, 99.0]]), torch.tensor([[T, T, F]]), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (2.25 + 4))
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 2.0, 0.0]]
    assert metrics["critic/vf_clipfrac"] == 1
    assert metrics["critic/vf_loss"] == pytest.approx(3.125)


def test_value_loss_without_clip() -> None:
    loss, _ = value_loss(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[T]]), None)
    assert loss == 0.5


def test_preference_loss_by_hand() -> None:
    # -log sigmoid(0) = log 2 = 0.693147; -log sigmoid(2) = 0.126928; the filler has weight 0.
    chosen, rejected = torch.tensor([1.0, 3.0, -50.0]), torch.tensor([1.0, 1.0, 50.0])
    assert preference_loss(chosen, rejected, torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(0.693147 + 0.126928, abs=1e-5)
