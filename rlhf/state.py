"""What a checkpoint keeps of a trained model, in a form that knows neither ranks nor ZeRO stages.

Of every trained parameter its float32 value and what the optimizer keeps beside it. Each rank writes the parts that it holds, flattened, to files of
its own (`rank-0-000.safetensors`, ...), with the ranges that they have in their flattened parameters. A reader takes the ranges that it holds itself
from whichever files have them: a run goes on with another number of ranks and another ZeRO stage, bit for bit.

    tensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME: [count] each
    metadata   state: {parts: {NAME: [start, count, shape of the whole]}, scalars: {NAME: {"step": 12.0}}, facts: what the caller adds}
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.files import open_tensors

WEIGHT = "weight"
FILE_BYTES = 1 << 30  # of one file, so that no more is copied to the host at once


@dataclass(frozen=True)
class Part:
    """A range of a flattened parameter, where the optimizer of this rank keeps it."""

    name: str
    start: int  # in the parameter
    count: int
    shape: list[int]  # of the parameter
    master: Tensor  # float32, in which the optimizer steps it; it may hold other parts too
    offset: int  # in the flattened master

    def of(self, tensor: Tensor) -> Tensor:
        """[count] of the master, or of a state that is shaped like it; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def parts_of(zero: Any, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter], rank: int) -> list[Part]:
    """This rank's parts of trained parameters under DeepSpeed 0.19.8. zero: the engine's optimizer; optimizer: torch's own inside of it."""
    masters = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if masters is None:  # ZeRO-1 in bf16 has an optimizer of its own
        masters = getattr(zero, "fp32_groups_flat_partition", None) or getattr(zero, "single_partition_of_fp32_groups", None)
    found = []
    for name, parameter in trained.items():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        whole = math.prod(shape)
        if masters is None:  # no ZeRO: every rank has everything
            found.append(Part(name, 0, whole, shape, parameter, 0))
        elif hasattr(parameter, "ds_tensor"):
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_tensor.ds_numel * rank
            count = min(parameter.ds_tensor.ds_numel, whole - start)  # the last rank's part is padded
            if count > 0:
                found.append(Part(name, start, count, shape, masters[group], offset))
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(Part(name, here.start, here.numel, shape, masters[mapping.param_group_index], there.start))
    return found


