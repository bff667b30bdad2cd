"""What happens when a step's numbers cannot be right: the same on every rank, decided from numbers that are the same on every rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from rlhf.types import Experience

REMEMBERED = 64  # good steps that a baseline is made of
LEARNING = 8  # good steps before anything is compared with it
EXPLODED = 100.0  # times the largest value so far, and above the floor: not learning any more
UNUSUAL = 10.0  # times the median distance from the median: worth a line

# Metric -> what it may always be: groups of equal rewards have gradients of almost nothing, a KL starts at zero, rewards may be large and come late.
FLOORS = {
    "actor/grad_norm": 10.0,
    "critic/grad_norm": 100.0,
    "reward_model/grad_norm": 100.0,
    "actor/kl": 1.0,
    "actor/ppo_kl": 1.0,
    "actor/pg_loss": 1e4,
    "critic/vf_loss": 1e10,
    "critic/values/mean": 1e6,
    "critic/score/mean": 1e6,
    "train/loss": 20.0,
}
AT_FIRST = 1e6  # times the floor, while there is no baseline
ANY_SIZE = ("critic/values/mean", "critic/score/mean")  # in whatever rewards are counted: no limit at first; none where no sample was scored
SAID = ("actor/grad_norm", "critic/grad_norm", "reward_model/grad_norm", "actor/kl", "train/loss", "actor/entropy", "response_length/mean")
NOT_IN_EVERY_STEP = ("testing", "save_checkpoint")  # phases


class Action(Enum):
    GO_ON = "go on"
    SKIP = "skip"
    ROLL_BACK = "roll back"
    STOP = "stop"


def unusable(experience: Experience) -> str | None:
    """What of an experience is not finite where it would be learnt from."""
    e, mask = experience, experience.mask
    window = mask.shape[1]
    columns = {"old logprobs": e.old_logprobs, "reference logprobs": e.ref_logprobs, "values": e.values, "rewards": e.rewards}
    columns |= {"advantages": e.advantages, "returns": e.returns}
    for name, column in columns.items():
        if column is not None and (rows := int((~column[:, :window].isfinite() & mask).any(1).sum())):
            return f"{name} of {rows} of {len(mask)} samples are not finite"
    return None


class Guard:
    """Counts bad steps in a row: `allowed` are skipped, the next one leads back to the last good checkpoint. Used up once more before there have been
    as many good steps in a row, the run stops."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.bad = 0  # in a row
        self.rolled_back = False  # and not as many good steps since
        self.good = 0  # in a row
        self._seen: dict[str, list[float]] = {}
        self._seconds: list[float] = []  # of steps; no part of the state: another start may be on another machine

    def judge(self, problem: str | None, metrics: Mapping[str, float]) -> tuple[Action, str | None, list[str]]:
        """(what to do, why, what is unusual) after a step. problem: what is known to be wrong with it."""
        problem = problem or self._exploded(metrics)
        if problem is None:
            remarks = []
            for name in dict.fromkeys([*FLOORS, *SAID]):
                if name in metrics and math.isfinite(metrics[name]):
                    seen = self._seen.get(name, [])
                    remarks += _unusual(name, metrics[name], seen) if name in SAID else []
                    self._seen[name] = [*seen, metrics[name]][-REMEMBERED:]
            self.bad, self.good = 0, self.good + 1
            self.rolled_back = self.rolled_back and self.good < self.allowed
            return Action.GO_ON, None, remarks
        self.bad, self.good = self.bad + 1, 0
        if self.bad <= self.allowed:
            return Action.SKIP, problem, []
        self.bad = 0
        if self.rolled_back:
            return Action.STOP, problem, []
        self.rolled_back = True
        return Action.ROLL_BACK, problem, []

    def _exploded(self, metrics: Mapping[str, float]) -> str | None:
        for name, floor in FLOORS.items():
            value, seen = metrics.get(name), self._seen.get(name, [])
            if value is None:
                continue
            if not math.isfinite(value):
                if name in ANY_SIZE:
                    continue
                return f"{name} is {value}"
            if len(seen) < LEARNING and name not in ANY_SIZE and abs(value) > AT_FIRST * floor:
                return f"{name} is {value:.3g} in one of the first steps"
            if len(seen) >= LEARNING and abs(value) > max(floor, EXPLODED * max(map(abs, seen))):
                return f"{name} is {value:.3g}, and has never been above {max(map(abs, seen)):.3g}"
        return None

    def timed(self, metrics: Mapping[str, float]) -> list[str]:
        """What is unusual about a step's time, once that is known."""
        if "timing_s/step" not in metrics:
            return []
        seconds = metrics["timing_s/step"] - sum(metrics.get(f"timing_s/{phase}", 0.0) for phase in NOT_IN_EVERY_STEP)
        remarks = _unusual(f"timing_s/step without {' and '.join(NOT_IN_EVERY_STEP)}", seconds, self._seconds)
        self._seconds = [*self._seconds, seconds][-REMEMBERED:]
        return remarks

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad, "good": self.good, "rolled_back": self.rolled_back, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bad, self.good, self.rolled_back = state["bad"], state["good"], state["rolled_back"]
        self._seen = {name: list(values) for name, values in state["seen"].items()}


def _unusual(name: str, value: float, seen: Sequence[float]) -> list[str]:
    if len(seen) < LEARNING:
        return []
    middle = statistics.median(seen)
    spread = statistics.median(abs(other - middle) for other in seen)
    if abs(value - middle) <= max(UNUSUAL * spread, abs(middle) / 2):
        return []
    return [f"unusual: {name} is {value:.4g}, its median so far {middle:.4g}"]


def tensors_of(experience: Experience) -> dict[str, Tensor]:
    """To look at afterwards."""
    e = experience
    columns = {"old_logprobs": e.old_logprobs, "ref_logprobs": e.ref_logprobs, "values": e.values, "returns": e.returns}
    columns |= {"mask": e.mask, "rewards": e.rewards, "advantages": e.advantages, "scores": e.scores.total, "scores_valid": e.scores.valid}
    return {**e.rollout.tensors(), **{name: tensor.contiguous() for name, tensor in columns.items() if tensor is not None}}
