"""The weighted sum of all rewards, with what failed counted and left out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import RewardConfig
from rlhf.distributed import World
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import RewardModel
from rlhf.types import Rollout, Scores

Scorer = FunctionReward | RewardModel


def score_with_function(function: FunctionReward, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, world: World) -> tuple[Tensor, Counter[str]]:
    """([B] float32 with NaN where a sample is lost, reason -> number lost), each rank scoring its share of the rows. (collective)"""
    rows = list(range(world.rank, len(rollout), world.size))
    prompts = [rollout.prompts[r] for r in rows]
    ids = [rollout.response_ids(r) for r in rows]
    names = sorted({name for p in prompts for name in p.columns})
    columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in names}
    columns.setdefault("source", [p.source for p in prompts])
    completions = tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of nothing it makes one empty text
    scores, failures = function.score([p.text for p in prompts], completions, ids, columns)
    values = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float32)
    total = world.gather_indexed(rows, values[:, None], len(rollout)).squeeze(1)
    return total, sum(world.gather_objects(failures), Counter())


class Rewards:
    """`score(rollout)` over all components, in the recipe's order."""

    def __init__(self, config: RewardConfig, scorers: list[Scorer], tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        self.config, self.scorers, self.tokenizer, self.world = config, scorers, tokenizer, world

    def score(self, rollout: Rollout) -> Scores:
        """Weighted sum of clipped components, clipped, less the penalty for responses that never ended.

        A row is invalid as soon as one component with a weight has no score for it. (collective)
        """
        total = torch.zeros(len(rollout))
        valid = torch.ones(len(rollout), dtype=torch.bool)
        components: dict[str, Tensor] = {}
        failures: Counter[str] = Counter()
        for component, scorer in zip(self.config.components, self.scorers, strict=True):
            if isinstance(scorer, RewardModel):
                values = scorer.score(rollout)
            else:
                values, lost = score_with_function(scorer, rollout, self.tokenizer, self.world)
                failures.update({f"{component.label}/{reason}": n for reason, n in lost.items()})
            if component.clip is not None:
                values = values.clamp(-component.clip, component.clip)
            components[component.label] = values
            if component.weight:
                valid &= values.isfinite()
                total += component.weight * values
        if self.config.clip is not None:
            total = total.clamp(-self.config.clip, self.config.clip)
        total = total - self.config.missing_eos_penalty * (~rollout.finished).float()
        return Scores(torch.where(valid, total, torch.zeros_like(total)), valid, components, dict(failures))
