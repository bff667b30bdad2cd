"""The order of copies and steps on a GPU's streams, without a GPU: every access to memory is noted with the stream that makes it, and two that touch
the same bytes, one of them writing, must be ordered by an event (vector clocks, as race detectors have them)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf import offload
from rlhf.offload import OffloadedStates, Parked

Clock = dict[int, int]  # stream: its last operation that is known to be over


def join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


class Device:
    """In the place of torch.cuda: streams that run at once, and remember what waits for what."""

    def __init__(self, deaf: str = "") -> None:
        self.streams: list[FakeStream] = []
        self.deaf = deaf  # the way of waiting that does nothing
        self.current = FakeStream(self)

    def Stream(self) -> FakeStream:
        return FakeStream(self)

    def current_stream(self) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def wait(self, clock: Clock) -> None:
        """The host has waited: whatever follows, follows on."""
        for stream in self.streams:
            join(stream.clock, clock)

    def synchronize(self) -> None:
        if self.deaf != "synchronize":
            for stream in list(self.streams):
                self.wait(stream.clock)


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.device, self.clock = stream.device, dict(stream.clock)

    def synchronize(self) -> None:
        if self.device.deaf != "host":
            self.device.wait(self.clock)


class FakeStream:
    def __init__(self, device: Device) -> None:
        self.device, self.number = device, len(device.streams)
        self.clock: Clock = {self.number: 0}
        device.streams.append(self)

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)

    def wait_event(self, event: FakeEvent) -> None:
        if self.device.deaf != f"event {self.number}":
            join(self.clock, event.clock)

    def wait_stream(self, other: FakeStream) -> None:
        if self.device.deaf != f"stream {other.number}":
            join(self.clock, other.clock)


class Races(TorchDispatchMode):
    """Every operation on tensors runs on the device's current stream."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.found = device, 0
        self.accesses: list[tuple[int, int, int, int, bool]] = []  # first byte, end, stream, time, whether it writes
        self.kept: list[Any] = []  # or an address might be given to another tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info is not None and s.alias_info.is_write]
        if not written and any(r.alias_info is not None for r in func._schema.returns):
            return result  # a view
        stream = self.device.current
        stream.clock[stream.number] += 1
        changed = [t for t in tree_leaves([written, result]) if isinstance(t, Tensor)]
        self.kept += changed
        for tensors, writes in ((tree_leaves([args, kwargs]), False), (changed, True)):
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.numel() and tensor.untyped_storage().nbytes():
                    self._access(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, stream, writes)
        return result

    def _access(self, first: int, end: int, stream: FakeStream, writes: bool) -> None:
        for a, b, other, time, wrote in self.accesses:
            if a < end and first < b and (writes or wrote) and stream.clock.get(other, 0) < time:
                self.found += 1
        self.accesses.append((first, end, stream.number, stream.clock[stream.number], writes))


def races_of_training(monkeypatch: pytest.MonkeyPatch, deaf: str, sizes: tuple[int, ...]) -> int:
    """Three steps of groups in parts of 4, with what DeepSpeed does around them, and a checkpoint."""
    device = Device(deaf)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(offload, "PART", 4)
    masters = [torch.randn(n, requires_grad=True) for n in sizes]
    weights = [m.detach().bfloat16() for m in masters]
    optimizer = torch.optim.AdamW([{"params": [m]} for m in masters], foreach=False)
    states = OffloadedStates(optimizer, list(zip(masters, weights, strict=True)), torch.device("cpu"))
    groups, held = optimizer.param_groups, []
    with Races(device) as races:
        for _ in range(3):
            states.begin()
            for group, master, own in zip(groups, masters, weights, strict=True):
                master.grad = torch.randn(master.numel())
                optimizer.param_groups = [group]
                optimizer.step()
                own.copy_(master.data)
                master.grad = None
            optimizer.param_groups = groups
            held += states._slots  # the allocator keeps what streams still use (`record_stream`); here nobody gets the memory
            states.finish()
        with states.at_hand():
            _ = [m.detach().clone() for m in masters]
    return races.found


@pytest.mark.parametrize("deaf", ["event 0", "event 1", "event 2", "stream 2", "synchronize"])
def test_every_wait_of_a_step_is_needed(monkeypatch: pytest.MonkeyPatch, deaf: str) -> None:
    """The detector sees what goes wrong when the device computes (0), copies in (1), copies back (2), begins or saves without waiting."""
    assert races_of_training(monkeypatch, deaf, (26, 9)) + races_of_training(monkeypatch, deaf, (7,)) > 0


@pytest.mark.parametrize("sizes", [(26, 9), (7,), (3, 1, 17)])
def test_nothing_is_touched_by_two_streams_at_once(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    assert races_of_training(monkeypatch, "", sizes) == 0


@pytest.mark.parametrize(("deaf", "safe"), [("", True), ("host", False), ("synchronize", False)])
def test_frozen_weights_are_there_for_every_stream(monkeypatch: pytest.MonkeyPatch, deaf: str, safe: bool) -> None:
    """Also for ZeRO-3's own, which gathers shards without waiting for the one that computes."""
    device = Device(deaf)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    weights, gathering = torch.randn(20), device.Stream()  # which nobody waits for, as for what it gathers ahead
    unread = 0
    with Races(device) as races:
        parked = Parked([weights], torch.device("cpu"))
        for _ in range(2):
            parked.fetch()
            parked.wait()
            with device.stream(gathering):
                _ = weights.clone()
            parked.release()
            # Whoever is given the memory now: the reading is over.
            unread += device.current.clock.get(gathering.number, 0) < gathering.clock[gathering.number]
    assert (races.found + unread == 0) == safe
