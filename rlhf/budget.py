"""The budget of a forward: what a recipe leaves `auto` follows from the memory plan, and becomes smaller where it does not fit after all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf import files
from rlhf.config import Config, ModelConfig, Recomputed, TrainedModelConfig
from rlhf.memory import AROUND, GIB, MARGIN, Held, held_by, largest_forward, longest_row, most_scored, plan_of, releases

ROUND = 256  # tokens: a budget is a multiple of it
BUDGET = "budget.json"  # in the run folder: {key: value} of what was made smaller than the recipe has it, and under CHOSEN of what it leaves `auto`
CHOSEN = "chosen"
TOKENS, RELEASE, DECODED = "train.micro_batch_tokens", "rollout.release", "rollout.max_batch"
Value = int | str  # of a key; bool is an int


def smaller(config: Config, phase: str, longest: int, bounded: bool = False) -> tuple[str, int]:
    """(key, next smaller value) of what a phase's memory depends on: rows or tokens of a forward. When these can be no fewer, the rollout's memory is
    given back for the phase; at once where the plan bounds the KV cache (`Plan.cache`), which would take what fewer tokens leave. ValueError where
    nothing is left to change."""
    train, can_release = config.train, config.task == "rl" and not releases(config)
    if phase == "set-up":
        raise ValueError(
            "out of memory before the first step: the models alone, or the rollout's weights beside them, do not fit; use ZeRO-3 on more ranks, "
            "offload_optimizer, or LoRA"
        )
    if phase in ("hand_over", "save_checkpoint"):  # no forward: no number of tokens helps
        if can_release:
            return RELEASE, True
        raise ValueError(f"out of memory in phase {phase!r}, where only models are: use ZeRO-3 on more ranks, offload or LoRA")
    if config.task == "rl" and phase in ("gen", "testing"):
        key, value, least = DECODED, config.rollout.decoded // 2, 1
        mend = "lower rollout.memory_fraction, rollout.cache_tokens or rollout.prefill_tokens, or use more ranks under ZeRO-3"
    else:
        key, value, least = ("train.micro_batch", train.micro_batch // 2, 1)
        mend = "set offload or gradient_checkpointing, lower the longest row, or use more ranks under ZeRO-3"
        if train.forward_tokens:
            key, value, least = TOKENS, int(train.forward_tokens * 0.8) // ROUND * ROUND, ROUND
            if largest_forward(config, longest) > train.forward_tokens:
                value = 0  # a row has a forward of its own already
    if (value < least or bounded) and can_release and phase not in ("gen", "testing"):
        return RELEASE, True
    if value < least:
        raise ValueError(f"out of memory in phase {phase!r}, and {key} cannot be smaller: {mend}")
    return key, value


def with_value(config: Config, key: str, value: Value) -> Config:
    if key == "train.micro_batch":
        return config.model_copy(update={"train": config.train.with_micro_batch(int(value))})
    changed: Config = _with(config, key.split("."), value)
    return changed


def _with(node: Any, path: Sequence[str], value: Value) -> Any:
    first, *rest = path
    if isinstance(node, list):
        return [_with(entry, rest, value) if str(i) == first else entry for i, entry in enumerate(node)]
    return node.model_copy(update={first: _with(getattr(node, first), rest, value) if rest else value})


def with_values(config: Config, values: Mapping[str, Value]) -> Config:
    for key, value in values.items():
        config = with_value(config, key, value)
    return config


def value_of(config: Config, key: str) -> Value | None:
    """None where the recipe has no such key (any more)."""
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list):
            node = node[int(part)] if int(part) < len(node) else None
        else:
            node = getattr(node, part, None)
    value: Value | None = node
    return value


def read_budget(config: Config, origin: Path | None = None) -> Config:
    """The recipe with what earlier starts of this run folder have agreed on, where that is smaller.

    origin: the run folder whose checkpoint the run goes on from; what was chosen there for `auto` is taken. None: it is left to be chosen afresh.
    """
    taken = _kept(origin) if origin else {}
    for key, value in (chosen_before(origin) if origin else {}).items():
        if value_of(config, key) == "auto":
            config = with_value(config, key, min(value, taken.get(key, value)) if key in (TOKENS, DECODED) else value)
    for key, value in _kept(config.run_dir).items():
        now = value_of(config, key) if key != CHOSEN else None
        if isinstance(now, int) and (value < now or (key == RELEASE and value is True)):  # a recipe that budgets otherwise now is left alone
            config = with_value(config, key, value)
    return config


def chosen_before(run_dir: Path) -> dict[str, Value]:
    """What starts of this run folder have chosen for `auto`."""
    found: dict[str, Value] = _kept(run_dir).get(CHOSEN, {})
    return found


def _kept(run_dir: Path) -> dict[str, Any]:
    file = run_dir / BUDGET
    return files.read_object(file) if file.is_file() else {}


def write_budget(run_dir: Path, rank: int, key: str, value: Any) -> None:
    """Several ranks may write, the same."""
    file, own = run_dir / BUDGET, run_dir / f".{BUDGET}-{rank}"
    own.write_text(json.dumps({**_kept(run_dir), key: value}) + "\n")
    os.replace(own, file)


# --------------------------------------------------------------------------------------------------------------------------
# What the recipe leaves to the plan

ENOUGH = (4_096, 8_192)  # tokens from which on a forward is efficient; fewer are worth a recomputation. The more the smaller a layer is:
HIDES_HOST = 5e11  # multiply-adds of a layer's forward, 2 ms on an H100, beside which what it costs the host is believed to be hidden
MOST = 49_152  # the most that was measured: an update of a 0.5B model with LoRA takes 27 % less time than with 32,768
MOST_DECODED = 1_024  # a larger batch decodes hardly faster, and its cache is memory that the update has not
WITHOUT_GPU: Mapping[str, Value] = {"micro_batch_tokens": 16_384, "max_batch": 128, "gradient_checkpointing": False, "offload": False}
LEVELS: tuple[Recomputed, ...] = (False, "mlp", True)  # by what they cost
WORTH_SENDING = 0.25 * GIB  # less is not offloaded
HOST_SHARE = 0.6  # of the host memory may be pinned; the rest is for the processes themselves, and for files that are read and written


@dataclass(frozen=True)
class _Choice:
    """What is recomputed, by the order of the trained roles that leave it open, and whose tensors are sent to the host."""

    levels: tuple[Recomputed, ...]
    sent: tuple[str, ...] = ()

    @property
    def cost(self) -> tuple[int, int, int]:
        """Any recomputation costs more than all offload: docs/benchmarks/notes/step.md."""
        ranks = [LEVELS.index(level) for level in self.levels]
        return sum(ranks), max(ranks, default=0), len(self.sent)


def sections_of(config: Config) -> dict[str, str]:
    """Where the recipe has the roles that this run loads, by the names that `preflight.roles` gives them."""
    if config.task != "rl":
        name = "reward_model" if config.task == "reward_model" else "actor"
        return {name: name}
    own_reference = config.uses_reference and not (config.actor.lora and config.reference.path is None)
    names = ["actor", *["critic"] * config.algorithm.needs_critic, *["reference"] * own_reference]
    models = {c.label: f"reward.components.{i}.model" for i, c in enumerate(config.reward.components) if c.model}
    return {name: name for name in names} | models


def open_choices(config: Config) -> list[str]:
    """Keys of what this run computes with that are `auto`."""
    sections = sections_of(config).values()
    keys = [
        TOKENS,
        *[DECODED] * (config.task == "rl"),
        *(f"{section}.gradient_checkpointing" for section in sections),
        *(f"{section}.offload" for section in sections),
    ]
    return [key for key in keys if value_of(config, key) == "auto"]


def choose(
    config: Config,
    roles: Sequence[tuple[str, ModelConfig]],
    ranks: int,
    capacity: int | None,
    longest: int | None = None,
    host: int | None = None,
) -> tuple[dict[str, Value], str]:
    """Values for the keys that are `auto`, and a line that says why; a function of its arguments alone.

    capacity: bytes of the smallest rank's device, None without one. host: what a rank may have of its host's, None if not known. roles, longest: as
    for `plan_memory`. The budget of tokens is the largest whose update and scoring phases fit; offload and checkpointing are the least with which it
    is ENOUGH (or all there is), or those of the largest budget if it never is. By what they cost: frozen models leave, then the states of one trained
    role after the other, then (all these being gone) layers are computed again. So a larger device never means more offload, nor more recomputation
    in all. Where all of it is not enough the KV cache gives way (`memory.plan_of`).
    """
    keys, longest = open_choices(config), longest or longest_row(config)
    without: dict[str, Value] = {key: WITHOUT_GPU[key.rsplit(".", 1)[-1]] for key in keys}
    if capacity is None:
        return without, _line(without, "no GPU to measure by")
    rows = config.rollout.prompts * config.rollout.group_size if config.task == "rl" else 0
    most_decoded = int(WITHOUT_GPU["max_batch"]) if config.deterministic else MOST_DECODED  # whose cache must not be as memory allows
    decoded: dict[str, Value] = {DECODED: min(most_decoded, -(-rows // ranks))} if DECODED in keys else {}
    blank = with_values(config, without | decoded)  # which values the others are does not matter here
    sections = sections_of(config)
    recomputed = [name for name, section in sections.items() if f"{section}.gradient_checkpointing" in keys]
    movable = [name for name, section in sections.items() if f"{section}.offload" in keys]

    def resolved(name: str, role: ModelConfig) -> ModelConfig:
        opened = ["gradient_checkpointing"] * (name in recomputed) + ["offload"] * (name in movable)
        return role.model_copy(update=dict.fromkeys(opened, False))

    try:
        held = {name: held_by(blank, name, resolved(name, role), ranks, longest) for name, role in roles}
    except Exception as error:  # a forecast that fails is no reason not to train
        careful = without | {key: True for key in keys if key.endswith("gradient_checkpointing")}
        return careful, _line(careful, f"no plan of the memory: {error}")
    room, gib = capacity * (1 - MARGIN), f"{capacity / GIB:.1f} GiB less {MARGIN:.0%}"

    def values(choice: _Choice, tokens: int) -> dict[str, Value]:
        found = {**decoded, TOKENS: tokens} if TOKENS in keys else dict(decoded)
        found |= {f"{sections[name]}.gradient_checkpointing": level for name, level in zip(recomputed, choice.levels, strict=True)}
        return found | {f"{sections[name]}.offload": name in choice.sent for name in movable}

    def fullest(choice: _Choice, tokens: int, give_way: bool = False) -> tuple[float, str]:
        """(bytes, name) of the largest phase that depends on the choice. give_way: the KV cache, as far as it has to."""
        chosen, level = with_values(blank, values(choice, tokens)), dict(zip(recomputed, choice.levels, strict=True))
        size = largest_forward(chosen, longest)
        wanted = {}
        for name, h in held.items():
            forward = replace(h.forward, tokens=size, scored=most_scored(chosen, size), checkpointing=level.get(name, h.forward.checkpointing))
            wanted[name] = replace(h.offloaded() if name in choice.sent else h, forward=forward)
        plan = plan_of(chosen, wanted, ranks, longest, True, capacity, give_way)
        return max((plan.total(phase), phase) for phase in plan.phases if phase not in AROUND)

    row = longest * (2 if config.task == "reward_model" else 1)
    if TOKENS in keys:
        least = _rounded(row)
        most = max(least, min(MOST, _rounded(_share(config, ranks) * row)))
    else:  # the recipe's own
        least = most = largest_forward(blank, longest)
    shapes = [held[name].forward.shape for name, role in roles if isinstance(role, TrainedModelConfig)]
    layer = min(shape.block_params / shape.layers for shape in shapes)
    enough = min(max(ENOUGH[0], least, min(ENOUGH[1], int(HIDES_HOST / layer))), most)

    def budget(choice: _Choice, give_way: bool = False) -> int:
        """The largest that fits, by halving; 0 if none does."""
        low, high = 0, (most - least) // ROUND + 1  # steps above the least: all below `low` fit, those from `high` on are not to be tried
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fullest(choice, least + middle * ROUND, give_way)[0] <= room else (low, middle)
        return least + (low - 1) * ROUND if low else 0

    passed: list[tuple[int, _Choice]] = []
    smaller_cache = ""
    ladder = _ladder(held, recomputed, movable, None if host is None else host * HOST_SHARE)
    for choice in ladder:
        tokens = budget(choice)
        if tokens >= enough:
            break
        passed.append((tokens, choice))
    else:
        tokens, choice = max(reversed(passed), key=lambda found: found[0])
        if (more := min(budget(ladder[-1], give_way=True), enough)) > tokens:  # nothing is left but a smaller KV cache
            tokens, choice, smaller_cache = more, ladder[-1], ", beside a KV cache that has the rest"
    found = values(choice, tokens or least)
    size, phase = fullest(choice, tokens or least, give_way=bool(smaller_cache))
    why = f"{phase} takes {size / GIB:.1f} of {gib}{smaller_cache}"
    most_sent = ladder[-1].sent
    if host is not None and any(other.sent == most_sent for _, other in passed) and len(most_sent) < len(_worth_sending(held, movable)):
        why += f", and no more can be offloaded to the {host / GIB:.1f} GiB that a rank has on the host"
    if not tokens:
        return found, _line(found, f"{why}, though nothing smaller can be chosen: it may run out of memory")
    if TOKENS in keys and tokens == most:
        why += ", and larger forwards are not known to be faster" if most == MOST else ", and larger forwards have no rows to take"
    if others := [(count, other.cost, _named(recomputed, movable, other)) for count, other in passed if other.cost < choice.cost]:
        why += f"; {f'at most {max(others)[0]}' if max(others)[0] else 'no'} tokens fit with {max(others)[2]}"
    return found, _line(found, f"{why} (rows of at most {longest} tokens)")


def _worth_sending(held: Mapping[str, Held], movable: Sequence[str]) -> list[str]:
    return [name for name in movable if held[name].leaves >= WORTH_SENDING]


def _ladder(held: Mapping[str, Held], recomputed: Sequence[str], movable: Sequence[str], room: float | None) -> list[_Choice]:
    """By what they cost; each further one offloads at least what those before it do, and recomputes no less in all. room: bytes on the host."""
    levels = sorted(
        itertools.product(*(LEVELS if held[name].mlps else (False, True) for name in recomputed)), key=lambda levels: _Choice(levels).cost
    )
    worth, there = _worth_sending(held, movable), sum(h.on_host for h in held.values())
    frozen = tuple(name for name in worth if not held[name].trained)
    sent = [(), *[frozen] * bool(frozen)]
    for name in sorted((name for name in worth if held[name].trained), key=lambda name: -held[name].leaves):
        sent.append((*sent[-1], name))
    sent = [names for names in sent if not names or room is None or there + sum(held[name].leaves for name in names) <= room]
    return [_Choice(levels[0], names) for names in sent] + [_Choice(further, sent[-1]) for further in levels[1:]]


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def _share(config: Config, ranks: int) -> int:
    """Rows (pairs) of an optimizer step on a rank."""
    rows = config.rollout.prompts * config.rollout.group_size // config.algorithm.minibatches if config.task == "rl" else config.train.batch
    return -(-rows // ranks)


def _named(recomputed: Sequence[str], movable: Sequence[str], choice: _Choice) -> str:
    levels = [" ".join(f"{name}={_text(level)}" for name, level in zip(recomputed, choice.levels, strict=True))] * bool(recomputed)
    sent = [f"{' and '.join(choice.sent) or 'nothing'} offloaded"] * bool(movable)
    return ", ".join([*levels, *sent])


def _text(value: Value) -> str:
    return str(value).lower()


def _line(values: Mapping[str, Value], why: str) -> str:
    return f"auto: {' '.join(f'{key}={_text(value)}' for key, value in values.items())}: {why}"
