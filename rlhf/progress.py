"""What a step has finished so far: with it, another process goes on inside of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.distributed import World
from rlhf.state import TensorFile

PROGRESS = "step.safetensors"
Result = dict[str, Tensor]


class Accumulator(Protocol):
    """Numbers that are collected over several turns. What is called "sum/..." every rank has of its own, and only the sum over ranks counts; all else
    is the same on every rank."""

    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class Progress:
    """Results by name, the same on every rank, and turns (optimizer steps) by number, in the order in which they are finished.

    boundary: called after each, by all ranks together; it may save this, and may end the process. kept: `collected` of an earlier process."""

    def __init__(
        self, boundary: Callable[[Progress], None] = lambda progress: None, kept: Mapping[str, Tensor] | None = None, world: World | None = None
    ) -> None:
        self._boundary, self._world = boundary, world
        self._results: dict[str, Result] = {}
        self._turns, self._turn = 0, 0  # finished; seen by `take_turn`
        self._accumulator: Accumulator | None = None
        self._sums: list[dict[str, float]] = []  # of every rank, of the earlier process
        for key, tensor in (kept or {}).items():
            kind, name, part = key.split("\n")
            if kind == "result":
                self._results.setdefault(name, {})[part] = tensor
            elif kind == "turns":
                self._turns = int(tensor)
            else:
                rank = int(name)
                self._sums += [{} for _ in range(rank + 1 - len(self._sums))]
                self._sums[rank][part] = float(tensor)

    @property
    def part(self) -> int:
        """How much is finished; grows by one with each."""
        return len(self._results) + self._turns

    def once(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result, computed unless an earlier process has. (collective, as `compute` and the boundary are)"""
        if name not in self._results:
            self._results[name] = compute()
            self._boundary(self)
        return self._results[name]

    def keep(self, name: str, result: Result) -> None:
        """A result that is finished with the turn that is under way."""
        self._results[name] = result

    def kept(self, name: str) -> Result | None:
        return self._results.get(name)

    def accumulate(self, into: Accumulator) -> None:
        """What `into` has collected belongs to the turns; it gets what the earlier process had."""
        self._accumulator = into
        if not self._sums:
            return
        world = self._world or World(0, 1, 0, 1, torch.device("cpu"))
        if len(self._sums) == world.size:
            into.load_state_dict(self._sums[world.rank])
        else:
            whole = {key: sum(sums[key] for sums in self._sums) * world.is_main for key in self._sums[0] if key.startswith("sum/")}
            into.load_state_dict({**self._sums[0], **whole})

    def take_turn(self) -> bool:
        """Whether the next turn is still to be done."""
        self._turn += 1
        return self._turn > self._turns

    def end_turn(self) -> None:
        """(collective, as the boundary is)"""
        self._turns += 1
        self._boundary(self)

    def collected(self, world: World) -> TensorFile:
        """All of it. (collective)"""
        tensors = {f"result\n{name}\n{part}": t for name, result in self._results.items() for part, t in result.items()}
        tensors["turns\n\n"] = torch.tensor(self._turns)
        own: dict[str, Any] = self._accumulator.state_dict() if self._accumulator else {}
        for rank, sums in enumerate(world.gather_objects(own)):  # (collective)
            tensors |= {f"sum\n{rank}\n{key}": torch.tensor(value, dtype=torch.float64) for key, value in sums.items()}
        return TensorFile(PROGRESS, tensors, {})
