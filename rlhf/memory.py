"""What every phase of a run holds on one GPU, predicted in bytes from the recipe and the architectures alone. What follows from it: `rlhf.budget`.

Where the numbers come from: sizes of parameters and what a forward keeps (`rlhf.models.activations`) from the model itself, on the meta device; what
DeepSpeed 0.19.8 allocates, from its source. Left out: fragmentation of torch's allocator, and whatever lasts for less than a layer's backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from rlhf.config import (
    Config,
    ModelConfig,
    Recomputed,
    TrainedModelConfig,
    bucket_size,
    can_offload,
    hybrid_engine_words,
    role_dtype,
    role_settings,
    shares_base,
)
from rlhf.experience import needs_old_logprobs, scored_together
from rlhf.metrics.flops import ModelShape, model_shape
from rlhf.models.activations import Kept, count_kept
from rlhf.models.checkpointing import decoder_layers, known_mlps
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.loading import read_architecture, without_dropout
from rlhf.models.lora import TOGETHER, add_adapters, has_joined_mlps, kept_whole
from rlhf.models.scoring_head import has_plain_head
from rlhf.offload import PART, SLOTS
from rlhf.ops.head import CHUNK_BYTES
from rlhf.rollout import EngineSettings
from rlhf.rollout.decoder import is_lean
from rlhf.rollout.engine import least_pages, wanted_pages, working_bytes

GIB = 2**30
CONTEXT = 1.05 * GIB  # CUDA context, kernels, cuBLAS workspaces: 0.8 were seen on an H100, 1.3 on an H200
NCCL = 1.0 * GIB  # its buffers, once there are several ranks
MARGIN = 0.08  # of the device stays free: what is measured is mostly within a tenth of the plan, which leaves out the allocator's fragments
AROUND = ("gen", "testing", "hand_over", "save_checkpoint")  # phases whose memory does not depend on the budget of a forward
LIVE = 500_000_000  # elements that ZeRO-3 leaves gathered: half of stage3_max_reuse_distance, as the backward pass comes back over them
PREFETCHED = 50_000_000  # and gathers ahead: stage3_prefetch_bucket_size

# --------------------------------------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True)
class Forward:
    """One forward of a model: what its activations take."""

    shape: ModelShape
    size: int  # bytes of a number
    tokens: int
    scored: int  # tokens that the head sees
    vocabulary: int  # 1: a scalar head
    kept_of: Kept  # a token, if nothing is computed again
    checkpointing: Recomputed = False
    chunked: bool = True  # the head answers in chunks (`rlhf.ops.head`)
    head_trains: bool = True
    copies: float = 0.0  # bytes of weights that a layer has beside its adapters for a product (`models.lora`)

    @property
    def again(self) -> float:
        """Bytes of a token that the backward pass of a layer makes again, from its input or that of its MLP."""
        return self.kept_of.mlp if self.checkpointing == "mlp" else self.kept_of.layer if self.checkpointing else 0.0

    def kept(self) -> float:
        """From the forward to the backward pass: layers (of what is computed again its input only), what lies around them, head."""
        s, scalar = self.shape, self.vocabulary == 1
        instead = self.kept_of.entering if self.checkpointing == "mlp" else s.hidden * self.size if self.checkpointing else 0
        layers = s.layers * (self.kept_of.layer - self.again + instead)
        head = 4 * s.hidden + 8 if scalar else self.size * s.hidden + (16 if self.chunked else 4 * self.vocabulary)
        return self.tokens * (layers + self.kept_of.rest) + (self.tokens if scalar else self.scored) * head

    def passing(self, backward: bool) -> float:
        """Beside that, at the worst moment: in the head, or in one layer (which is computed again first, as far as it is not kept)."""
        s, size = self.shape, self.size
        wide = max(3 * s.inner, 2 * s.q_dim + 2 * s.kv_dim + (2 * s.q_dim if backward else 0)) + 2 * s.hidden
        layer = self.tokens * (size * wide + (self.again if backward else 0)) + self.copies
        if self.vocabulary == 1:
            return max(layer, 2.0 * self.tokens * 4 * s.hidden)
        logits = self.scored * self.vocabulary * size
        head = size * s.hidden * (self.scored + self.tokens) + (min(CHUNK_BYTES, logits) if self.chunked else logits + 8 * logits // size)
        if backward and self.head_trains:
            several = self.chunked and logits > CHUNK_BYTES
            head += self.vocabulary * s.hidden * (size + (4 if several else 0))
        return max(layer, head)


# --------------------------------------------------------------------------------------------------------------------------
# Roles


def blank_model(role: ModelConfig, architecture: PretrainedConfig, scalar: bool, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The role's model on the meta device, fused, adapters on; ValueError for adapters that do not fit."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        make: Any = AutoModel if scalar else AutoModelForCausalLM
        module: nn.Module = make.from_config(architecture, dtype=dtype, attn_implementation=role.attention, trust_remote_code=role.trust_remote_code)
        if scalar:
            module = ScalarModel(module, architecture.get_text_config().hidden_size)
        if not role.compile:
            fuse(module)  # before the adapters, as in the program: they look at what has been fused
        if isinstance(role, TrainedModelConfig) and role.lora:
            module = add_adapters(module, role.lora, seed)
            for name, parameter in module.named_parameters():
                if ".lora_" in name:  # peft gives adapters the base's dtype everywhere but on the meta device
                    parameter.data = parameter.data.to(dtype)
    return module


@dataclass(frozen=True)
class Held:
    """What one role keeps on a GPU from the start to the end, and how a forward of it is counted."""

    weights: float
    visiting: float  # weights that are there in its phase only (`offload`)
    gathered: float  # while it computes: what ZeRO-3 has brought together
    gradients: float
    buckets: float  # gradients on their way, while it learns
    master: float
    moments: float
    mlps: bool  # checkpointing of MLPs alone is possible
    passes: bool  # gradients are there from the first backward pass to the step only
    step: float  # beside all that while weights are stepped, when activations are gone
    plain: float  # the whole model without adapters
    uneven: float  # of it brought together at a time for the rollout, as ranks do not divide it (`engine._bring`)
    on_host: float  # pinned there (`offload`): weights, or master weights and moments
    trained: bool
    leaves: float  # what `offload` would put there; 0 where it is refused
    passing: float  # of that, on the device at once while weights are stepped
    forward: Forward

    def offloaded(self) -> Held:
        """The same with `offload`."""
        if self.trained:
            return replace(self, master=0.0, moments=0.0, step=self.step + self.passing, on_host=self.leaves)
        return replace(self, weights=self.weights - self.leaves, visiting=self.leaves, on_host=self.leaves)

    @property
    def items(self) -> dict[str, float]:
        """What it holds in every phase."""
        gradients = 0.0 if self.passes else self.gradients
        return {"weights": self.weights, "gradients": gradients, "master weights": self.master, "moments": self.moments}


def held_by(config: Config, name: str, role: ModelConfig, ranks: int, longest: int, on_gpu: bool = True) -> Held:
    """Raises ValueError as `role_settings` and `read_architecture` do, and for a model whose activations cannot be counted."""
    settings = role_settings(config, role, world_size=ranks, on_gpu=on_gpu)
    architecture = without_dropout(read_architecture(role, name))
    zero, lora = settings["zero_optimization"], role.lora if isinstance(role, TrainedModelConfig) else None
    trained, stage, scalar = isinstance(role, TrainedModelConfig), int(zero.get("stage", 0)), name not in ("actor", "reference")
    size = 2 if role_dtype(role, on_gpu) == "bfloat16" else 4
    module = blank_model(role, architecture, scalar, torch.bfloat16 if size == 2 else torch.float32)
    parameters = list(module.parameters())
    shares, whole = ranks if stage == 3 else 1, sum(p.numel() for p in parameters)
    threshold = int(zero.get("stage3_param_persistence_threshold", kept_whole(module, ranks, zero)))
    small = sum(p.numel() for p in parameters if p.numel() <= threshold) if shares > 1 else 0
    base = sum(p.numel() for p in parameters if not (trained and p.requires_grad)) if shares_base(role) else 0
    learns = [p.numel() for p in parameters if p.requires_grad] if trained else []
    sharded = sum(learns) / (ranks if stage else 1)
    layer = sum(p.numel() for p in decoder_layers(module)[0].parameters())
    most = max(p.numel() for p in parameters)
    gathered = min(whole, max(LIVE if trained else 0, most) + layer + PREFETCHED) if shares > 1 else 0

    cpu_adam = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    given = settings.get("optimizer", {"type": "adamw"})
    bucket = min(bucket_size(zero, learns), sum(learns))
    copies = {0: 0, 1: size == 4, 2: 1 + bool(zero.get("overlap_comm")), 3: 1}[stage]  # of the bucket
    text = architecture.get_text_config()
    shape = model_shape(architecture)
    tokens = largest_forward(config, longest)
    weights = size * ((whole - base - small) / shares + small)
    master = 0.0 if cpu_adam or stage == 0 or (stage == 3 and size == 4) else 4 * sharded
    moments = 0.0 if cpu_adam or "adam" not in str(given["type"]).lower() else 8 * sharded
    flushed = max([bucket, *learns])  # what is larger than the bucket goes alone
    stepped = max(4 * sharded, size * flushed + 4 * flushed / ranks) if stage >= 2 and learns else 0.0
    leaves = (master + moments if trained else weights - size * small) if can_offload(settings, role) else 0.0
    beside = size * 3.0 * shape.inner * (shape.hidden + 2 * lora.r) if lora and has_joined_mlps(module) else 0.0
    parts, plain = bool(known_mlps(module)), float(size * sum(p.numel() for n, p in module.named_parameters() if ".lora_" not in n))
    row = None if config.train.packing else longest
    known = (architecture.to_json_string(), size, scalar, repr(lora), role.attention, role.compile and on_gpu, row)
    uneven = [size * p.numel() for p in parameters if shares > 1 and p.numel() > threshold and p.numel() % ranks]
    held = Held(
        weights=weights,
        visiting=0.0,
        gathered=size * gathered,
        gradients=0.0 if cpu_adam and stage >= 2 else 4 * (sharded if stage >= 2 else float(sum(learns))),
        buckets=size * (copies * bucket + max(learns, default=0)),
        master=master,
        moments=moments,
        mlps=parts,
        passes=stage == 2 or (stage == 1 and size == 4),  # DeepSpeed has another optimizer for ZeRO-1 in bf16
        step=stepped,
        plain=plain,
        uneven=float(min(sum(uneven), TOGETHER + max(uneven, default=0))),
        on_host=0.0,
        trained=trained,
        leaves=leaves,
        passing=leaves * min(1.0, SLOTS * PART / sharded) if leaves and trained else 0.0,
        forward=Forward(
            shape,
            size,
            tokens,
            most_scored(config, tokens),
            1 if scalar else text.vocab_size,
            _kept_by(module, name, known) if trained else Kept(0.0, 0.0, 0.0, 0.0),
            checkpointing=isinstance(role, TrainedModelConfig) and role.recomputed,
            chunked=has_plain_head(text),
            head_trains=lora is None,
            copies=beside,
        ),
    )
    return held.offloaded() if role.offloaded else held


_counted: dict[tuple[Any, ...], Kept] = {}  # what is asked again in a run


def _kept_by(module: nn.Module, name: str, known: tuple[Any, ...]) -> Kept:
    """What the role's model keeps; `known`: all that it depends on, with the options of `count_kept` at the end. ValueError where it does not run on
    the meta device."""
    if known not in _counted:
        try:
            _counted[known] = count_kept(module, *known[-2:])
        except Exception as error:
            raise ValueError(f"{name}: what its activations take cannot be counted ({type(error).__name__}: {error})") from error
    return _counted[known]


def largest_forward(config: Config, longest: int) -> int:
    """Tokens of the largest forward of the update on a rank, padding included. longest: tokens of the longest row (one side of a pair)."""
    train, sides = config.train, 2 if config.task == "reward_model" else 1
    return max(train.forward_tokens, sides * longest) if train.forward_tokens else train.micro_batch * sides * longest


def most_scored(config: Config, tokens: int) -> int:
    """Of the tokens of a forward those that the head may see: of so many packed rows their responses, else all."""
    if config.task != "rl" or config.train.forward_tokens or not config.train.packing:
        return tokens
    return min(tokens, config.train.micro_batch * config.rollout.max_new_tokens)


def longest_row(config: Config) -> int:
    """Most tokens of a row, before the data is known."""
    return config.data.max_tokens if config.task != "rl" else config.data.max_prompt_tokens + config.rollout.max_new_tokens


# --------------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass
class Plan:
    """Bytes by phase and item."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    capacity: int | None = None  # of the device, where there is one
    on_host: dict[str, float] = field(default_factory=dict)  # pinned by each rank, by role
    cache: float | None = None  # bytes that the KV cache may have, where more would leave the other phases too little

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    def largest(self, phase: str, count: int = 4) -> str:
        """The phase's largest items, for a message."""
        if phase not in self.phases:
            return "not planned"
        items = sorted(self.phases[phase].items(), key=lambda item: -item[1])[:count]
        return f"{self.total(phase) / GIB:.1f} GiB, of it " + ", ".join(f"{name} {value / GIB:.1f}" for name, value in items)

    def table(self) -> list[str]:
        """A row for each item, a column for each phase, GiB."""
        names = list(dict.fromkeys(name for items in self.phases.values() for name in items))
        width = max(len(name) for name in [*names, "memory of one GPU, GiB"]) + 2
        columns = [max(len(phase), 6) + 2 for phase in self.phases]

        def row(name: str, cells: Iterable[str]) -> str:
            return f"  {name:<{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, columns, strict=True))

        lines = [row("memory of one GPU, GiB", self.phases)]
        lines += [row(name, (f"{items[name] / GIB:.2f}" if name in items else "" for items in self.phases.values())) for name in names]
        lines.append(row("sum", (f"{self.total(phase) / GIB:.2f}" for phase in self.phases)))
        if self.on_host:
            items = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self.on_host.items())
            lines.append(f"  pinned host memory of each rank, GiB: {items}")
        return lines + ([f"  the device has {self.capacity / GIB:.2f}"] if self.capacity else [])


