"""From a rollout and its scores to per-token rewards, advantages and losses: traps 3, 4, 6, 13, 15, 22, and what is never read."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.batching import MicroBatchPlan, plan_micro_batches
from rlhf.config import AlgorithmConfig, Config, RewardConfig
from rlhf.distributed import World
from rlhf.experience import (
    ExperiencePasses,
    gather_rollout,
    kl_per_response,
    make_experience,
    needs_old_logprobs,
    needs_reference,
    scored_together,
    token_rewards,
    training_mask,
)
from rlhf.models.forward import response_logprobs, response_values
from rlhf.rewards.compose import Rewards
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.pool import Pool
from rlhf.trainers.rl import critic_loss, denominators, describe_experience, micro_batch_of, plan_epoch, policy_loss
from rlhf.types import Experience, MicroBatch, Rollout, Scores
from tests.helpers import make_rollout, make_scores, rl_config, single_world, tiny_tokenizer

# Four rows of a window of 4: three tokens, one, four (cut by the window), two.
ROLLOUT = make_rollout([2, 2, 1, 3], [3, 1, 4, 2], window=4, group_size=2, cut=(2,))


def constant(value: float, extra: int = 0) -> Any:
    return lambda batch: torch.full((len(batch.mask), batch.mask.shape[1] + extra), value)


def experience(scores: Scores, rollout: Rollout = ROLLOUT, values: float | None = 0.0, kl_coef: float = 0.0, **algorithm: Any) -> Experience:
    config = AlgorithmConfig(**algorithm)
    passes = ExperiencePasses(
        old_logprobs=constant(-1.0),
        ref_logprobs=constant(-1.5) if kl_coef else None,
        values=constant(values, 1) if values is not None and config.needs_critic else None,
    )
    return make_experience(rollout, lambda: scores, passes, plan(rollout), config, kl_coef, single_world())


def plan(rollout: Rollout) -> list[MicroBatchPlan]:
    return plan_micro_batches(range(len(rollout)), (rollout.prompt_lengths + rollout.response_lengths).tolist(), 2, 1, 0)


PLAIN = {"whiten_advantages": False, "gae_lambda": 1.0}


def test_scores_are_waited_for_after_the_passes_that_need_none() -> None:
    """Slow scorers go on while reference and critic pass; the policy passes under the update's mask, from which lost samples are missing (trap 2)."""
    calls: list[str] = []
    masked: list[int] = []

    def noted(name: str, extra: int = 0) -> Any:
        def scorer(batch: MicroBatch) -> Tensor:
            calls.append(name)
            if name == "old":
                masked.append(int(batch.mask.sum()))
            return torch.zeros(len(batch.mask), batch.mask.shape[1] + extra)

        return scorer

    def scored() -> Scores:
        calls.append("scores")
        return make_scores([1.0, 2.0, 0.0, 3.0], invalid=(2,))

    passes = ExperiencePasses(noted("old"), noted("ref"), noted("values", 1))
    config = AlgorithmConfig(advantage="gae", kl={"place": "reward", "coef": 0.1})
    found = make_experience(ROLLOUT, scored, passes, plan(ROLLOUT), config, 0.1, single_world())
    assert list(dict.fromkeys(calls)) == ["ref", "values", "scores", "old"]
    assert sum(masked) == int(found.mask.sum()) == 3 + 1 + 2


def test_trap_4_the_score_sits_on_the_last_response_token() -> None:
    """trap 4: the EOS where there is one, else the last token of the window."""
    rewards = experience(make_scores([1.0, 2.0, 3.0, 4.0]), **PLAIN).rewards
    assert rewards.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 4, 0, 0]]


def test_trap_3_the_eos_trains_and_nothing_after_it() -> None:
    """trap 3: pad = EOS = 3 here; the mask goes by length, not by token id."""
    found = experience(make_scores([1.0] * 4))
    assert found.mask.tolist() == ROLLOUT.response_mask.tolist()
    assert found.mask.sum(1).tolist() == [3, 1, 4, 2]
    for row, n in enumerate([3, 1, 4, 2]):
        end = ROLLOUT.input_ids[row, ROLLOUT.prompt_lengths[row] + n - 1]
        assert (end == 3) == (row != 2)
        assert found.advantages[row, n:].tolist() == [0.0] * (4 - n)


