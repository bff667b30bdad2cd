"""Losses per token, and their sums. A loss is a sum; what it is a mean over is counted over the whole optimizer step by the caller (trap 5).

To add a policy loss: a function here, an entry in POLICY_LOSSES, its name in `AlgorithmConfig.policy_loss`, a test with numbers worked
out by hand, a row in docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.ops.masking import masked_sum

Metrics = dict[str, Tensor]


def clipped_surrogate(
    logprobs: Float[Tensor, "b r"],
    old_logprobs: Float[Tensor, "b r"],
    advantages: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    clip_eps_low: float,
    clip_eps_high: float,
) -> tuple[Float[Tensor, "b r"], Metrics]:
    """PPO's clipped surrogate, Schulman et al. 2017, arXiv:1707.06347, eq. 7, with separate clips (DAPO, arXiv:2503.14476, eq. 10).

    Returns the loss per token (0 outside the mask) and sums of metrics over the mask.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
    loss = torch.where(mask, torch.maximum(plain, clipped), torch.zeros_like(plain))
    with torch.no_grad():
        metrics = {
            "actor/ppo_kl": masked_sum(-log_ratio, mask),
            "actor/pg_clipfrac": masked_sum((clipped > plain).float(), mask),
            "actor/ratio": masked_sum(ratio, mask),
        }
    return loss, metrics


def value_loss(
    values: Float[Tensor, "b r"],
    old_values: Float[Tensor, "b r"],
    returns: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    value_clip: float | None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Half squared error, clipped around the rollout's values (trap 7): max of both errors, as PPO2 in baselines does. Sum over the mask."""
    error = (values - returns) ** 2
    clipfrac = torch.zeros_like(error)
    if value_clip is not None:
        near = old_values + torch.clamp(values - old_values, -value_clip, value_clip)
        clipped = (near - returns) ** 2
        clipfrac = (clipped > error).float()
        error = torch.maximum(error, clipped)
    loss = 0.5 * masked_sum(error, mask)
    metrics = {"critic/vf_loss": loss.detach(), "critic/vf_clipfrac": masked_sum(clipfrac, mask)}
    return loss, metrics


def preference_loss(chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], weight: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Sum of weight * -log sigmoid(chosen - rejected): Bradley-Terry, as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1."""
    return (-F.logsigmoid(chosen - rejected) * weight).sum()


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {"clip": clipped_surrogate}
