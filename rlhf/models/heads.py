"""A scalar per token on a transformer body: the critic and the reward model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ScalarModel(nn.Module):
    """Body + bias-free linear head, read at every token.

    The names are those of transformers' `...ForSequenceClassification` (`<prefix>.*`, `score.weight`), so a saved folder loads there.
    """

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body_name: str = getattr(body, "base_model_prefix", "") or "model"
        self.add_module(self.body_name, body)
        self.score = nn.Linear(hidden_size, 1, bias=False, dtype=next(body.parameters()).dtype)
        self.config = body.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
        """[b, t] token ids -> [b, t] float32."""
        hidden = getattr(self, self.body_name)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs).last_hidden_state
        scores: Tensor = self.score(hidden).squeeze(-1).float()
        return scores

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