def device_capacity() -> int | None:
    """Bytes of this rank's GPU, None without one."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else None


def host_capacity(ranks: int, system: Path = Path("/")) -> int | None:
    """Bytes of host memory for each of this machine's ranks: what is installed, or what the control groups around us (version 2) allow, whichever is
    less. Not what is free at the moment: a run that is started again must come to the same choice. None where nothing tells."""
    room: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
        room.append(int(lines["MemTotal"].split()[0]) * 1024)
    with contextlib.suppress(OSError):
        own = next((line[3:] for line in (system / "proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
        inner = Path("sys/fs/cgroup") / own.strip("/")
        for group in (system / folder for folder in (inner, *inner.parents)):
            with contextlib.suppress(OSError, ValueError):  # without a limit it says "max"
                room.append(int((group / "memory.max").read_text()))
    return min(room) // ranks if room else None


def plan_memory(
    config: Config,
    roles: Sequence[tuple[str, ModelConfig]],
    ranks: int,
    longest: int | None = None,
    on_gpu: bool = True,
    capacity: int | None = None,
) -> Plan:
    """roles: as `preflight.roles` lists them; longest: tokens of the longest row, if the data is known; capacity: bytes of the smallest device,
    None without one. The KV cache is bounded by that, if it is given, and by what the other phases need beside it; else it has all that it asks for.
    A function of its arguments alone, as all ranks must come to the same plan. Raises ValueError as `held_by` does."""
    longest = longest or longest_row(config)
    held = {name: held_by(config, name, role, ranks, longest, on_gpu) for name, role in roles}
    return plan_of(config, held, ranks, longest, on_gpu, capacity)


def plan_of(config: Config, held: Mapping[str, Held], ranks: int, longest: int, on_gpu: bool, capacity: int | None, give_way: bool = True) -> Plan:
    """The same from what the roles hold; capacity: bytes of the device, None without one. give_way: the KV cache has no more than the other phases
    leave it, where it is neither given (`rollout.cache_tokens`) nor released before them, and may depend on the device at all (`deterministic`)."""
    plan = _plan_of(config, held, ranks, longest, on_gpu, capacity, None)
    if not give_way or not capacity or config.task != "rl" or config.rollout.cache_tokens or releases(config) or config.deterministic:
        return plan
    most, cache = max(plan.total(phase) for phase in plan.phases if phase not in AROUND), plan.phases["gen"].get("rollout: KV cache", 0.0)
    if most <= capacity * (1 - MARGIN):
        return plan
    left = cache - (most - capacity * (1 - MARGIN))
    # The plan is good to a tenth: for the margin's sake the cache does not become less than a quarter.
    return _plan_of(config, held, ranks, longest, on_gpu, capacity, max(left, min(cache / 4, cache - (most - capacity))))


def releases(config: Config) -> bool:
    """Whether the rollout's memory is given back before anything is scored or learnt."""
    return config.rollout.release or bool(hybrid_engine_words(config)["release"])


