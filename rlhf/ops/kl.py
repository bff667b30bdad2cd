"""Estimators of KL(policy || reference) per token, and the controllers of its coefficient.

Estimators: Schulman 2020, http://joschu.net/blog/kl-approx.html. Where each may be used is decided in `rlhf.config.KLConfig`: in
the reward the gradient flows through the score function, so only k1 points along the gradient of the KL; in the loss it flows
through the estimator, where k2 is exact on policy and k3 needs the importance ratio (trap 19).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log p - log q: unbiased, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(log p - log q)^2 / 2: biased as a value; on policy its gradient is the gradient of the KL."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """q/p - 1 - log(q/p): unbiased and non-negative as a value; its gradient is that of the forward KL (GRPO's penalty, arXiv:2402.03300 eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


LOSS_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}


def kl_loss(
    estimator: str, logprobs: Float[Tensor, "..."], old_logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Per-token KL term for the loss. `k3_corrected` = ratio * k3: the expectation under the current policy of an unbiased
    estimator, so that its gradient is the gradient of the KL off policy too (DeepSeek-V3.2, arXiv:2512.02556, "Unbiased KL Estimate")."""
    if estimator == "k3_corrected":
        return torch.exp(logprobs - old_logprobs) * k3(logprobs, ref_logprobs)
    return LOSS_ESTIMATORS[estimator](logprobs, ref_logprobs)


@dataclass
class KLController:
    """kl_coef over the run. Adaptive: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; fixed where `adaptive` is False."""

    coef: float
    adaptive: bool = False
    target: float = 6.0
    horizon: int = 10_000

    def update(self, kl_per_response: float, responses: int) -> None:
        """Multiply the coefficient by 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon."""
        if self.adaptive:
            error = max(-0.2, min(0.2, kl_per_response / self.target - 1))
            self.coef *= 1 + error * responses / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = float(state["coef"])
