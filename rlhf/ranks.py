"""What ranks tell each other once a step: how long each was busy, so that slow ones are named, and what must be the same on all of them."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from rlhf.config import own_names
from rlhf.distributed import World
from rlhf.secrets import masked

SLOW = 1.5  # times as long as the median of the other ranks
SLOW_STEPS = 3  # in a row, until it is said
FEW_BEATS = 4  # on any rank, and a rollout is mostly its start, which is no rank's pace (two GPUs took turns to be "3.4 times" as slow)
SLOW_COST = 0.05  # of a step's time that it must cost, or nobody needs to know

Busy = Mapping[str, tuple[float, int]]  # phase -> (seconds, beats)


class Pace:
    """The seconds of each phase of a step that this rank did not wait for others in, and the beats (forwards, blocks of decode steps) it made.

    In an update every rank takes as long as the slowest. On CPU the waits in collectives are known; on a GPU the device waits in them and the host
    knows nothing of it, so there the time of the same product on every rank's GPU is compared in the place of updates (phase `device`).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._busy: dict[str, tuple[float, int]] = {}
        self._slow: dict[tuple[str, int], int] = defaultdict(int)
        self._start = self._now()
        self._product: list[torch.cuda.Event] = []

    def _now(self) -> tuple[float, int]:
        return time.perf_counter() - self._world.waited, self._world.watchdog.beats

    def begin(self, phase: str) -> None:
        self._start = self._now()

    def end(self, phase: str) -> None:
        """A phase that is entered again adds up."""
        (now, beats), (start, before), (seconds, count) = self._now(), self._start, self._busy.get(phase, (0.0, 0))
        self._busy[phase] = seconds + now - start, count + beats - before

    def take(self) -> Busy:
        """Of this rank since the last call."""
        busy, self._busy = self._busy, {}
        if self._world.device.type == "cuda":
            if self._product:
                begin, end = self._product
                end.synchronize()  # of a step ago
                busy["device"] = begin.elapsed_time(end) / 1000, 1
            self._product = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            factor = torch.ones(3072, 3072, dtype=torch.bfloat16, device=self._world.device)
            self._product[0].record()
            for _ in range(8):
                torch.mm(factor, factor)
            self._product[1].record()
        return busy

    def compare(self, told: Sequence[Busy], step_seconds: float) -> tuple[dict[str, float], list[str]]:
        """(metrics, what to say) of all ranks' rollouts, and their updates or devices.

        A beat is as much work on every rank, while in a rollout the ranks have different numbers of them.
        """
        metrics: dict[str, float] = {}
        remarks: list[str] = []
        compared = ("gen", "device") if self._world.device.type == "cuda" else ("gen", "update_")
        for phase in (p for p in told[0] if p.startswith(compared) and len(told) > 1 and all(p in busy for busy in told)):
            paces = [seconds / max(1, beats) for seconds, beats in (busy[phase] for busy in told)]
            ratios = [pace / max(1e-9, statistics.median(paces[:r] + paces[r + 1 :])) for r, pace in enumerate(paces)]
            slowest = max(range(len(told)), key=ratios.__getitem__)
            short = phase == "gen" and min(busy[phase][1] for busy in told) < FEW_BEATS
            metrics |= {f"perf/straggler/{phase}/rank": float(slowest), f"perf/straggler/{phase}/ratio": ratios[slowest]}
            for rank, ratio in enumerate(ratios):
                lost = told[rank][phase][0] * (1 - 1 / max(1.0, ratio))
                slow = ratio >= SLOW and not short and (phase == "device" or lost >= SLOW_COST * step_seconds)
                self._slow[phase, rank] = self._slow[phase, rank] + 1 if slow else 0
                if self._slow[phase, rank] == SLOW_STEPS:
                    remarks.append(
                        f"rank {rank} ({self._world.processes[rank]}) is slow: {'its GPU takes' if phase == 'device' else f'in phase {phase}'} "
                        f"{ratio:.1f} times as long as the other ranks, {SLOW_STEPS} steps in a row"
                    )
        return metrics, remarks


def config_items(config: BaseModel) -> dict[str, Any]:
    """Every key of a config with its value, but for paths, which may be others on another node; secrets are `***`."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{key}.{name}")
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                walk(part, f"{key}.{i}")
        elif not isinstance(value, Path):
            found[key] = value

    walk(masked(config.model_dump(), own_names()), "config")
    return found


def check_agreement(items: Mapping[str, Any], when: str, world: World) -> None:
    """Raises RuntimeError on all ranks that names who has another value of what, where `items` are not the same on all. (collective)"""
    digest = hashlib.sha256(json.dumps(items, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(world.gather_objects(digest))) == 1:  # (collective)
        return
    told = world.gather_objects(dict(items))  # (collective)
    different = [name for name in sorted({name for t in told for name in t}) if len({repr(t.get(name)) for t in told}) > 1]
    shown = "; ".join(_difference(name, [t.get(name) for t in told], world) for name in different[:5])
    more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
    raise RuntimeError(f"the ranks are not in the same state {when}: {shown}{more}")


def _difference(name: str, values: Sequence[Any], world: World) -> str:
    """Who has another value than most; without a majority everybody's."""
    value, count = Counter(map(repr, values)).most_common(1)[0]
    if 2 * count > len(values):
        odd = [r for r, v in enumerate(values) if repr(v) != value]
        others = ", ".join(f"{values[r]!r} on rank {r} ({world.processes[r]})" for r in odd[:5])
        return f"{name} is {others}{f' and {len(odd) - 5} more' if len(odd) > 5 else ''}, {value} on the other {count}"
    return f"{name} is " + ", ".join(f"{v!r} on rank {r} ({world.processes[r]})" for r, v in list(enumerate(values))[:5])