@dataclass(frozen=True)
class TensorFile:
    """A file that is to be written: tensors on the host, which nobody else changes."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


Copy = Callable[[Tensor], Tensor]  # to the host


def copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone() if tensor.device.type == "cpu" else tensor.cpu()


class PinnedCopies:
    """Copies on the host, in page-locked memory that is kept for the next time, made by the device beside what it computes.

    `begin`, a call for each tensor, and `ready`: an event after which the copies are there; until then nobody may change the tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arenas: list[Tensor] = []
        self._used, self._offset = 0, 0
        self._preparing: threading.Thread | None = None

    def prepare(self, size: int) -> None:
        """Lock so many bytes, and what their alignment may take, in the background: that takes seconds. Where it fails, it is tried again, and said,
        when they are needed."""

        def prepared() -> None:
            with contextlib.suppress(Exception):
                self._add(size + (size >> 6))

        self._preparing = threading.Thread(target=prepared, name="pinning", daemon=True)
        self._preparing.start()

    @property
    def preparing(self) -> bool:
        return self._preparing is not None and self._preparing.is_alive()

    def begin(self) -> None:
        """All earlier copies may be overwritten."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        self._used, self._offset = 0, 0
        self._follow()

    def __call__(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().view(-1).view(torch.uint8)
        place, offset = self._place(len(flat))
        with torch.cuda.stream(self._stream):
            done = 0
            while done < len(flat):  # no copy crosses the border between two pieces that were locked one after the other
                end = min(len(flat), done + FILE_BYTES - (offset + done) % FILE_BYTES)
                place[done:end].copy_(flat[done:end], non_blocking=True)
                done = end
        return place.view(tensor.dtype).view(tensor.shape)

    def now(self, tensor: Tensor) -> Tensor:
        """Of a tensor that will be gone."""
        self._follow()
        copy = self(tensor)
        if self._stream is not None:
            self._stream.synchronize()
        return copy

    def ready(self) -> torch.cuda.Event | None:
        return self._stream.record_event() if self._stream is not None else None

    def _follow(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _place(self, size: int) -> tuple[Tensor, int]:
        """(so many bytes, where they begin in their arena)"""
        while self._used < len(self._arenas) and self._offset + size > len(self._arenas[self._used]):
            self._used, self._offset = self._used + 1, 0
        if self._used == len(self._arenas):
            self._add(max(size, FILE_BYTES))
        offset, self._offset = self._offset, self._offset + -(-size // 16) * 16
        return self._arenas[self._used][offset : offset + size], offset

    def _add(self, size: int) -> None:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):  # many times fewer pages to lock; and no child needs them
            with contextlib.suppress(OSError):  # a kernel without
                memory.madvise(advice)
        arena = torch.frombuffer(memory, dtype=torch.uint8)
        locked: list[Tensor] = []
        try:
            for piece in arena.split(FILE_BYTES):
                piece.zero_()  # the system gives the pages here, where nothing of CUDA is held up by it
                if self._stream is not None:
                    with torch.cuda.device(self._device):  # a new thread's is the first one, which is another rank's
                        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), len(piece), 0))
                    locked.append(piece)
        except BaseException as error:
            for piece in locked:  # or the next memory at these addresses could not be locked
                torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
            if isinstance(error, RuntimeError):  # which says "out of memory", and would be taken for the device's
                raise MemoryError(f"{size / 1e9:.1f} GB of host memory cannot be page-locked") from error
            raise
        self._arenas.append(arena)


def nbytes(parts: Sequence[Part], optimizer: torch.optim.Optimizer) -> int:
    """Of `files`, about; of an optimizer that has not stepped yet too, whose states come with its first step."""

    def states(part: Part) -> int:
        return sum(_like_master(value, part) for value in optimizer.state.get(part.master, {}).values())

    return sum(4 * part.count * (1 + states(part)) for part in parts) + to_come(parts, optimizer)


def begin(parts: Iterable[Part], optimizer: torch.optim.Optimizer) -> None:
    """Make what torch's Adam and AdamW would make in their first step, alike, so that a run's memory is from the beginning what it will be. Others,
    and DeepSpeed's own, make theirs then."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or optimizer.defaults["amsgrad"] or optimizer.defaults["capturable"]:
        return
    for master in {id(part.master): part.master for part in parts}.values():
        if not optimizer.state.get(master):
            optimizer.state[master]["step"] = _steps(0.0, master, optimizer)
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[master][key] = torch.zeros_like(master, memory_format=torch.preserve_format)


