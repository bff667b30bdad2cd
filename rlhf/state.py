"""What a checkpoint keeps of a trained model, in a form that knows neither ranks nor ZeRO stages.

Of every trained parameter its float32 value and what the optimizer keeps beside it. Each rank writes the parts that it holds, flattened, to files of
its own (`rank-0-000.safetensors`, ...), with the ranges that they have in their flattened parameters. A reader takes the ranges that it holds itself
from whichever files have them: a run goes on with another number of ranks and another ZeRO stage, bit for bit.

    tensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME: [count] each
    metadata   state: {parts: {NAME: [start, count, shape of the whole]}, scalars: {NAME: {"step": 12.0}}, facts: what the caller adds}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone() if tensor.device.type == "cpu" else tensor.cpu()


class PinnedCopies:
    """Copies on the host in page-locked buffers, which the device fills without the host; the buffers are kept for the next time."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used, self._offset = 0, 0

    def reset(self) -> None:
        """All earlier copies may be overwritten."""
        self._used, self._offset = 0, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The caller waits for the device before it reads."""
        if tensor.nbytes > FILE_BYTES:
            return copy_to_host(tensor)
        if self._offset + tensor.nbytes > FILE_BYTES:
            self._used, self._offset = self._used + 1, 0
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(FILE_BYTES, dtype=torch.uint8, pin_memory=True))
        place = self._buffers[self._used][self._offset : self._offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._offset += -(-tensor.nbytes // 16) * 16
        return place.copy_(tensor, non_blocking=True)


def nbytes(parts: Sequence[Part], optimizer: torch.optim.Optimizer) -> int:
    """Of `files`, about."""
    return sum(4 * part.count * (1 + sum(_like_master(v, part) for v in optimizer.state.get(part.master, {}).values())) for part in parts)


def files(
    parts: Sequence[Part],
    optimizer: torch.optim.Optimizer,
    rank: int,
    facts: Mapping[str, Any],
    copy: Callable[[Tensor], Tensor] = copy_to_host,
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
    with _Files(folder) as files:
        files.check(names)
        for part in parts:
            shape, scalars = files.shapes[part.name], files.scalars[part.name]
            if shape != part.shape:
                raise ValueError(f"{folder}: {part.name} has the shape {shape} there, and {part.shape} in this model")
            state = optimizer.state[part.master]
            for key, value in scalars.items():
                if isinstance(state.get(key), Tensor):
                    state[key].fill_(value)
                elif key == "step":  # where torch's own would make it
                    state[key] = torch.tensor(value, device=part.master.device if optimizer.defaults.get("fused") else "cpu")
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


class _Files:
    """All ranks' files of a folder, open."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, []
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, list[int]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self.facts: dict[str, Any] = {}
        self.kinds: list[str] = []

    def __enter__(self) -> _Files:
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