@pytest.mark.parametrize(
    ("truncation", "rewards", "mask", "last"),
    [
        ("terminal", [0, 0, 0, 3], [1, 1, 1, 1], 3 - 0.5),  # reward 3, nothing follows, value 0.5
        ("bootstrap", [0, 0, 0, 0], [1, 1, 1, 1], 0.5 - 0.5),  # no score; the value 0.5 after the last token stands for the rest
        ("mask", [0, 0, 0, 0], [0, 0, 0, 0], 0.0),  # trains nothing
    ],
)
def test_trap_13_a_cut_response(truncation: str, rewards: list[float], mask: list[int], last: float) -> None:
    """trap 13"""
    found = experience(make_scores([1.0, 2.0, 3.0, 4.0]), values=0.5, truncation=truncation, **PLAIN)
    assert found.rewards[2].tolist() == rewards
    assert found.mask[2].tolist() == mask
    assert found.advantages[2, 3] == last
    assert found.rewards[0].tolist() == [0, 0, 1, 0]  # ended rows are the same under all three
    assert found.advantages[0].tolist() == [0.5, 0.5, 0.5, 0]


def test_kl_in_the_reward_by_hand() -> None:
    # log p - log q = 0.5 at every response token, coefficient 0.2: -0.1 each, the score on top of the last.
    found = experience(make_scores([1.0, 2.0, 3.0, 4.0]), kl_coef=0.2, kl={"coef": 0.2}, **PLAIN)
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.1, -0.1, 0.9, 0], [1.9, 0, 0, 0], [-0.1, -0.1, -0.1, 2.9], [-0.1, 3.9, 0, 0]]))
    assert kl_per_response(found) == pytest.approx(0.5 * 10 / 4)
    in_loss = experience(make_scores([1.0] * 4), kl_coef=0.2, kl={"coef": 0.2, "place": "loss", "estimator": "k2"}, **PLAIN)
    assert in_loss.rewards.sum() == 4


def test_trap_6_advantages_are_whitened_over_kept_tokens_of_all_rows() -> None:
    """trap 6: mean 0 and variance 1 over the 10 tokens of valid rows; neither padding nor the invalid row counts."""
    found = experience(make_scores([1.0, 2.0, 3.0, 4.0], invalid=(1,)))
    kept = found.advantages[found.mask]
    assert len(kept) == 9
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0) == pytest.approx(1, abs=1e-5)
    assert found.advantages[~found.mask].eq(0).all()


def test_an_invalid_row_trains_nothing_and_moves_nobody() -> None:
    found = experience(make_scores([1.0, 2.0, 3.0, 4.0], invalid=(1,)), values=None, name="grpo", group_scale="none")
    assert found.mask[1].tolist() == [False] * 4
    assert found.advantages[0].tolist() == [0.0] * 4  # alone in its group now (trap 10)
    assert found.advantages[2].tolist() == [-0.5] * 4


def test_trap_22_all_rows_lost() -> None:
    """trap 22: every denominator is 0, which is when the update is skipped."""
    for algorithm in ({"name": "ppo"}, {"name": "grpo"}):
        found = experience(make_scores([1.0] * 4, invalid=(0, 1, 2, 3)), **algorithm)
        assert not found.mask.any()
        assert found.advantages.eq(0).all()
        assert set(denominators(found, [0, 1, 2, 3], _config()).values()) == {0}
        assert all(math.isfinite(v) or name.endswith("explained_var") for name, v in describe_experience(found, 0.0).items())


def _config(**sections: Any) -> Config:
    return rl_config(Path("/nowhere"), **{"rollout": {"max_new_tokens": 4}, **sections})


def test_trap_5_denominators_count_the_whole_optimizer_step() -> None:
    """trap 5"""
    found = experience(make_scores([1.0] * 4, invalid=(3,)))
    assert denominators(found, [0, 1, 2, 3], _config()) == {"tokens": 8, "sequences": 3, "constant": 12}
    assert denominators(found, [1, 3], _config()) == {"tokens": 1, "sequences": 1, "constant": 4}