def _steps(number: float, master: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Where torch's own would make it."""
    return torch.tensor(number, device=master.device if optimizer.defaults.get("fused") else "cpu")


def to_come(parts: Iterable[Part], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what the optimizer will keep of these parts from its first step on, and does not yet."""
    each = len(optimizer.defaults.get("betas", ())) or int(bool(optimizer.defaults.get("momentum")))
    return sum(4 * part.count * each for part in parts if not optimizer.state.get(part.master))


def files(
    parts: Sequence[Part],
    optimizer: torch.optim.Optimizer,
    rank: int,
    facts: Mapping[str, Any],
    copy: Copy = copy_to_host,
) -> Iterator[TensorFile]:
    """This rank's files, one after the other, so that a caller that writes each needs no more memory than for one. One without tensors if this rank
    has no parts."""
    number, tensors, ranges, scalars, size = 0, dict[str, Tensor](), dict[str, Any](), dict[str, Any](), 0

    def taken() -> TensorFile:
        nonlocal number, tensors, ranges, scalars, size
        text = json.dumps({"parts": ranges, "scalars": scalars, "facts": dict(facts)})  # several would be written in a random order
        file = TensorFile(f"rank-{rank}-{number:03}.safetensors", tensors, {"state": text})
        number, tensors, ranges, scalars, size = number + 1, {}, {}, {}, 0
        return file

    for part in parts:
        state = optimizer.state.get(part.master, {})
        kept = {WEIGHT: part.master, **{key: v for key, v in state.items() if _like_master(v, part)}}
        for key, value in kept.items():
            tensors[f"{key}/{part.name}"] = copy(part.of(value))
            size += tensors[f"{key}/{part.name}"].nbytes
        ranges[part.name] = [part.start, part.count, part.shape]
        scalars[part.name] = {key: float(v) for key, v in state.items() if key not in kept}
        if size >= FILE_BYTES:
            yield taken()
    if ranges or not number:
        yield taken()


def read(folder: Path, parts: Sequence[Part], names: Sequence[str], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill masters and optimizer states from what any number of ranks wrote to `folder`; the facts given then. names: of all trained parameters.

    Raises ValueError where the files have other parameters, or do not have all of one."""
    with Files(folder) as files:
        files.check(names)
        for part in parts:
            shape, scalars = files.shapes[part.name], files.scalars[part.name]
            if shape != part.shape:
                raise ValueError(f"{folder}: {part.name} has the shape {shape} there, and {part.shape} in this model")
            state = optimizer.state[part.master]
            for key, value in scalars.items():
                if isinstance(state.get(key), Tensor):
                    state[key].fill_(value)
                elif key == "step":
                    state[key] = _steps(value, part.master, optimizer)
                else:
                    state[key] = value
            for key in files.kinds:
                if key == WEIGHT:
                    target = part.master
                else:
                    if not _like_master(state.get(key), part):
                        state[key] = torch.zeros_like(part.master, memory_format=torch.preserve_format)
                    target = state[key]
                files.fill(part.of(target), key, part.name, part.start)
        return files.facts


def _like_master(value: Any, part: Part) -> bool:
    return isinstance(value, Tensor) and value.shape == part.master.shape and value.dim() > 0


class Files:
    """All ranks' files of a folder, open. ValueError if there are none."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, []
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, list[int]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self.facts: dict[str, Any] = {}
        self.kinds: list[str] = []

    def __enter__(self) -> Files:
        paths = sorted(self._folder.glob("rank-*.safetensors"))
        if not paths:
            raise ValueError(f"{self._folder}: there is no rank-*.safetensors, so it is no state that a checkpoint keeps")
        for path in paths:
            file = open_tensors(path)
            file.__enter__()
            self._open.append(file)
            try:
                found = json.loads(file.metadata()["state"])
                for name, (start, count, shape) in found["parts"].items():
                    self._ranges.setdefault(name, []).append((start, count, file))
                    self.shapes[name] = shape
                self.scalars |= found["scalars"]
                self.facts = found["facts"]
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
                raise ValueError(f"{path}: no state that a checkpoint keeps") from None
            self.kinds = self.kinds or sorted({key.split("/", 1)[0] for key in file.keys()})  # noqa: SIM118
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._open:
            file.__exit__(None, None, None)

    def check(self, names: Sequence[str]) -> None:
        if strange := sorted(self._ranges.keys() ^ set(names)):
            where = "the checkpoint" if strange[0] in self._ranges else "the model"
            raise ValueError(
                f"{self._folder}: {len(strange)} trained parameters are in the checkpoint or in the model only, e.g. {strange[0]} in {where}: "
                "another model wrote it, or one with other adapters"
            )

    def weight(self, name: str) -> Tensor:
        """The whole of a trained parameter, float32."""
        whole = torch.empty(math.prod(self.shapes[name]))
        self.fill(whole, WEIGHT, name, 0)
        return whole.view(self.shapes[name])

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """target [count] = the whole from `start` on."""
        filled = 0
        for begin, count, file in self._ranges[name]:
            first, last = max(start, begin), min(start + len(target), begin + count)
            if first < last:
                target[first - start : last - start].copy_(file.get_slice(f"{kind}/{name}")[first - begin : last - begin])
                filled += last - first
        if filled < len(target):
            raise ValueError(f"{self._folder}: {kind} of {name} is there only in part ({filled} of {len(target)} elements)")
