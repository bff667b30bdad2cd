"""Generation inside the training program, on the training weights."""

from rlhf.rollout.engine import EngineSettings, HybridEngine

__all__ = ["EngineSettings", "HybridEngine"]