def borrows_weights(config: Config, ranks: int, on_gpu: bool) -> bool:
    """Whether the rollout computes on the actor's own weights (`HybridEngine.borrow`): where every rank has them whole, and flat groups lie as the
    lean decoder needs them."""
    stage = int(role_settings(config, config.actor, world_size=ranks, on_gpu=on_gpu)["zero_optimization"].get("stage", 0))
    return config.actor.lora is None and (stage in (1, 2) or (stage == 0 and not is_lean(read_architecture(config.actor, "actor"))))


def lends_weights(config: Config, ranks: int, on_gpu: bool) -> bool:
    """Whether the actor computes on the rollout's whole copy of its weights (`TrainEngine.hand_over`): where ZeRO-3 would gather the same, and the
    copy stays on the device anyway. Not where the JSON asks for another way to gather."""
    zero = role_settings(config, config.actor, world_size=ranks, on_gpu=on_gpu)["zero_optimization"]
    if zero.get("stage3_module_granularity_threshold") or int(zero.get("zero_hpz_partition_size", 1)) > 1:
        return False  # the one gives lent weights back regardless, the other copies them
    on_device = (zero.get("offload_param") or {}).get("device", "none") == "none"
    return int(zero.get("stage", 0)) == 3 and on_device and ranks > 1 and config.actor.lora is None and not releases(config)


