"""Tensors that lie in pinned host memory while nobody computes with them.

`OffloadedStates`: an optimizer's master weights and moments, which pass over the device in parts while they are stepped. `Parked`: frozen weights,
which come for a phase and go. Knows torch only. On a CPU the same code runs: "host" is memory of its own, and copies are done at once.

The schedule of a step, parts k of all masters in a row, SLOTS places on the device: part k + AHEAD is copied in (one stream) while part k is stepped
(the caller's stream) and part k - 1 is copied back (another stream); a place is filled again once its part is back on the host. The host waits for
nothing. Each place has a part's master weights and moments.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_cuda: Any = torch.cuda
PART = 1 << 25  # elements of a part: 400 MB of master weights and two moments, 8 ms of PCIe 5.0
SLOTS = 4  # parts on the device at once; more than AHEAD
AHEAD = 2  # of them on their way in, beside the one that is stepped and the one on its way back


class HostMemory:
    """Tensors on the host, page-locked where the device is a GPU, until this object goes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked).atexit = False  # the end of the process unlocks too

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count]. RuntimeError where so much cannot be locked."""
        block = torch.empty(count, dtype=dtype)
        if self._device.type == "cuda" and count:
            # Not pin_memory=True: torch's own allocator rounds every size up to a power of two.
            code = int(_cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            if code:
                raise RuntimeError(
                    f"offload=true: {block.nbytes / 2**30:.1f} GiB of host memory cannot be page-locked (CUDA error {code}); "
                    "give the job more memory (or a higher `ulimit -l`), or set offload=false"
                )
            self._locked.append(block)
        return block


def _unlock(blocks: list[Tensor]) -> None:
    if blocks:
        torch.cuda.synchronize()  # nothing may still be copied from or to them
    for block in blocks:
        _cuda.cudart().cudaHostUnregister(block.data_ptr())


# --------------------------------------------------------------------------------------------------------------------------
# What is trained


@dataclass
class _Slot:
    """A place for one part on the device."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # [part] each
    arrived: Any = None  # event: its part has been copied in
    sent: Any = None  # event: its part is back on the host


