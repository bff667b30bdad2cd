"""Advantage estimators. Each takes an `AdvantageInput` of a whole rollout batch (all ranks) and gives per-token advantages.

To add one: a function here, an entry in ADVANTAGES, its name in `AlgorithmConfig.advantage`, a test with numbers worked out by hand,
a row in docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.ops.masking import masked_whiten


@dataclass(frozen=True)
class AdvantageInput:
    rewards: Tensor  # [B, R] float32 per token
    mask: Tensor  # [B, R] bool: response tokens that count; observation tokens between them are False
    group: Tensor  # [B] int64: rows of one prompt share a number
    valid: Tensor  # [B] bool: rows that have a score
    values: Tensor | None  # [B, R + 1] float32
    bootstrap: Tensor  # [B] bool: the response was cut; the value after its last token stands for what would follow
    gamma: float
    gae_lambda: float
    group_scale: str
    whiten: bool


@dataclass(frozen=True)
class Advantages:
    advantages: Tensor  # [B, R] float32, 0 outside the mask
    returns: Tensor | None  # [B, R] float32: what the critic should say; None without a critic


def gae(x: AdvantageInput) -> Advantages:
    """Generalised advantage estimation, Schulman et al. 2015, arXiv:1506.02438, eqs. 11-16.

    Tokens outside the mask (padding, tool output) are stepped over: what follows is carried to the last response token
    before them, undiscounted (trap 12). Returns are advantages (before whitening) + values.
    """
    if x.values is None:
        raise ValueError("gae needs values")
    rows, window = x.rewards.shape
    last = torch.zeros(rows)
    lengths = _last_kept(x.mask) + 1
    after_end = x.values.gather(1, lengths[:, None]).squeeze(1)
    next_value = torch.where(x.bootstrap, after_end, torch.zeros(rows))
    advantages = torch.zeros_like(x.rewards)
    for t in range(window - 1, -1, -1):
        keep = x.mask[:, t]
        delta = x.rewards[:, t] + x.gamma * next_value - x.values[:, t]
        last = torch.where(keep, delta + x.gamma * x.gae_lambda * last, last)
        next_value = torch.where(keep, x.values[:, t], next_value)
        advantages[:, t] = torch.where(keep, last, torch.zeros(rows))
    returns = torch.where(x.mask, advantages + x.values[:, :-1], torch.zeros_like(advantages))
    return Advantages(masked_whiten(advantages, x.mask) if x.whiten else advantages, returns)


def group(x: AdvantageInput) -> Advantages:
    """Group-relative advantage, GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; `group_scale="none"`: Dr. GRPO, arXiv:2503.20783.

    Statistics are exact per group, over the rows that have a score, however many there are. A group without variance (one of a
    single row too) has advantage exactly 0, not noise / eps (traps 10, 11). The standard deviation is the sample's (n - 1).
    """
    score = torch.where(x.mask, x.rewards, torch.zeros_like(x.rewards)).sum(1)
    row_advantage = group_relative(score, x.group, x.valid, x.group_scale)
    advantages = torch.where(x.mask, row_advantage[:, None], torch.zeros_like(x.rewards))
    return Advantages(masked_whiten(advantages, x.mask) if x.whiten else advantages, None)


def group_relative(score: Float[Tensor, " b"], groups: Int[Tensor, " b"], valid: Bool[Tensor, " b"], scale: str) -> Float[Tensor, " b"]:
    """(score - mean of its group) / std of its group (scale "std") or undivided ("none"); 0 for rows that are not valid."""
    result = torch.zeros_like(score)
    for g in torch.unique(groups[valid]).tolist():
        rows = (groups == g) & valid
        inside = score[rows]
        if bool(inside.max() == inside.min()):
            continue
        centred = inside - inside.mean()
        result[rows] = centred / inside.std() if scale == "std" else centred
    return result


def _last_kept(mask: Bool[Tensor, "b r"]) -> Int[Tensor, " b"]:
    """Index of the last True of each row, -1 where there is none."""
    positions = torch.arange(1, mask.shape[1] + 1)
    return (mask * positions).amax(1) - 1 if mask.shape[1] else torch.full((mask.shape[0],), -1)


ADVANTAGES: dict[str, Callable[[AdvantageInput], Advantages]] = {"gae": gae, "group": group}
