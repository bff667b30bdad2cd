"""Reductions over masked tensors. A mask is bool, True = keep."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Sum of x where mask; what stands elsewhere (NaN too) has no influence."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean of x where mask; 0 where nothing is kept."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Population variance of x where mask."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x shifted and scaled to mean 0 and variance 1 over the mask; 0 outside it. Constant input gives exactly 0, not noise / eps."""
    kept = x[mask]
    if kept.numel() == 0 or bool(kept.max() == kept.min()):
        return torch.zeros_like(x)
    centred = x - masked_mean(x, mask)
    return torch.where(mask, centred * torch.rsqrt(masked_variance(x, mask)), torch.zeros_like(x))


def explained_variance(values: Float[Tensor, "..."], returns: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> float:
    """1 - Var(returns - values) / Var(returns); 0 for a critic that says a constant, NaN where the returns do not vary."""
    total = masked_variance(returns, mask)
    return float("nan") if total == 0 else float(1 - masked_variance(returns - values, mask) / total)
