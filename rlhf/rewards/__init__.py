"""Scores of responses: functions, reward models, their weighted sum."""

from rlhf.rewards.compose import Rewards
from rlhf.rewards.functions import REWARD_FUNCTIONS, FunctionReward, resolve_function
from rlhf.rewards.model import RewardModel

__all__ = ["REWARD_FUNCTIONS", "FunctionReward", "RewardModel", "Rewards", "resolve_function"]
