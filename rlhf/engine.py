"""The one file that knows DeepSpeed: loading under ZeRO, training engines, frozen engines, whole weights out of shards.

What is settled here, so that nobody else has to know (each was wrong silently somewhere; docs/architecture.md):
- a loss arrives as a sum with its global count; DeepSpeed's mean over ranks is undone, its own accumulation count is always 1;
- windows of backward passes end where `step` is called ("managed_gradient_accumulation": false);
- under ZeRO-3 a parameter that a window's first backward does not touch would be stepped with an old gradient: refused (trap 31);
- one engine per trained model, and random generators are seeded again after every initialize.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing is compiled against the CUDA toolkit here
# DeepSpeed compiles with the `ninja` of PATH: our environment's, also where it is not activated. Another version compiles all anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import accelerate
import deepspeed
import psutil
import torch
import torch.utils.cpp_extension
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from rlhf import state
from rlhf.config import TrainedModelConfig, bucket_size
from rlhf.distributed import World
from rlhf.models.loading import Placement, weighted_bits
from rlhf.models.lora import TOGETHER, WeightSource, kept_whole
from rlhf.offload import OffloadedStates, Parked
from rlhf.rollout import HybridEngine

logger = logging.getLogger(__name__)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that newer versions of torch want to give up: nothing that a user could mend.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def zero_stage(settings: dict[str, Any]) -> int:
    return int(settings["zero_optimization"].get("stage", 0))


def seed_everything(seed: int, rank: int) -> None:
    """Per-rank generators; sampling does not use them (rollout/sampler.py), module initialisation does."""
    torch.manual_seed(seed * 1_000_003 + rank)


# --------------------------------------------------------------------------------------------------------------------------
# Loading


def _tie(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "tie_weights"):
            part.tie_weights()
            return


class WholePlacement:
    """Every rank holds the whole model (ZeRO 0-2)."""

    partitioned = False
    base: Mapping[str, nn.Parameter] = {}

    def __init__(self, world: World) -> None:
        self.world = world

    def construct(self, build: Callable[[], nn.Module]) -> nn.Module:
        with accelerate.init_empty_weights(include_buffers=False):
            module = build()
        _tie(module)  # init_empty_weights makes a parameter of its own for every name
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(self.world.device))
        places = {id(p): self._place(name, p) for name, p in module.named_parameters()}  # tied parameters stay one object
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, places[id(parameter)])
        return module

    def _place(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, device=self.world.device), parameter.requires_grad)

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(whole)

    def checksum(self, parameter: nn.Parameter) -> int:
        return weighted_bits(parameter)


class SharedPlacement(WholePlacement):
    """Modules of a role's own around frozen parameters that another role has loaded: adapters, hooks and checkpointing of the two never meet."""

    def __init__(self, world: World, base: Mapping[str, nn.Parameter]) -> None:
        super().__init__(world)
        assert not any(p.requires_grad for p in base.values())
        self.base = base
        for parameter in base.values():
            parameter.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed's mark for what a starting engine need not broadcast

    def _place(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return self.base[name] if name in self.base else super()._place(name, parameter)


class PartitionedPlacement:
    """Every rank holds its slice of every parameter (ZeRO-3)."""

    partitioned = True
    base: Mapping[str, nn.Parameter] = {}

    def __init__(self, world: World, settings: dict[str, Any]) -> None:
        self.world, self.settings = world, settings

    def construct(self, build: Callable[[], nn.Module]) -> nn.Module:
        with deepspeed.zero.Init(config_dict_or_path=self.settings), no_init_weights():
            module = build()
        _tie(module)
        # zero.Init casts every float tensor made inside it, buffers such as the RoPE frequencies included: take those of a twin without weights.
        with accelerate.init_empty_weights(include_buffers=False):
            twin = build()
        twins = dict(twin.named_modules())
        for path, owner in module.named_modules():
            for name, _ in list(owner.named_buffers(recurse=False)):
                setattr(owner, name, getattr(twins[path], name).to(self.world.device))
        return module

    def _slice(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.ds_numel
        start = size * self.world.rank
        return start, max(0, min(size, parameter.ds_numel - start))

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        start, count = self._slice(parameter)
        with torch.no_grad():
            parameter.ds_tensor.zero_()  # type: ignore[attr-defined]
            if count:
                parameter.ds_tensor.narrow(0, 0, count).copy_(whole.reshape(-1).narrow(0, start, count))  # type: ignore[attr-defined]

    def checksum(self, parameter: nn.Parameter) -> int:
        start, count = self._slice(parameter)
        return weighted_bits(parameter.ds_tensor.narrow(0, 0, count), start) if count else 0  # type: ignore[attr-defined]


def _clear_abandoned_builds() -> None:
    """DeepSpeed compiles an operator at its first start on a CPU, behind a lock file that a killed process leaves there: every later
    start would wait for it for ever, without a word. A builder keeps its lock file open, so one that nobody has open is abandoned."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or torch.utils.cpp_extension.get_default_build_root()
    for lock in Path(root).glob("**/lock"):
        if _nobody_has_open(lock):
            time.sleep(0.2)  # a builder that is done closes its lock file, and then removes it
            if lock.exists() and _nobody_has_open(lock):
                logger.warning("%s: left behind by a killed process, removed", lock)
                lock.unlink(missing_ok=True)


def _nobody_has_open(file: Path) -> bool:
    path = os.path.realpath(file)
    return not any(path in _open_files(process) for process in psutil.process_iter())


def _unlink_shared_buffer(world: World) -> None:
    """DeepSpeed's CPU communication maps 66 MB per rank in /dev/shm and leaves the file there for good. Once every rank of the node has
    mapped it the name can go; the memory then goes with the processes, however they end."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}"):
        buffer.unlink(missing_ok=True)


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:  # another user's, or gone
        return []


def loading_context(settings: dict[str, Any], world: World, base: Mapping[str, nn.Parameter] | None = None) -> Placement:
    """How a model is built under its ZeRO settings; base: on which frozen parameters of another role (`models.lora.frozen_base`). (collective)"""
    if not deepspeed.comm.is_initialized():
        if world.local_rank == 0:
            _clear_abandoned_builds()
        world.barrier()
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that an operator was built
            deepspeed.init_distributed(verbose=False)  # takes over the group that exists; zero.Init counts the ranks through it
        world.barrier()
        _unlink_shared_buffer(world)
    if base is not None:
        return SharedPlacement(world, base)
    return PartitionedPlacement(world, settings) if zero_stage(settings) == 3 else WholePlacement(world)


# --------------------------------------------------------------------------------------------------------------------------
# Whole weights


def full_tensors(layout: Sequence[WeightSource], group_bytes: int = TOGETHER) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain model, whole, adapters merged, in layout order; each is only valid until the next. (collective)"""
    for group in _neighbours([sum(_bytes(p) for p in source.parameters) for source in layout], group_bytes):
        members = layout[group.start : group.stop]
        with GatheredParameters([p for s in members for p in s.parameters if _shard(p) is not None]), torch.no_grad():
            for member in members:
                yield member.name, member.merged()


def _bytes(parameter: nn.Parameter) -> int:
    """Of the whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _neighbours(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Ranges of indices, each the first to reach `most` bytes together."""
    first, together = 0, 0
    for i, size in enumerate(sizes):
        together += size
        if together >= most or i == len(sizes) - 1:
            yield range(first, i + 1)
            first, together = i + 1, 0


def gather_into(layout: Sequence[WeightSource], weights: dict[str, Tensor], world: World, turn: int, copies: Copies) -> Tensor:
    """Write the plain model's tensors, adapters merged, to their places in `weights`, shards all-gathered straight into them. (collective)

    Each rank merges adapters into its own rows, on their way into the buffer and before they leave for the others: merging costs no pass over the
    weights, and happens while others' rows arrive. Returns how many elements that this rank can judge came out wrong, as a tensor that nobody has
    waited for; CHECKED tensors are looked at, others each `turn` (trap 21). `weights` as `check_fit` wants them.
    """
    copies.start()
    pairs = [(s.weight, weights[s.name]) for s in layout]
    small = [p for s in layout if s.lora_a is not None for p in s.parameters[1:]]
    adapters = {id(p): whole for p in small if (whole := _whole(p, world)) is not None}
    away = [(p, torch.empty(_shape(p), dtype=p.dtype, device=world.device)) for p in small if id(p) not in adapters]
    for i in _bring(away, world, Copies()):
        adapters[id(away[i][0])] = away[i][1]

    own = {i: rows for i, s in enumerate(layout) if s.lora_a is not None and (rows := _own_rows(s.weight, weights[s.name], world)) is not None}
    merging = {i: functools.partial(layout[i].merge, adapters[id(layout[i].lora_a)], adapters[id(layout[i].lora_b)], rows) for i, rows in own.items()}
    checked = {(turn * CHECKED + i) % len(layout) for i in range(CHECKED)}
    wrong = torch.zeros((), dtype=torch.int64, device=world.device)
    for i in _bring(pairs, world, copies, merging):
        source, view = layout[i], weights[layout[i].name]
        if source.lora_a is None or source.lora_b is None:
            if i in checked:
                wrong += _differing(source.weight, view, world, turn)
            continue
        a, b = adapters[id(source.lora_a)], adapters[id(source.lora_b)]
        rows = own.get(i, slice(0, len(view)))
        if i not in own:
            if i in checked:
                wrong += _differing(source.weight, view, world, turn)
            before = view.clone() if i in checked else view
            source.merge(a, b, rows, view, view)
        else:
            before = _held(source.weight).to(world.device).view(-1, view.shape[1])
        if i in checked:
            after = view[rows]
            again = torch.empty_like(after)
            source.merge(a, b, rows, before, again)
            first = turn * CHECKED % len(after)
            last = min(first + CHECKED, len(after))
            some = slice(rows.start + first, rows.start + last)
            wrong += (again != after).sum() + source.wrongly_merged(before[first:last], after[first:last], a, b, some)
            wrong += sum(_differing(p, adapters[id(p)], world, turn) for p in (source.lora_a, source.lora_b))
    return wrong


def _own_rows(weight: nn.Parameter, target: Tensor, world: World) -> slice | None:
    """Which rows of a matrix this rank holds and could send as they are in `target`; None where its part does not end with a row."""
    shard, shape = _shard(weight), _shape(weight)
    if shard is None or shard.numel() == shape.numel():
        return slice(0, shape[0])
    count, rest = divmod(shard.numel() * shape[0], shape.numel())
    whole = not rest and shard.numel() * world.size == shape.numel() and shard.dtype == target.dtype
    return slice(count * world.rank, count * (world.rank + 1)) if whole else None


def check_fit(layout: Sequence[WeightSource], weights: dict[str, Tensor]) -> None:
    """RuntimeError if names or shapes do not cover `weights` exactly (trap 21)."""
    given = {(s.name, tuple(_shape(s.weight))) for s in layout}
    wrong_names = sorted(given ^ {(name, tuple(view.shape)) for name, view in weights.items()})
    if wrong_names:
        raise RuntimeError(f"hand-over of weights: {wrong_names[:3]} of actor and rollout do not fit each other")


CHECKED = 4  # tensors compared after each hand-over, and rows of each after merging
CHECKED_ELEMENTS = 8 << 20  # at most, of one tensor: others each time
ONE_BY_ONE = 1 << 20  # elements from which a copy of its own is faster than one kernel for many
LENT = -1  # beside the ids of modules that are at work with a parameter: DeepSpeed gives none back that has any, until a step gives back all


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _shard(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a parameter that is partitioned (flat, padded at the end); None where the rank holds it whole."""
    partitioned = hasattr(parameter, "ds_tensor") and parameter.ds_status != ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    return parameter.ds_tensor if partitioned else None  # type: ignore[attr-defined]


Merge = Callable[[Tensor, Tensor], None]  # what this rank holds of a weight, and its place in the whole, where it is to be put with adapters


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter."""
    shard = _shard(parameter)
    return parameter.detach() if shard is None else shard


def _whole(parameter: nn.Parameter, world: World) -> Tensor | None:
    """A parameter of which this rank holds everything."""
    shard, shape = _shard(parameter), _shape(parameter)
    if shard is None:
        return parameter.detach()
    return shard.to(world.device).view(shape) if world.size == 1 and shard.numel() == shape.numel() else None


def _bring(
    pairs: Sequence[tuple[nn.Parameter, Tensor]], world: World, copies: Copies, merging: Mapping[int, Merge] | None = None
) -> Iterator[int]:  # fmt: skip
    """Every parameter, whole, into the contiguous tensor beside it, those of `merging` by its functions; yields the index of each once what follows
    on the stream may use it, while the rest is on its way. The host does not wait. (collective; to be run to its end)"""
    merging = merging or {}
    here: list[int] = []
    held: list[tuple[Tensor, Tensor]] = []
    gathers: list[tuple[int, Tensor, Tensor]] = []
    padded: list[int] = []
    for i, (parameter, target) in enumerate(pairs):
        shard, count = _shard(parameter), target.numel()
        if shard is None or (world.size == 1 and shard.numel() == count):
            here.append(i)
            if i not in merging:
                held.append((target, parameter.data if shard is None else shard))
        elif shard.numel() * world.size == count and shard.dtype == target.dtype:
            shard, whole = shard.to(world.device), target.view(-1)
            gathers.append((i, whole, shard if i not in merging else whole[world.rank * shard.numel() :][: shard.numel()]))
        else:
            padded.append(i)
    copies.finish(held)
    for group in _neighbours([_bytes(pairs[i][0]) for i in padded], TOGETHER):
        part = padded[group.start : group.stop]
        with GatheredParameters([pairs[i][0] for i in part]):
            for i in part:
                pairs[i][1].copy_(pairs[i][0].detach())

    def merge(i: int, place: Tensor) -> None:
        rows = place.view(-1, pairs[i][1].shape[-1])
        merging[i](_held(pairs[i][0]).to(world.device).view(rows.shape), rows)

    for i in here:
        if i in merging:
            merge(i, pairs[i][1])

    def ready(indices: range) -> None:
        for i, _, shard in gathers[indices.start : indices.stop]:
            if i in merging:
                merge(i, shard)

    arrived = world.gather_shards([(target, shard) for _, target, shard in gathers], ready)
    yield from padded
    yield from here
    for group in arrived:
        yield from (gathers[k][0] for k in group)


class Copies:
    """target.copy_(source) for many tensors, the same every time: those that follow each other on both sides in one, because there are hundreds and
    each launch costs, and begun before the host looks at them one by one."""

    def __init__(self) -> None:
        self._addresses: list[tuple[int, int]] = []
        self._large: list[tuple[Tensor, Tensor]] = []
        self._little: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._begun = False

    def start(self) -> None:
        """Launch the copies of the last time, before anybody has looked whether they are still the right ones."""
        for target, source in self._large:
            target.copy_(source, non_blocking=True)
        if self._little[0]:
            torch._foreach_copy_(*self._little)  # type: ignore[attr-defined]
        self._begun = True

    def finish(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """These (target, source) are what is to be copied; launched anew if they lie elsewhere than the last time."""
        addresses = [(target.data_ptr(), source.data_ptr()) for target, source in pairs]
        if not self._begun or addresses != self._addresses:
            self._addresses, self._large, self._little = addresses, [], ([], [])
            for target, source in _joined(pairs):
                if target.numel() >= ONE_BY_ONE:
                    self._large.append((target, source))
                else:
                    self._little[0].append(target)
                    self._little[1].append(source)
            self.start()
        self._begun = False


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same copies with neighbours put together."""
    run: tuple[Tensor, Tensor, int] | None = None  # first target, first source, elements

    def whole(target: Tensor, source: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if count > target.numel():
            return target.as_strided((count,), (1,)), source.as_strided((count,), (1,))
        return target, source.view(target.shape)

    for target, source in pairs:
        if run is not None:
            first, begin, count = run
            size = target.element_size()
            follows = target.data_ptr() == first.data_ptr() + count * size and source.data_ptr() == begin.data_ptr() + count * size
            alike = first.dtype == target.dtype == source.dtype == begin.dtype
            solid = all(t.is_contiguous() for t in (target, source, first, begin))
            if follows and alike and solid and _same_storage(target, first) and _same_storage(source, begin):
                run = (first, begin, count + target.numel())
                continue
            yield whole(*run)
        run = (target, source, target.numel())
    if run is not None:
        yield whole(*run)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _differing(parameter: nn.Parameter, whole: Tensor, world: World, turn: int) -> Tensor:
    """How many elements of `whole` are not those that this rank holds."""
    shard, whole = _shard(parameter), whole.view(-1)
    own = parameter.detach().view(-1) if shard is None else shard.view(-1)
    start = 0 if shard is None else own.numel() * world.rank
    count = max(0, min(own.numel(), whole.numel() - start))
    begin = turn * CHECKED_ELEMENTS % count if count > CHECKED_ELEMENTS else 0
    end = min(count, begin + CHECKED_ELEMENTS)
    return (whole[start + begin : start + end] != own[begin:end].to(whole.device, whole.dtype)).sum()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Of a contiguous tensor, mod 2^64; as 64-bit words where it can be read so, which no pass needs to widen."""
    flat = tensor.detach().view(-1)
    words = 8 // flat.element_size()
    if flat.numel() % words == 0 and flat.storage_offset() % words == 0:
        return flat.view(torch.int64).sum()
    return flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()]).sum(dtype=torch.int64)


# --------------------------------------------------------------------------------------------------------------------------
# Engines


def fetch_by_layer(module: nn.Module) -> None:
    """ZeRO-3 gathers a decoder layer at once, instead of every norm and projection by hooks of its own, which cost more of the host's time than the
    products of a small model take on a GPU."""
    layers = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    for part in module.modules():
        if type(part).__name__ in layers:
            part._z3_leaf = True  # type: ignore[assignment]
            if "forward" not in vars(part):  # compiled layers must have torch's own methods
                _know_parameters(part)
        elif isinstance(part, nn.Embedding) and not part.weight.requires_grad:
            # A layer is given back when its input's gradient is there: with frozen embeddings the first would never be.
            part.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(torch.is_grad_enabled()))


def _know_parameters(layer: nn.Module) -> None:
    """DeepSpeed asks a layer for its parameters four times in every micro-batch, and torch walks through all modules in it each time."""
    layer.named_parameters = functools.partial(_named_parameters, layer, list(layer.named_parameters()))  # type: ignore[method-assign]


def _named_parameters(
    layer: nn.Module, found: list[tuple[str, nn.Parameter]], prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:  # fmt: skip
    if prefix or not (recurse and remove_duplicate):
        return type(layer).named_parameters(layer, prefix, recurse, remove_duplicate)
    return iter(found)


def _modules(root: nn.Module, found: list[nn.Module], remove_duplicate: bool = True) -> Iterator[nn.Module]:
    return iter(found) if remove_duplicate else (module for _, module in root.named_modules(remove_duplicate=False))


class FrozenEngine:
    """A model that only computes: partitioned under ZeRO-3, else whole on the device. offload: in host memory from `release` to the next call."""

    def __init__(self, module: nn.Module, settings: dict[str, Any], world: World, offload: bool = False) -> None:
        module.requires_grad_(False)
        module.eval()
        self.module = module
        self._world = world
        self._forward: Callable[..., Any] = module
        if zero_stage(settings) == 3:
            fetch_by_layer(module)
            zero = settings["zero_optimization"]
            whole = {"stage3_param_persistence_threshold": kept_whole(module, world.size, zero)}
            settings = settings | {"zero_optimization": whole | zero}
            engine, *_ = deepspeed.initialize(model=module, config=settings)
            engine.eval()
            self._forward = engine
        weights = [getattr(p, "ds_tensor", p.data) for p in module.parameters()]
        self._parked = Parked(weights, world.device) if offload else None

    @property
    def visiting(self) -> int:
        """Bytes that are on the device only while it is used."""
        return self._parked.nbytes if self._parked else 0

    def fetch(self) -> None:
        """Under offload the weights set out for the device, so that the next call need not wait for them."""
        if self._parked:
            self._parked.fetch()

    def release(self) -> None:
        """Under offload the weights leave the device, until they are needed again."""
        if self._parked:
            self._parked.release()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """(collective under ZeRO-3)"""
        self._world.beat()
        if self._parked:
            self._parked.wait()
        return self._forward(*args, **kwargs)


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    learning_rate: float
    applied: bool = True  # False: the gradient of all ranks together is not finite, and no weight has changed


def learning_rate_at(config: TrainedModelConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then constant, linear or cosine down to the floor."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    floor = config.min_learning_rate_ratio
    share = {"constant": 1.0, "linear": 1 - progress * (1 - floor), "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * share[config.schedule]


class TrainEngine:
    """One trained model under DeepSpeed. `module` may hold frozen parameters (LoRA)."""

    def __init__(self, module: nn.Module, config: TrainedModelConfig, settings: dict[str, Any], world: World, total_steps: int, seed: int, name: str):
        self.config, self.world, self.name, self.total_steps = config, world, name, total_steps
        self.stage = zero_stage(settings)
        self.optimizer_steps = 0
        self.backward_passes = 0
        self._hand_overs = 0
        self._fitting: dict[str, Tensor] | None = None
        self._copies = Copies()
        self._lender: tuple[Sequence[WeightSource], HybridEngine] | None = None
        self._borrowing = False
        self._clip = float(settings["gradient_clipping"])
        settings = dict(settings)
        if self.stage == 0:
            settings["gradient_clipping"] = 0.0  # DeepSpeed clips at stage 0 without telling the norm; `_norm_at_stage_0` does both
        trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"{name}: no trainable parameter")
        zero = settings["zero_optimization"] = dict(settings["zero_optimization"])
        if self.stage == 3:
            fetch_by_layer(module)
            zero.setdefault("stage3_param_persistence_threshold", kept_whole(module, world.size, zero))
            if zero.get("reduce_scatter", True):
                zero.setdefault("contiguous_gradients", False)  # gradients that are reduced together are put together for that anyway
        zero["reduce_bucket_size"] = bucket_size(zero, [getattr(p, "ds_numel", p.numel()) for _, p in trainable])
        parameters = [p for _, p in trainable]
        given = (
            {"model_parameters": self._groups(parameters)} if "optimizer" in settings else {"model_parameters": parameters, "optimizer": self._adamw}
        )
        self._engine, *_ = deepspeed.initialize(model=module, config=settings, **given)
        self.module: nn.Module = self._engine.module
        # DeepSpeed walks through all modules twice in every forward.
        self.module.modules = functools.partial(_modules, self.module, list(self.module.modules()))  # type: ignore[method-assign]
        seed_everything(seed, world.rank)
        self._held: torch.cuda.Event | None = None
        self._untouched: set[str] = set()
        self._window_open = False
        self._norm0 = 0.0
        for n, p in trainable:
            p.register_hook(lambda gradient, n=n: self._untouched.discard(n))
        self._trainable = dict(trainable)
        if self.stage == 0:
            self._engine.optimizer.register_step_pre_hook(self._norm_at_stage_0)
        self._offloaded = self._offload_states() if config.offloaded else None
        if not self._offloaded:
            state.begin(self._parts(), self._torch_optimizer)

    def _offload_states(self) -> OffloadedStates:
        """Where DeepSpeed 0.19.8 keeps flat master weights and the model's weights that are copied from them, group by group as it steps them."""
        zero, rank = self._engine.optimizer, self.world.rank
        if self.stage == 3:
            masters, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        elif hasattr(zero, "fp32_groups_flat_partition"):  # ZeRO-1 in bf16 has an optimizer of its own
            masters, weights = zero.fp32_groups_flat_partition, [parts[rank] for parts in zero.bf16_partitioned_groups]
        else:
            masters, weights = zero.single_partition_of_fp32_groups, [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]
        return OffloadedStates(zero.optimizer, list(zip(masters, weights, strict=True)), self.world.device)

    def _states_at_hand(self) -> contextlib.AbstractContextManager[None]:
        """For checkpoints: DeepSpeed finds master weights and moments, wherever they lie."""
        return self._offloaded.at_hand() if self._offloaded else contextlib.nullcontext()

    def _adamw(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
        c = self.config
        return torch.optim.AdamW(self._groups(parameters), lr=c.learning_rate, betas=c.betas, eps=c.eps, fused=self.world.device.type == "cuda")

    def _groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """For any optimizer: no decay on one-dimensional weights."""
        shapes = [(p, len(getattr(p, "ds_shape", p.shape))) for p in parameters]
        groups = [
            {"params": [p for p, d in shapes if d >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p, d in shapes if d < 2], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def _norm_at_stage_0(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._norm0 = float(torch.nn.utils.clip_grad_norm_(parameters, self._clip if self._clip > 0 else math.inf))
        if not math.isfinite(self._norm0):  # ZeRO's own optimizers look at it themselves
            for parameter in parameters:
                parameter.grad = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with gradients. (collective under ZeRO-3)"""
        self.world.beat()
        self._borrow_again()
        self._mode(train=True)
        return self._engine(*args, **kwargs)

    @torch.no_grad()
    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Forward without gradients, dropout off. (collective under ZeRO-3)"""
        self.world.beat()
        self._borrow_again()
        self._mode(train=False)
        return self._engine(*args, **kwargs)

    def _mode(self, train: bool) -> None:
        if self._engine.module.training != train:  # DeepSpeed's own mode never changes; setting it walks through thousands of modules
            self._engine.train(train)

    def backward(self, loss_sum: Tensor, denominator: float) -> None:
        """Accumulate d(loss_sum / denominator), where `loss_sum` is this rank's part of a sum over all ranks and micro-batches of
        the optimizer step, and `denominator` the count over that whole step (trap 5). (collective)

        Raises RuntimeError when the first backward of a window leaves a trainable parameter without a gradient (trap 31).
        """
        self.world.beat()
        self.backward_passes += 1
        first = not self._window_open
        if first:
            self._untouched = set(self._trainable)
            self._window_open = True
        self._engine.backward(loss_sum * (self.world.size / denominator))
        if first and self._untouched:
            names = sorted(self._untouched)
            raise RuntimeError(
                f"{self.name}: the loss does not depend on {len(names)} trainable parameters, e.g. {names[:3]}: ZeRO-3 would step them with the "
                "gradient of an earlier step; freeze them (requires_grad=False) or use them in every loss"
            )

    def step(self) -> StepResult:
        """Apply what was accumulated since the last step, unless its norm over all ranks is not finite. (collective)"""
        self._verify_borrowed()
        self._may_change()
        rate = learning_rate_at(self.config, self.optimizer_steps, self.total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        if self._offloaded:
            self._offloaded.begin()
        self._borrowing = False  # DeepSpeed gives all weights back first
        try:
            self._engine.step()
        except BaseException:
            if self._offloaded:
                self._offloaded.abandon()
            raise
        if self._offloaded:
            self._offloaded.finish()
        self.optimizer_steps += 1
        self._window_open = False
        norm = self._norm0 if self.stage == 0 else self._engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        applied = math.isfinite(norm)
        if not applied and self.stage in (1, 2) and getattr(self._engine.optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 drops what it has summed up only where it lies on the device: what is not finite would stay in every later sum.
            sums = self._engine.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        return StepResult(norm, rate, applied)

    @torch.no_grad()
    def replicated(self) -> dict[str, Any]:
        """What must be the same on every rank, by name; of each parameter that a rank holds whole, the sum of its bits. Under ZeRO-3 those are the
        small ones that DeepSpeed never partitions, between steps."""
        whole = {n: p for n, p in self.module.named_parameters() if _shard(p) is None and getattr(p, "ds_persist", True)}
        sums = torch.stack([_sum_of_bits(p) for p in whole.values()]).tolist() if whole else []
        rates = [group["lr"] for group in self._engine.optimizer.param_groups]
        facts = {"optimizer steps": self.optimizer_steps, "backward passes": self.backward_passes, "learning rate": rates}
        return facts | {f"weights of {name}": bits for name, bits in zip(whole, sums, strict=True)}

    def full_tensors(self, layout: Sequence[WeightSource]) -> Iterator[tuple[str, Tensor]]:
        """`full_tensors` of this model's weights. (collective)"""
        self._verify_borrowed()
        return full_tensors(layout)

    def whole_weights(self, layout: Sequence[WeightSource]) -> dict[str, Tensor] | None:
        """The plain model's tensors where they lie; None where they are in parts (ZeRO-3) or stand for less than the model (adapters)."""
        if self.stage == 3 or any(source.lora_a is not None for source in layout):
            return None
        return {source.name: source.weight.detach() for source in layout}

    def hand_over(self, layout: Sequence[WeightSource], rollout: HybridEngine, lend: bool = False) -> None:
        """The rollout computes on the present weights: on these tensors themselves where it can, else on a copy with adapters merged.

        lend: this model computes on that copy in turn, so that ZeRO-3 gathers weights once per optimizer step instead of twice per forward and
        backward; not with adapters, which are merged there. The copy then stays on the device for good. (collective)"""
        if lend and self._lender and self._lender[1] is not rollout:
            raise RuntimeError(f"{self.name}: another rollout lends its weights already")
        if self._borrowing and self._lender and self._lender[1] is rollout:
            return  # no step since
        whole = self.whole_weights(layout)
        if whole is None or not rollout.borrow(whole):
            rollout.take_over(lambda weights: self.gather_into(layout, weights))
            if lend:
                self._lender = layout, rollout
                self._borrow(layout, rollout.lend())

    def _borrow(self, layout: Sequence[WeightSource], weights: dict[str, Tensor]) -> None:
        """Parameters point to whole weights from here to the next step. Those that DeepSpeed never partitions keep their own memory; without the mark
        it would give them back too, while it does not know the order of modules."""
        for source in layout:
            parameter: Any = source.weight
            assert source.lora_a is None and LENT not in parameter.ds_active_sub_modules, source.name
            if (shard := _shard(parameter)) is not None:
                whole = weights[source.name]
                assert whole.dtype == shard.dtype and whole.shape == _shape(parameter), source.name
                parameter.data = whole
                parameter.ds_status = ZeroParamStatus.AVAILABLE
            parameter.ds_active_sub_modules.add(LENT)
        self._borrowing = True

    def _borrow_again(self) -> None:
        """Hand over anew after a step, because the rollout's weights are those from before it. (collective)"""
        if self._lender and not self._borrowing:
            self.hand_over(*self._lender, lend=True)

    def _verify_borrowed(self) -> None:
        """RuntimeError if what has been computed on lent weights was computed on others than the model's. (waits for the device)"""
        if self._lender:
            self._lender[1].verify()

    @torch.no_grad()
    def gather_into(self, layout: Sequence[WeightSource], weights: dict[str, Tensor]) -> Tensor:
        """`gather_into` of this model's weights. (collective)"""
        self._hand_overs += 1
        if self._fitting is not weights:  # the same ones every time
            check_fit(layout, weights)
            self._fitting, self._copies = weights, Copies()
        return gather_into(layout, weights, self.world, self._hand_overs, self._copies)

    def full_parameters(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Whole copies on the host of some (small) parameters. (collective)"""
        with GatheredParameters(list(parameters.values())):
            return {name: p.detach().cpu().clone() for name, p in parameters.items()}

    def state_bytes(self) -> int:
        """Of this rank's `state_files`, about."""
        return state.nbytes(self._own_parts(), self._torch_optimizer)

    def states_to_come(self) -> int:
        """Bytes that the first optimizer step will take of the device, and keep: under every ZeRO stage moments are made there. 0 once they are."""
        parts = [part for part in self._parts() if part.master.device == self.world.device] if not self._offloaded else []
        return state.to_come(parts, self._torch_optimizer)

    def hold(self, until: torch.cuda.Event) -> None:
        """The next change of weights and optimizer states waits for this, on the device: they are being copied."""
        self._held = until

    def _may_change(self) -> None:
        if self._held is not None:
            torch.cuda.current_stream().wait_event(self._held)
            self._held = None

    def state_files(self, copy: state.Copy = state.copy_to_host) -> Iterator[state.TensorFile]:
        """Trained weights, optimizer states and the count of steps: this rank's own part (see `state`)."""
        with self._states_at_hand():
            yield from state.files(self._own_parts(), self._torch_optimizer, self.world.rank, {"optimizer_steps": self.optimizer_steps}, copy)

    def load(self, folder: Path) -> None:
        """What `state_files` gave, with any number of ranks and any ZeRO stage. ValueError where it is of another model. (collective)"""
        self._may_change()
        zero = self._engine.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # gives all weights back
            self._borrowing = False
        with self._states_at_hand(), torch.no_grad():
            facts = state.read(folder, self._parts(), list(self._trainable), self._torch_optimizer)
            if self.stage == 3:
                for weights, masters in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
                    if weights.data_ptr() != masters.data_ptr():
                        weights.copy_(masters)
            elif self.stage:
                zero.update_lp_params()
        if self.stage == 3:
            zero.checkpoint_event_epilogue()
        self.optimizer_steps = int(facts["optimizer_steps"])

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        zero: Any = self._engine.optimizer
        found: torch.optim.Optimizer = getattr(zero, "optimizer", zero)
        return found

    def _own_parts(self) -> list[state.Part]:
        """What this rank writes."""
        return [] if self.stage == 0 and not self.world.is_main else self._parts()

    def _parts(self) -> list[state.Part]:
        return state.parts_of(self._engine.optimizer, self._torch_optimizer, self._trainable, self.world.rank)


@contextlib.contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Bitwise reproducible kernels and reductions where torch has them. Entered before the process group exists: NCCL looks when it starts."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)  # warnings alone would let flash attention add its gradients up in any order
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice
    try:
        yield
    finally:
        if enabled:
            torch.use_deterministic_algorithms(False)