def test_trap_15_a_new_critic_says_zero_and_its_explained_variance_is_logged() -> None:
    """trap 15"""
    metrics = describe_experience(experience(make_scores([1.0, 2.0, 3.0, 4.0]), values=0.0), 0.0)
    assert metrics["critic/vf_explained_var"] == pytest.approx(0)
    assert metrics["critic/values/mean"] == 0


@pytest.mark.parametrize(
    ("kl", "minibatches", "old", "reference"),  # by step, of which the first is a warm-up: whether it is asked for
    [
        ({"coef": 0.1, "place": "reward"}, 1, [True, True], [True, True]),
        ({"coef": 0.1, "place": "loss", "estimator": "k2"}, 1, [False, False], [False, True]),
        ({"coef": 0.1, "place": "loss", "estimator": "k2"}, 2, [False, True], [False, True]),
        ({"coef": 0.0}, 2, [False, True], [False, False]),
    ],
)
def test_passes_are_made_where_something_needs_them(tmp_path: Path, kl: Any, minibatches: int, old: list[bool], reference: list[bool]) -> None:
    algorithm = {"kl": kl, "minibatches": minibatches, "critic_warmup_steps": 1}
    config = rl_config(tmp_path, algorithm=algorithm, train={"steps": 3})
    assert [needs_old_logprobs(config, step) for step in (1, 2)] == old
    assert [needs_reference(config, step) for step in (1, 2)] == reference


