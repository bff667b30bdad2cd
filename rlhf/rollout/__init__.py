"""Generation inside the training program, on the training weights."""

from rlhf.rollout.engine import HybridEngine

__all__ = ["HybridEngine"]
