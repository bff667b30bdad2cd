"""Which rows come next: a function of (size, seed, position) only, so ranks agree and a resumed run goes on where it stopped."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draw(NamedTuple):
    """`draw` counts all draws of the run and keys the sampling noise; `row` is the index in the dataset."""

    draw: int
    row: int


class DrawSampler:
    """Endless passes over `size` rows, each pass in a new order decided by (seed, epoch), or in file order."""

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise ValueError(f"a sampler over {size} rows; at least 1 is needed")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0  # draws made so far
        self._epoch = -1
        self._order: NDArray[np.int64] = np.arange(size)

    def next(self, k: int) -> list[Draw]:
        """The next k draws; a batch may run over the end of an epoch into the next one."""
        draws = [Draw(draw, self._row(draw)) for draw in range(self.position, self.position + k)]
        self.position += k
        return draws

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draws go on counting; over other rows than the state was saved over, in the order of these."""
        self.position = int(state["position"])

    def _row(self, draw: int) -> int:
        epoch, offset = divmod(draw, self.size)
        if self.shuffle and epoch != self._epoch:
            # Sorting raw bits instead of Generator.permutation: numpy promises the bits for all versions, the permutation not.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(self.size)
            self._order, self._epoch = np.argsort(bits, kind="stable"), epoch
        return int(self._order[offset])