class OffloadedStates:
    """Takes over `optimizer.step` and keeps the optimizer's states in host memory between steps.

    pairs: (master weights [n], the model's own flat weights [n]) of everything that is stepped, in the order in which it is. Where both are one
    memory (fp32 models under ZeRO-3) only the moments leave. The optimizer must treat every element alike (AdamW): a part is stepped as a parameter
    of its own. Masters stay the same objects: between steps their storage is empty, after being stepped and until `finish` they stand for the
    model's weights, which are up to date then. `optimizer.state` has the host's tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self.optimizer, self.device, self._size = optimizer, device, PART
        self._masters, self._weights = [m for m, _ in pairs], [w for _, w in pairs]
        self._host = HostMemory(device)
        self._api: Any = torch.get_device_module(device)
        self._in, self._out = self._api.Stream(), self._api.Stream()
        self._slots: list[_Slot] = []
        self._kept: list[Tensor | None] = []  # master weights on the host
        self._away: list[Tensor] = []  # what a master is between steps
        for master, weights in pairs:
            storage = master.untyped_storage()
            self._away.append(master.data)
            if storage.data_ptr() == weights.untyped_storage().data_ptr():
                self._kept.append(None)
                continue
            assert storage.nbytes() == master.nbytes, "master weights in a storage that holds more"
            self._kept.append(self._host.empty(master.numel(), master.dtype).copy_(master.detach()))
            storage.resize_(0)
        self._parts: list[tuple[int, int, int]] = []  # (master, first element, end)
        self._first: dict[int, int] = {}  # id of a master: its first part
        for i, master in enumerate(self._masters):
            self._first[id(master)] = len(self._parts)
            self._parts += [(i, a, min(a + PART, master.numel())) for a in range(0, master.numel(), PART)]
        self._done = 0  # parts of this step
        self._torn = False
        self._apply = optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign, assignment]

    def begin(self) -> None:
        """The first parts set out for the device, before anybody knows the norm of the gradient."""
        if self._slots:
            return
        self._refuse_torn()
        dtypes = {key: flat.dtype for i in range(len(self._masters)) for key, flat in self._flat(i).items()}
        self._slots = [_Slot({key: self._place(dtype) for key, dtype in dtypes.items()}) for _ in range(SLOTS)]
        self._in.wait_stream(self._api.current_stream())  # whoever had the slots' memory before
        self._in.wait_stream(self._out)  # the last step's parts are back on the host
        self._done = 0
        for k in range(min(AHEAD, len(self._parts))):
            self._fetch(k)

    def finish(self) -> None:
        """Nothing of the states is left on the device but what is still being copied back."""
        for i, master in enumerate(self._masters):
            if self._kept[i] is not None:
                master.data = self._away[i]
        for tensor in (t for slot in self._slots for t in slot.tensors.values()):
            if self.device.type == "cuda":  # the allocator gives the memory to nobody before these streams are done with it
                tensor.record_stream(self._in)
                tensor.record_stream(self._out)
        self._slots = []

    def abandon(self) -> None:
        """The step failed halfway: some weights have been stepped, others not. Neither another step nor a checkpoint may follow."""
        self._torn, self._slots = True, []

    def _refuse_torn(self) -> None:
        if self._torn:
            raise RuntimeError("offload=true: an optimizer step failed halfway, the weights are partly stepped; start again from the last checkpoint")

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """Masters are their tensors on the host: to be saved, or to be loaded into. States that a load has made go where they belong."""
        self._refuse_torn()
        self._api.synchronize()
        before = [self._flat(i) for i in range(len(self._masters))]
        for master, kept in zip(self._masters, self._kept, strict=True):
            if kept is not None:
                master.data = kept
        try:
            yield
        finally:
            for i, master in enumerate(self._masters):
                if self._kept[i] is not None:
                    master.data = self._away[i]
                state = self._state(i)
                for key, value in state.items():
                    if not isinstance(value, Tensor) or value is before[i].get(key):
                        continue
                    if value.shape == master.shape:
                        flat = before[i].get(key)
                        state[key] = (self._host.empty(value.numel(), value.dtype) if flat is None else flat).copy_(value)
                    else:
                        state[key] = value.to(self.device)

    def _state(self, i: int) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state.get(self._masters[i], {})
        return state

    def _flat(self, i: int) -> dict[str, Tensor]:
        """What passes over the device of a master, [n] each, on the host."""
        master, kept = self._masters[i], self._kept[i]
        states = {key: v for key, v in self._state(i).items() if isinstance(v, Tensor) and v.shape == master.shape}
        return states if kept is None else {"master": kept, **states}

    def _place(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(min(self._size, max(m.numel() for m in self._masters)), dtype=dtype, device=self.device)

    def _fetch(self, k: int) -> None:
        (i, a, b), slot = self._parts[k], self._slots[k % SLOTS]
        if slot.sent is not None:
            self._in.wait_event(slot.sent)
        with self._api.stream(self._in):
            for key, flat in self._flat(i).items():
                slot.tensors[key][: b - a].copy_(flat[a:b], non_blocking=True)
        slot.arrived = self._in.record_event()

    @torch.no_grad()
    def _step(self, closure: Any = None) -> None:
        """In the place of `optimizer.step`: every parameter that has a gradient and is in the optimizer's groups now."""
        self.begin()
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step_master(master, group)

    def _step_master(self, master: Tensor, group: dict[str, Any]) -> None:
        first = self._first[id(master)]
        if first != self._done:
            raise RuntimeError("offload=true: DeepSpeed steps its groups in another order than they are fetched in")
        i, gradient = self._parts[first][0], master.grad
        assert gradient is not None
        flats = self._flat(i)
        before = dict(self._state(i))  # empty in the first step
        after: dict[str, Any] = {}
        while self._done < len(self._parts) and self._parts[self._done][0] == i:
            if self._done + AHEAD < len(self._parts):
                self._fetch(self._done + AHEAD)
            (_, a, b), slot = self._parts[self._done], self._slots[self._done % SLOTS]
            stream = self._api.current_stream()
            stream.wait_event(slot.arrived)
            part = master.data[a:b] if self._kept[i] is None else slot.tensors["master"][: b - a]
            part.grad = gradient[a:b]
            # Parts of what is flat; of the count of steps a copy for each part, as each counts on.
            state = {key: slot.tensors[key][: b - a] if key in flats else v.clone() for key, v in before.items()}
            after = self._apply_to(part, group, state)
            for key, value in after.items():
                if not isinstance(value, Tensor) or value.shape != part.shape:
                    continue
                if key not in flats:
                    flats[key] = self._host.empty(master.numel(), value.dtype)
                if key not in slot.tensors:
                    slot.tensors[key] = self._place(value.dtype)
                if value.data_ptr() != slot.tensors[key].data_ptr():
                    slot.tensors[key][: b - a].copy_(value)
            if self._kept[i] is not None:
                self._weights[i][a:b].copy_(part)
            self._out.wait_event(stream.record_event())
            with self._api.stream(self._out):
                for key, flat in flats.items():
                    flat[a:b].copy_(slot.tensors[key][: b - a], non_blocking=True)
            slot.sent = self._out.record_event()
            self._done += 1
        # Only now: until here, parts on their way in were to bring what had been there before.
        self.optimizer.state[master] = {key: flats.get(key, value) for key, value in after.items()}
        if self._kept[i] is not None:
            master.data = self._weights[i].detach()  # DeepSpeed copies a stepped master to the weights: now to themselves

    def _apply_to(self, part: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's own step on one part; its state afterwards."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [part]}]
        if state:
            self.optimizer.state[part] = state
        try:
            self._apply()
        finally:
            self.optimizer.param_groups = groups
            found: dict[str, Any] = self.optimizer.state.pop(part, {})
        return found


# --------------------------------------------------------------------------------------------------------------------------
# What is frozen


class Parked:
    """Tensors that do not change: their device memory is given back between uses, the host's copy is what counts. They stay the same objects.

    To be made while the tensors are on the device; they leave it at once.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._api: Any = torch.get_device_module(device)
        self._stream, self._arrived, self.here = self._api.Stream(), None, True
        memory = HostMemory(device)
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}  # tied ones once
        self._copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        for storage in storages.values():
            if storage.nbytes():
                self._copies.append((storage, memory.empty(storage.nbytes(), torch.uint8).copy_(self._bytes(storage))))
        self._memory = memory
        self.release()

    @property
    def nbytes(self) -> int:
        return sum(host.nbytes for _, host in self._copies)

    def _bytes(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))

    def fetch(self) -> None:
        """They set out for the device, beside whatever it computes."""
        if self.here:
            return
        for storage, host in self._copies:
            storage.resize_(host.nbytes)
        self._stream.wait_stream(self._api.current_stream())  # whoever had the memory before
        with self._api.stream(self._stream):
            for storage, host in self._copies:
                self._bytes(storage).copy_(host, non_blocking=True)
        self._arrived, self.here = self._stream.record_event(), True

    def wait(self) -> None:
        """They are there, for every stream: the host waits, because ZeRO-3 gathers shards on a stream that waits for no other."""
        self.fetch()
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None

    def release(self) -> None:
        """They are gone from the device."""
        if self.here:
            self._api.synchronize()  # nobody reads them any more
            for storage, _ in self._copies:
                storage.resize_(0)
            self._arrived, self.here = None, False
