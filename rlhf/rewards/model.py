"""A trained reward model as a reward: the scalar at the last token, centred and scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf.batching import MicroBatchPlan, pack, plan_micro_batches
from rlhf.config import TrainConfig
from rlhf.distributed import World
from rlhf.models.forward import Forward, last_token_scores
from rlhf.types import Rollout


class RewardModel:
    """(score at the last token - mean) / std; mean and std come with the model's folder (`models.loading.score_statistics`).
    train: with the budget of a forward as it is by then. release: called when a rollout has been scored (`FrozenEngine.release`)."""

    def __init__(
        self, forward: Forward, mean: float, std: float, train: Callable[[], TrainConfig], world: World, release: Callable[[], None] = lambda: None
    ) -> None:
        self.forward, self.mean, self.std, self.train, self.world, self.release = forward, mean, std, train, world, release

    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32 for all rows of the rollout, each rank computing its share. (collective)"""
        lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
        train, world = self.train(), self.world
        plan = plan_micro_batches(range(len(rollout)), lengths, train.micro_batch, world.size, world.rank, train.forward_tokens)
        own = self._share(rollout, plan, lengths)
        self.release()
        return self.world.gather_indexed(*own, len(rollout)).squeeze(1)

    @torch.no_grad()
    def _share(self, rollout: Rollout, plan: Sequence[MicroBatchPlan], lengths: list[int]) -> tuple[list[int], Tensor]:
        rows: list[int] = []
        scores: list[Tensor] = []
        for part in plan:
            own = [lengths[r] for r in part.rows]
            ids = rollout.input_ids[part.rows, : max(own)].to(self.world.device)
            packed = pack(own).to(ids.device) if self.train().packing else None
            result = last_token_scores(self.forward, ids, torch.tensor(own, device=ids.device), packed)
            if not part.weightless:
                rows += part.rows
                scores.append(((result - self.mean) / self.std).cpu())
        return rows, torch.cat(scores)[:, None] if scores else torch.zeros(0, 1)