def _plan_of(
    config: Config, held: Mapping[str, Held], ranks: int, longest: int, on_gpu: bool, capacity: int | None, most_cache: float | None
) -> Plan:
    always = {"CUDA" + (" and NCCL" if ranks > 1 else ""): CONTEXT + (NCCL if ranks > 1 else 0.0)}
    always |= {f"{name}: {item}": value for name, h in held.items() for item, value in h.items.items() if value}
    plan = Plan(capacity=capacity, on_host={name: h.on_host for name, h in held.items() if h.on_host})

    def update(name: str) -> dict[str, float]:
        h = held[name]
        peak = {f"{name}: activations": h.forward.kept(), f"{name}: backward": h.forward.passing(backward=True)}
        if sum(peak.values()) < h.step:
            peak = {f"{name}: step": h.step}
        return {f"{name}: gathered": h.gathered, f"{name}: gradients": h.gradients, f"{name}: buckets": h.buckets, **peak}

    def save(name: str) -> dict[str, float]:
        return {f"{name}: gathered": min(held[name].gathered, TOGETHER)} if config.checkpoint.save_hf else {}

    if config.task != "rl":
        (name,) = held
        h = held[name]
        plan.phases["update_" + name] = _present(always | update(name))
        if config.validation.data:
            plan.phases["testing"] = _present(always | {f"{name}: gathered": h.gathered, f"{name}: forward": h.forward.passing(backward=False)})
        plan.phases["save_checkpoint"] = _present(always | save(name))
        return plan

    rollout, architecture = config.rollout, read_architecture(config.actor, "actor")
    prompts = max(1, longest - rollout.max_new_tokens) * -(-rollout.prompts // ranks)  # tokens of a rank's
    sizes = EngineSettings(max_batch=rollout.decoded, cache_tokens=rollout.cache_tokens, prefill_tokens=min(rollout.prefill_tokens, prompts))
    actor, lean = held["actor"], is_lean(architecture)
    if lends_weights(config, ranks, on_gpu):
        held = {**held, "actor": replace(actor, gathered=0.0)}
    size, shape = actor.forward.size, actor.forward.shape
    dtype = torch.bfloat16 if size == 2 else torch.float32
    own = {} if borrows_weights(config, ranks, on_gpu) else {"rollout: weights": actor.plain}
    working = working_bytes(architecture, sizes, dtype)
    page = shape.layers * 2 * sizes.page_size * shape.kv_dim * size
    pool = float(wanted_pages(sizes, longest) * page)
    if capacity and not rollout.cache_tokens:
        returning = sum(h.weights + h.visiting for h in held.values() if h.visiting)
        free = capacity - sum(always.values()) - sum(own.values()) - working - returning
        pool = min(pool, max(0.0, free * rollout.memory_fraction))
    if most_cache is not None:  # at least one sequence
        plan.cache = pool = min(pool, max(most_cache, float(least_pages(sizes, longest) * page)))
    cache = {**own, "rollout: KV cache": pool}
    after = {} if releases(config) else cache

    # Frozen models come before they score, all at once. Each reward model goes then, the reference after the last scoring forward.
    visitors = {f"{name}: weights": h.weights + h.visiting for name, h in held.items() if h.visiting}
    visiting = {item: value for item, value in visitors.items() if item == "reference: weights"}
    judges = {name: h.gathered + h.forward.passing(backward=False) for name, h in held.items() if not h.trained and name != "reference"}

    several = scored_together(config, lean and all(held[n].forward.chunked for n in ("actor", "reference") if n in held), on_gpu)

    def score(name: str, together: int = several) -> dict[str, float]:
        h = held[name]
        f = h.forward
        wider = Forward(f.shape, f.size, together * f.tokens, together * f.scored, f.vocabulary, f.kept_of, chunked=f.chunked)
        return visiting | {f"{name}: gathered": h.gathered, f"{name}: forward": wider.passing(backward=False)}

    plan.phases["gen"] = _present(always | cache | {"rollout: prefill and logits": float(working)})
    judging: dict[str, float] = {}
    if judges:
        name = max(judges, key=lambda name: judges[name])
        h = held[name]
        judging = visitors | {f"{name}: gathered": h.gathered, f"{name}: forward": h.forward.passing(backward=False)}
        plan.phases["reward"] = _present(always | after | judging)
    if config.uses_reference:
        plan.phases["ref"] = _present(always | after | score("reference" if "reference" in held else "actor"))
    if "critic" in held:
        plan.phases["values"] = _present(always | after | score("critic"))
    if needs_old_logprobs(config, config.algorithm.critic_warmup_steps + 1):
        plan.phases["old_log_prob"] = _present(always | after | score("actor", 1))
    for name in ("actor", "critic"):
        if name in held:
            plan.phases[f"update_{name}"] = _present(always | after | update(name))
    plan.phases["hand_over"] = _present(always | (own if releases(config) else cache) | {"actor: gathered": actor.uneven})
    if config.validation.data:  # a rollout, and then the reward models beside its cache
        plan.phases["testing"] = max(plan.phases["gen"], _present(always | cache | judging), key=lambda items: sum(items.values()))
    plan.phases["save_checkpoint"] = _present(always | after | save("actor"))
    return plan


def _present(items: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in items.items() if value}


# --------------------------------------------------------------------------------------------------------------------------
# Measured


def is_out_of_memory(error: BaseException | None) -> bool:
    """Of the device, whoever found out: torch's allocator, CUDA (for a graph, say), cuBLAS, NCCL or Triton."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text))


def of_others(ranks: int) -> float:
    """Bytes of this rank's device that other processes hold, as far as it can be told: asked before anything of ours is there. 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return max(0.0, total - free - torch.cuda.memory_reserved() - CONTEXT - (NCCL if ranks > 1 else 0.0))


def held_now() -> str:
    """Of the device, now and at most since the meter last looked, for a message; empty without one."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    now, most = torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    return f"it held {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB, {now:.1f} of them in tensors ({most:.1f} at most)"


class MemoryMeter:
    """Peak bytes of each phase of the first step, of this rank: what torch has allocated, and what the device has given to anybody but torch's
    allocator (CUDA context, NCCL, the rollout's mapped buffers). What torch keeps for reuse without using it is not counted: it gives that back
    before it fails. others: bytes that are not ours (`of_others`). On CPU nothing is measured."""

    def __init__(self, on_gpu: bool, others: float = 0.0) -> None:
        self.measuring, self.others = on_gpu, others
        self.peaks: dict[str, float] = {}
        self.taken: dict[str, float] = {}  # all that is taken of the device when a phase ends, whoever has it and whether it is used or not
        self._allocated = 0.0  # most so far; torch's own mark is set back for each phase

    def begin(self) -> None:
        if self.measuring:
            torch.cuda.reset_peak_memory_stats()

    def end(self, phase: str) -> None:
        if not self.measuring:
            return
        free, total = torch.cuda.mem_get_info()
        allocated = float(torch.cuda.max_memory_allocated())
        self._allocated = max(self._allocated, allocated)
        self.taken[phase] = max(self.taken.get(phase, 0.0), float(total - free))
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), allocated + total - free - torch.cuda.memory_reserved() - self.others)

    def most_allocated_mb(self) -> float | None:
        """Of the whole run; None without a GPU."""
        return max(self._allocated, torch.cuda.max_memory_allocated()) / 2**20 if torch.cuda.is_available() else None

    def compare(self, plan: Plan) -> tuple[dict[str, float], list[str]]:
        """After the first step: metrics in GB, and what to say of phases that are more than 10 % off. Measures no more."""
        if not self.measuring:
            return {}, []
        self.measuring = False
        metrics: dict[str, float] = {}
        off = []
        for phase, measured in self.peaks.items():
            if phase in plan.phases:
                planned = plan.total(phase)
                metrics |= {f"memory/{phase}_gb": measured / 1e9, f"memory/{phase}_planned_gb": planned / 1e9}
                if abs(measured - planned) > 0.1 * planned:
                    off.append(f"{phase} {measured / GIB:.1f} of {planned / GIB:.1f}")
        return metrics, [f"memory, GiB measured of planned: {', '.join(off)}"] if off else []
