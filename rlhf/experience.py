"""Rollout + scores -> experience: logprobs, values, KL, rewards per token, advantages.

The rollout is exchanged first, so that every rank holds all rows (28 bytes a token, on the host). Model passes are shared out;
everything computed from their results is computed on every rank from the same numbers in the same order, and so is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.batching import MicroBatchPlan, collate, merged
from rlhf.config import AlgorithmConfig, Config
from rlhf.distributed import World
from rlhf.ops.advantages import ADVANTAGES, AdvantageInput
from rlhf.ops.kl import k1
from rlhf.ops.masking import masked_sum
from rlhf.progress import Progress
from rlhf.types import Experience, MicroBatch, Prompt, Rollout, Scores

Scorer = Callable[[MicroBatch], Tensor]


@dataclass(frozen=True)
class ExperiencePasses:
    """The model passes over a rollout: micro-batch -> [b, r] logprobs, or [b, r + 1] values. None: not needed."""

    old_logprobs: Scorer | None
    ref_logprobs: Scorer | None
    values: Scorer | None
    packing: bool = False  # what they are given: packed rows, or padded ones
    timed: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()  # around each pass as a whole, by verl's name of it
    together: int = 1  # forwards of the update that are one forward of the reference or critic here: without gradients there is room for it


def scored_together(config: Config, lean: bool, on_gpu: bool) -> int:
    """`ExperiencePasses.together` of a run; lean: actor and reference are of families whose head answers in chunks; logits of others exist whole.

    On a CPU one: there is nothing to gain, and products of other shapes may round otherwise, so that a reference which is the actor would not give
    its logprobs to the bit (trap 2)."""
    # Where whole layers are computed again the update's forwards may be as large as will fit. Where only MLPs are, what attention keeps in all layers
    # still is more than one layer's MLP has at once for four times the tokens.
    layers_again = config.actor.recomputed is True or (config.algorithm.needs_critic and config.critic.recomputed is True)
    return 4 if on_gpu and config.train.packing and lean and not layers_again else 1


def needs_old_logprobs(config: Config, step: int) -> bool:
    """Whether the policy is scored before the update. In a step with one update its own logprobs are the old ones, exactly: the ratio is 1. Only a KL
    penalty in the reward needs them before; while the critic learns alone nothing else does."""
    algorithm = config.algorithm
    several = algorithm.epochs * algorithm.minibatches > 1
    return _penalised(config) or (several and step > algorithm.critic_warmup_steps)


def needs_reference(config: Config, step: int) -> bool:
    """Whether the reference scores: for a KL penalty in the reward, or in the loss of a step in which the actor learns."""
    return _penalised(config) or (config.uses_reference and step > config.algorithm.critic_warmup_steps)


def _penalised(config: Config) -> bool:
    return config.uses_reference and config.algorithm.kl.place == "reward"


def gather_rollout(local: Rollout, prompts: dict[int, Prompt], world: World) -> Rollout:
    """All ranks' rows, ordered by (draw, sample). `prompts`: draw -> prompt, known on every rank. (collective)"""
    window = local.rollout_logprobs.shape[1]
    meta = torch.stack([local.draw, local.sample, local.prompt_lengths, local.response_lengths, local.finished.long()], 1)
    meta = world.gather_rows(meta)
    input_ids = world.gather_rows(local.input_ids)
    logprobs = world.gather_rows(local.rollout_logprobs)
    keys = meta[:, :2].tolist()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    meta, input_ids, logprobs = meta[order], input_ids[order], logprobs[order, :window]
    return Rollout(
        prompts=[prompts[d] for d in meta[:, 0].tolist()],
        draw=meta[:, 0],
        sample=meta[:, 1],
        input_ids=input_ids,
        prompt_lengths=meta[:, 2],
        response_lengths=meta[:, 3],
        finished=meta[:, 4].bool(),
        rollout_logprobs=logprobs,
    )


def may_train(rollout: Rollout, algorithm: AlgorithmConfig) -> Tensor:
    """[B] bool: rows that train something if they have a score, all but those that were cut under `truncation: mask`. No others are scored."""
    return rollout.finished if algorithm.truncation == "mask" else torch.ones_like(rollout.finished)


