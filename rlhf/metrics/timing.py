"""Seconds, tokens and model operations of each phase of a step, under verl's metric names."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Names of the monitoring articles that users know, beside verl's: alias -> (metric, factor).
_ALIASES = {"reward/latency_ms": ("timing_s/reward", 1000.0), "train/step_time_ms": ("timing_s/step", 1000.0)}


class PhaseTimer:
    """Measures what runs inside `phase(...)` since `start_step()`; a phase that is entered again adds up.

    `synchronize` waits for the device at both ends of a phase (`torch.cuda.synchronize`, None on CPU): kernels run on after their
    launch returns, and without it their seconds are booked on a later phase. `on_phase` hears the name of each phase that begins, `on_end` of
    each that ends. `latest`: the phase (or `part`) that is on, or was; `step`: its step.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        on_phase: Callable[[str], None] | None = None,
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._on_phase = on_phase or (lambda name: None)
        self._on_end = on_end or (lambda name: None)
        self.latest = "set-up"
        self.start_step()

    def start_step(self, step: int = 0) -> None:
        """Forget the last step and start the clock of this one."""
        self.step = step
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)
        self._flops: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, tokens: int = 0, flops: float = 0.0) -> Iterator[None]:
        """Time a block. Nothing is recorded when it raises: the device may be unusable then, and waiting for it could hide the error."""
        self.latest = name
        self._on_phase(name)
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[name] += time.perf_counter() - start
        self._on_end(name)
        self.add(name, tokens, flops)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is booked on the phase that is on, but is called `name` where it fails."""
        outer, self.latest = self.latest, name
        yield
        self.latest = outer

    def add(self, name: str, tokens: int = 0, flops: float = 0.0) -> None:
        """Book tokens and model operations that are known only after the phase."""
        self._tokens[name] += tokens
        self._flops[name] += flops

    def metrics(self, peak_flops: float | None = None, *, step_tokens: int | None = None, actor_memory_mb: float | None = None) -> dict[str, float]:
        """The step so far, of this rank.

        peak_flops: FLOP/s of the device, for MFU. step_tokens: prompt and response tokens of the step on this rank, each counted once,
        for `perf/throughput`. The tokens of phase `gen` are response tokens. actor_memory_mb: peak memory of the device.
        """
        metrics = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
        step = metrics["timing_s/step"] = time.perf_counter() - self._start
        metrics.update({f"tokens/{name}": float(count) for name, count in self._tokens.items() if count})
        for name, flops in self._flops.items():
            if flops:
                metrics[f"model_flops/{name}"] = flops
                if peak_flops and self._seconds[name]:
                    metrics[f"perf/mfu/{name}"] = flops / self._seconds[name] / peak_flops
        if step_tokens is not None:
            metrics["perf/throughput"] = step_tokens / step
        if self._tokens["gen"] and self._seconds["gen"]:
            metrics["rollout/throughput_tokens_per_sec"] = self._tokens["gen"] / self._seconds["gen"]
        metrics.update({alias: metrics[name] * factor for alias, (name, factor) in _ALIASES.items() if name in metrics})
        if actor_memory_mb is not None:
            metrics["memory/actor_gpu_mem_mb"] = actor_memory_mb
        return metrics