def test_rows_that_cannot_train_are_in_no_forward(tmp_path: Path) -> None:
    """And a minibatch of such rows alone has no forwards at all, on any rank. Which rows meet stays as it is."""
    plans = {}
    for truncation in ("terminal", "mask"):
        rollout = {"prompts": len(ROLLOUT) // 2, "group_size": 2}
        config = rl_config(tmp_path, algorithm={"name": "grpo", "truncation": truncation, "minibatches": len(ROLLOUT)}, rollout=rollout)
        plans[truncation] = [plan_epoch(config, 1, 0, ROLLOUT, World(rank, 2, rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    cut = set(torch.nonzero(~ROLLOUT.finished).flatten().tolist())
    assert cut and len(cut) < len(ROLLOUT)
    for everything, trained in zip(plans["terminal"], plans["mask"], strict=True):
        assert [m.rows for m in everything] == [m.rows for m in trained]
        for whole, part in zip(everything, trained, strict=True):
            assert part.plan == ([] if set(part.rows) <= cut else whole.plan)


def test_truncation_and_rewards_do_not_touch_the_scores() -> None:
    scores = make_scores([1.0, 2.0, 3.0, 4.0])
    token_rewards(ROLLOUT, scores, training_mask(ROLLOUT, scores.valid, AlgorithmConfig(truncation="mask")), "mask")
    assert scores.total.tolist() == [1.0, 2.0, 3.0, 4.0]


# ---- positions, by hand


class Fake:
    """A causal "model" of 5 tokens over a vocabulary of 8: the logits at position t are 10 * one_hot(t), the value is t."""

    def causal(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        return SimpleNamespace(logits=(10.0 * torch.eye(8)[position_ids])[:, logits_to_keep])

    def scalar(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return position_ids.float()


def test_trap_1_logprobs_and_values_by_hand() -> None:
    """trap 1: prompt (7, 7), response (1, 2, 5). The logits at position t favour token t, so tokens 1 and 2, at positions 2 and 3, are
    scored by the logits at 1 and 2, which favour them; 5 at position 4 by those at 3, which do not. V(t) precedes the token: read at
    1, 2, 3, and 4 after the last. A second row (7), (0, 4) is padded: its 0 at position 1 is scored at 0, its 4 at 2 by those at 1."""
    ids = torch.tensor([[7, 7, 1, 2, 5], [7, 0, 4, 3, 3]])
    batch = MicroBatch(ids, torch.tensor([2, 1]), torch.tensor([3, 2]), torch.tensor([[True] * 3, [True, True, False]]), {})
    logprobs, entropy = response_logprobs(Fake().causal, batch, 1.0)
    likely = 10 - math.log(math.exp(10) + 7)
    torch.testing.assert_close(logprobs[0], torch.tensor([likely, likely, likely - 10]))
    torch.testing.assert_close(logprobs[1, :2], torch.tensor([likely, likely - 10]))
    assert entropy.shape == logprobs.shape
    values = response_values(Fake().scalar, batch)
    assert values[0].tolist() == [1, 2, 3, 4]
    assert values[1, :3].tolist() == [0, 1, 2]


# ---- losses on micro-batches


def _uniform(batch_value: float) -> Any:
    """A forward whose logits are 0 over 50 tokens (logprob -log 50 everywhere), with a gradient."""
    weight = torch.tensor(batch_value, requires_grad=True)

    def forward(input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(len(input_ids), len(logits_to_keep), 50) * weight)

    return forward


def test_policy_loss_sums_by_hand() -> None:
    """Old logprobs -1, new -log 50 = -3.912: ratio e^-2.912 = 0.05436. Advantages 1: loss -0.05436 per token of 10.

    Entropy bonus 0.1 * log 50 = 0.3912 per token; k2 to the reference at -1.5: 0.5 * 2.412^2 = 2.909, times 0.2.
    """
    found = experience(make_scores([1.0] * 4), kl_coef=0.2, kl={"coef": 0.2, "place": "loss", "estimator": "k2"}, **PLAIN)
    batch = micro_batch_of(found, MicroBatchPlan([0, 1, 2, 3]))
    batch.columns["advantages"] = torch.ones(4, 4)
    sections = {"algorithm": {"entropy_coef": 0.1, "kl": {"coef": 0.2, "place": "loss", "estimator": "k2"}}}
    per_token = -0.054363 - 0.391202 + 0.2 * 2.908963
    result = policy_loss(_uniform(1.0), batch, _config(**sections), 0.2)
    assert result.loss_sum.item() == pytest.approx(10 * per_token, rel=1e-4)
    assert float(result.metrics["actor/pg_loss"]) == pytest.approx(10 * -0.054363, rel=1e-4)
    assert float(result.metrics["actor/entropy"]) == pytest.approx(10 * 3.912023, rel=1e-4)
    assert float(result.metrics["actor/kl_loss"]) == pytest.approx(10 * 2.908963, rel=1e-4)
    sections["algorithm"]["loss_mean"] = "sequences"
    assert policy_loss(_uniform(1.0), batch, _config(**sections), 0.2).loss_sum.item() == pytest.approx(4 * per_token, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_corrected"])
def test_trap_23_a_filler_has_no_loss_and_a_zero_gradient(estimator: str) -> None:
    """trap 23: also where what stands beyond the mask is extreme."""
    algorithm = {"entropy_coef": 0.1, "kl": {"coef": 0.2, "place": "loss", "estimator": estimator}}
    found = experience(make_scores([1.0] * 4), kl_coef=0.2, **algorithm, **PLAIN)
    batch = micro_batch_of(found, MicroBatchPlan([3], weightless=True))
    logits = torch.zeros(1, 4, 50)
    logits[..., :4] = 400.0
    logits.requires_grad_(True)

    def forward(logits_to_keep: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=logits[:, : len(logits_to_keep)])

    policy_loss(forward, batch, _config(algorithm=algorithm), 0.2).loss_sum.backward()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()
    values = torch.ones(1, 5, requires_grad=True)
    loss = critic_loss(lambda input_ids, position_ids: values, batch, AlgorithmConfig())
    loss.loss_sum.backward()
    assert loss.loss_sum == 0
    assert values.grad is not None
    assert values.grad.eq(0).all()


# ---- exchange and rewards


def test_gather_rollout_sorts_by_draw_and_sample() -> None:
    order = [3, 1, 0, 2]
    mixed = Rollout([ROLLOUT.prompts[i] for i in order], *(getattr(ROLLOUT, n)[order] for n in ("draw", "sample", "input_ids")),
                    *(getattr(ROLLOUT, n)[order] for n in ("prompt_lengths", "response_lengths", "finished", "rollout_logprobs")))  # fmt: skip
    found = gather_rollout(mixed, {0: ROLLOUT.prompts[0], 1: ROLLOUT.prompts[2]}, single_world())
    assert found.draw.tolist() == [0, 0, 1, 1]
    assert found.sample.tolist() == [0, 1, 0, 1]
    assert torch.equal(found.input_ids, ROLLOUT.input_ids)
    assert [found.response_ids(i) for i in range(4)] == [ROLLOUT.response_ids(i) for i in range(4)]


def rewards(rollout: Rollout = ROLLOUT, **config: Any) -> Scores:
    """As the loop does it."""
    built = RewardConfig(**config)
    with Pool([str(c.function) for c in built.components], built.workers, built.timeout) as pool:
        found = Rewards(built, [FunctionReward(c) for c in built.components], tiny_tokenizer(), single_world(), pool)
        early = found.early()
        for row, prompt in enumerate(rollout.prompts):
            early.submit(prompt, int(rollout.draw[row]), int(rollout.sample[row]), rollout.response_ids(row))
        early.close()
        return found.score(rollout, early, found.score_with_models(rollout))


def test_weighted_sum_with_clips_and_penalty() -> None:
    """Lengths 3, 1, 4, 2: 30, 10, lost, 20, clipped to 25, times 0.1, plus 2 * 0.5, the sum clipped to 3; the cut row is lost anyway."""
    lost = {"function": "tests.scorers:third_is_lost", "clip": 25.0, "weight": 0.1}
    scores = rewards(components=[lost, {"function": "tests.scorers:half", "weight": 2.0}], clip=3.0, missing_eos_penalty=1.0)
    torch.testing.assert_close(scores.total, torch.tensor([3.0, 2.0, 0.0, 3.0]))
    assert scores.valid.tolist() == [True, True, False, True]
    assert scores.failures == {"third_is_lost/None": 1}
    assert scores.components["third_is_lost"].tolist()[:2] == [25.0, 10.0]


def test_the_penalty_is_for_responses_that_never_end() -> None:
    scores = rewards(components={"function": "tests.scorers:half"}, missing_eos_penalty=1.0)
    assert scores.total.tolist() == [0.5, 0.5, -0.5, 0.5]


def test_a_component_that_is_only_measured_loses_no_sample() -> None:
    lost = {"function": "tests.scorers:third_is_lost", "weight": 0}
    scores = rewards(components=[lost, {"function": "tests.scorers:half"}])
    assert scores.valid.all()
    assert scores.total.tolist() == [0.5] * 4
    assert scores.components["third_is_lost"].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("sections", "lean", "together"),
    [
        ({}, True, 4),
        ({}, False, 1),
        ({"train": {"packing": False}}, True, 1),
        ({"actor": {"gradient_checkpointing": True}}, True, 1),
        ({"critic": {"gradient_checkpointing": True}}, True, 1),
        ({"actor": {"gradient_checkpointing": "mlp"}}, True, 4),
    ],
)
def test_forwards_are_scored_together_only_where_there_is_room(models: Path, sections: dict[str, Any], lean: bool, together: int) -> None:
    assert scored_together(rl_config(models, **sections), lean, on_gpu=True) == together
    assert scored_together(rl_config(models, **sections), lean, on_gpu=False) == 1


def test_a_sum_beyond_float32_is_lost_and_counted() -> None:
    scores = rewards(components={"function": "tests.scorers:half", "weight": 1e39})
    assert not scores.valid.any() and scores.total.tolist() == [0] * 4
    assert scores.failures == {"sum/infinite": 4}


def test_a_rank_without_rows_scores_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    rollout = Rollout([], none, none, torch.zeros(0, 0, dtype=torch.int64), none, none, none.bool(), torch.zeros(0, 4))
    scores = rewards(rollout, components={"function": "tests.scorers:half"})
    assert scores.total.shape == (0,) and not scores.failures
