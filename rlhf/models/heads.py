"""A scalar per token on a transformer body: the critic and the reward model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ScalarHead(nn.Linear):
    """A head that computes in float32 whatever its weight is: bfloat16 would leave eight bits of a score."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


class ScalarModel(nn.Module):
    """Body + bias-free linear head, read at every token.

    The names are those of transformers' `...ForSequenceClassification` (`<prefix>.*`, `score.weight`), so a saved folder loads there.
    """

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body_name: str = getattr(body, "base_model_prefix", "") or "model"
        self.base_model_prefix = self.body_name  # peft asks, for families whose weights transformers converts (experts)
        self.add_module(self.body_name, body)
        self.score = ScalarHead(hidden_size, 1, bias=False, dtype=next(body.parameters()).dtype)
        self.config = body.config
        self.mean, self.std = 0.0, 1.0

    def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
        """[b, t] token ids -> [b, t] float32: (head - mean) / std, which are 0 and 1 unless `centre` was called."""
        hidden = getattr(self, self.body_name)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs).last_hidden_state
        scores: Tensor = self.score(hidden).squeeze(-1)
        return (scores - self.mean) / self.std

    def centre(self, mean: float, std: float) -> None:
        """For a critic that keeps a reward model's head: its values must be in the units that the rewards are in."""
        self.mean, self.std = mean, std

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        getattr(self, self.body_name).gradient_checkpointing_enable(**kwargs)

    def enable_input_require_grads(self) -> None:
        getattr(self, self.body_name).enable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = getattr(self, self.body_name).get_input_embeddings()
        return embeddings


def zero_(head: nn.Linear) -> None:
    """A critic starts by saying 0 everywhere (trap 15)."""
    with torch.no_grad():
        head.weight.zero_()
