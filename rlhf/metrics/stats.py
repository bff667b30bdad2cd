"""Intervals for reported numbers: deterministic given the seed, numpy only. All return (estimate, low, high)."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(values: ArrayLike, seed: int, samples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of `values` [n] and its percentile bootstrap interval (Efron 1979). Raises ValueError when empty."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values has shape {array.shape}: an interval needs a non-empty list of numbers")
    generator = np.random.default_rng(seed)
    # One resample at a time: [samples, n] indices of a large evaluation set would not fit.
    means = [array[generator.integers(0, array.size, array.size)].mean() for _ in range(samples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(array.mean()), float(low), float(high)


def difference_interval(before: ArrayLike, after: ArrayLike, seed: int, samples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of `after - before` [n] on the same items, with its paired bootstrap interval."""
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"before has shape {first.shape}, after {second.shape}: a paired interval needs the same items in both")
    return bootstrap_interval(second - first, seed, samples, level)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """Share of successes and its score interval (Wilson 1927), which stays inside [0, 1] and is right at 0 and n too."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, max(0.0, float(centre - half)), min(1.0, float(centre + half))