def training_mask(rollout: Rollout, valid: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """[B, R] bool: response tokens of rows that have a score and `may_train`."""
    return rollout.response_mask & (valid & may_train(rollout, algorithm))[:, None]


def shared_pass(
    scorer: Scorer, rollout: Rollout, mask: Tensor, plan: Sequence[MicroBatchPlan], width: int, world: World, packing: bool = False
) -> Tensor:
    """[B, width] result of a model pass over all rows, each rank running its plan. (collective)

    With packed rows nothing in the loop waits for the device: it computes a forward while the next is made."""
    results = []
    for part in plan:
        batch = collate(rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths, mask, part, packing=packing).to(world.device)
        results.append((part, scorer(batch)))
    return gather_results(results, len(rollout), width, world)


def gather_results(results: Sequence[tuple[MicroBatchPlan, Tensor]], rows: int, width: int, world: World) -> Tensor:
    """[rows, width] from what every rank has of its forwards, [b, <= width] each; 0 for rows that nobody has. (collective)"""
    kept = [(part, result) for part, result in results if not part.weightless]
    padded = [torch.nn.functional.pad(result.float().cpu(), (0, width - result.shape[1])) for _, result in kept]
    return world.gather_indexed([row for part, _ in kept for row in part.rows], torch.cat([torch.zeros(0, width), *padded]), rows)


def make_experience(
    rollout: Rollout,
    scored: Callable[[], Scores],
    passes: ExperiencePasses,
    plan: Sequence[MicroBatchPlan],
    algorithm: AlgorithmConfig,
    kl_coef: float,
    world: World,
    progress: Progress | None = None,
) -> Experience:
    """Everything the update needs. (collective)

    `plan` should be the first epoch's update plan: then old logprobs and the update's first logprobs come from the same forwards and
    are the same bits in float32 (trap 2). Without a pass for old logprobs, they are left to the update (`needs_old_logprobs`).
    `scored` waits for the scores; it is called once reference and critic have passed, which need none: slow scorers go on meanwhile. (collective)
    """
    progress = progress or Progress()
    mask = training_mask(rollout, torch.ones(len(rollout), dtype=torch.bool), algorithm)
    window = mask.shape[1]

    def over_all_rows(name: str, scorer: Scorer | None, width: int, together: int = 1) -> Tensor | None:  # (collective)
        if scorer is None:
            return None

        def passed() -> dict[str, Tensor]:  # (collective)
            with passes.timed(name):
                return {"all": shared_pass(scorer, rollout, mask, merged(plan, together), width, world, passes.packing)}

        return progress.once(name, passed)["all"]

    ref = over_all_rows("ref", passes.ref_logprobs, window, passes.together)
    values = over_all_rows("values", passes.values, window + 1, passes.together)
    scores = Scores.of(progress.once("scores", lambda: scored().tensors()))
    mask = training_mask(rollout, scores.valid, algorithm)
    old = over_all_rows("old_log_prob", passes.old_logprobs, window)  # under the update's own mask (trap 2)
    rewards = token_rewards(rollout, scores, mask, algorithm.truncation)
    if ref is not None and algorithm.kl.place == "reward":
        assert old is not None
        rewards = rewards - kl_coef * torch.where(mask, k1(old, ref), torch.zeros_like(old))
    result = ADVANTAGES[algorithm.advantage](
        AdvantageInput(
            rewards=rewards,
            mask=mask,
            group=rollout.draw,
            valid=mask.any(1),
            values=values,
            bootstrap=~rollout.finished if algorithm.truncation == "bootstrap" else torch.zeros_like(rollout.finished),
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            group_scale=algorithm.group_scale,
            whiten=algorithm.whiten_advantages,
        )
    )
    return Experience(rollout, scores, mask, old, ref, values, rewards, result.advantages, result.returns)


def token_rewards(rollout: Rollout, scores: Scores, mask: Tensor, truncation: str) -> Tensor:
    """[B, R]: the score on the last response token (trap 4), nothing elsewhere. Under `truncation: bootstrap` a cut response gets no
    score there: the value after its last token already stands for what would follow (trap 13)."""
    rewards = torch.zeros(mask.shape)
    outcome = torch.where(rollout.finished, scores.total, torch.zeros_like(scores.total)) if truncation == "bootstrap" else scores.total
    rewards[torch.arange(len(rollout)), rollout.response_lengths - 1] = outcome
    return torch.where(mask, rewards, torch.zeros_like(rewards))


def kl_per_response(experience: Experience) -> float:
    """Mean over trained responses of the summed k1 estimate, in nats."""
    assert experience.old_logprobs is not None and experience.ref_logprobs is not None
    total = masked_sum(k1(experience.old_logprobs, experience.ref_logprobs), experience.mask)
    return float(total / experience.mask.any(1).sum().clamp(min=1))
