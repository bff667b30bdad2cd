"""What can be checked and said of a run before any model loads; `--dry_run` prints it."""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers import PretrainedConfig

from rlhf.budget import choose, open_choices, sections_of, with_values
from rlhf.config import (
    Config,
    ModelConfig,
    RewardComponentConfig,
    RewardModelConfig,
    TrainedModelConfig,
    critic_origin,
    hybrid_engine_words,
    role_dtype,
    role_settings,
    shares_base,
    to_yaml,
)
from rlhf.data import load_preferences, load_prompts, load_sequences, read_rows
from rlhf.distributed import launch_environment
from rlhf.memory import blank_model, borrows_weights, device_capacity, host_capacity, lends_weights, longest_row, plan_memory
from rlhf.metrics import model_shape
from rlhf.models.checkpointing import mlps
from rlhf.models.compiling import check_compile
from rlhf.models.loading import check_weights, load_tokenizer, read_architecture, read_tokenizer
from rlhf.models.lora import check_adapter
from rlhf.models.packing import check_packing, check_positions
from rlhf.rewards.functions import FunctionReward
from rlhf.rollout import EngineSettings
from rlhf.rollout.decoder import is_lean
from rlhf.rollout.engine import check_cache
from rlhf.rollout.generic import refuse_unsupported
from rlhf.secrets import masked

SHARDED = {
    0: "whole on every rank",
    1: "weights whole, optimizer sharded",
    2: "weights whole, gradients and optimizer sharded",
    3: "sharded over all ranks",
}


def check(config: Config, world_size: int, on_gpu: bool) -> None:
    """Model folders, DeepSpeed settings and reward functions of every role exist and fit; ValueError names the key and the mend."""
    for name, role in roles(config):
        architecture = read_architecture(role, name)
        if config.train.packing and role.attention != "sdpa":
            raise ValueError(
                f"{name}.attention={role.attention}: packed rows have an attention of their own (torch's varlen_attn on a GPU); leave it out, or set "
                "train.packing=false"
            )
        if config.train.packing:
            check_packing(architecture, name, role.trust_remote_code)
        plain = _blank(name, role, architecture)
        check_positions(plain, name)
        if role.path is not None:
            try:
                check_weights(plain, role.path, optional=() if _needs_head(config, name, role) else ("score.weight",))
            except ValueError as error:
                raise ValueError(f"{sections_of(config)[name]}.path={error}") from None
        if isinstance(role, TrainedModelConfig) and role.lora:
            try:
                blank_model(role, architecture, name not in ("actor", "reference"), torch.bfloat16)
            except ValueError as error:
                raise ValueError(f"{name}.lora: {error}") from None
        if isinstance(role, TrainedModelConfig) and role.gradient_checkpointing == "mlp":
            mlps(_blank(name, role, architecture), name)
        settings = role_settings(config, role, world_size=world_size, on_gpu=on_gpu)
        if role.compile:
            check_compile(_blank(name, role, architecture), name, settings["zero_optimization"].get("stage", 0), on_gpu)
    if config.task == "rl":
        hybrid_engine_words(config)
        refuse_unsupported(read_architecture(config.actor, "actor"), config.rollout.max_new_tokens)
        check_cache(EngineSettings(cache_tokens=config.rollout.cache_tokens), config.rollout.max_new_tokens + 1)  # the data may be longer
        _check_tokenizers(config)
        for i, component in enumerate(config.reward.components):
            if component.function:
                FunctionReward(component)
            if component.model and component.model.share_base and config.actor.path:
                check_adapter(component.model.path, config.actor.path, f"reward.components.{i}.model")
        if config.validation.verifier:
            FunctionReward(RewardComponentConfig(function=config.validation.verifier))


def check_data(config: Config, rows: bool = False) -> None:
    """Every source is there and can be read; rows: its first row is what the task needs, too (a start reads all). ValueError names the key."""
    load = {"sft": load_sequences, "reward_model": load_preferences, "rl": load_prompts}[config.task]
    data = config.data.model_copy(update={"max_prompt_tokens": 1 << 40, "max_tokens": 1 << 40})
    for section, sources in (("data.train", config.data.train), ("validation.data", config.validation.data)):
        for i, source in enumerate(sources):
            first = source.model_copy(update={"size": 1})
            try:
                next(read_rows(first), None)
                if rows and data.on_bad_row == "error":
                    assert config.train_path is not None
                    role = config.reward_model if config.task == "reward_model" else config.actor
                    load([first], data, load_tokenizer(config.train_path, role.trust_remote_code))
            except ValueError as error:
                key = section if len(sources) == 1 else f"{section}.{i}"
                said = str(error)
                raise ValueError(said.replace("data source ", f"{key}.", 1) if said.startswith("data source ") else f"{key}: {said}") from None


def _needs_head(config: Config, name: str, role: ModelConfig) -> bool:
    """Whether the folder must hold the scalar head."""
    if name in ("actor", "reference", "reward_model"):
        return False
    return config.critic.head == "keep" if name == "critic" else not shares_base(role)


def _blank(name: str, role: ModelConfig, architecture: PretrainedConfig) -> nn.Module:
    """The role's model on the meta device, without adapters. ValueError names the key of an attention that there is not."""
    try:
        return blank_model(role.model_copy(update={"lora": None}), architecture, name not in ("actor", "reference"), torch.bfloat16)
    except (ImportError, ValueError) as error:
        if role.attention in ("sdpa", "eager"):
            raise
        raise ValueError(f"{name}.attention={role.attention}: {error}") from None


def _check_tokenizers(config: Config) -> None:
    """Every role reads the actor's token ids: another vocabulary would score other words without an error."""
    assert config.actor.path is not None
    vocabulary = read_tokenizer(config.actor.path, config.actor.trust_remote_code).get_vocab()
    for name, role in roles(config):
        if role.path is None or role.path == config.actor.path or not (role.path / "tokenizer_config.json").is_file():
            continue
        other = read_tokenizer(role.path, role.trust_remote_code).get_vocab()
        if other != vocabulary:
            raise ValueError(
                f"{name}: the tokenizer in {role.path} is not the actor's ({config.actor.path}): it would read the actor's token ids as other words; "
                "train it on a model with the actor's tokenizer"
            )


def describe(config: Config) -> str:
    """Resolved config, batch arithmetic, and which model sits where under which DeepSpeed settings. What is `auto` is chosen for the GPU here,
    if there is one, and the longest row that the recipe allows; a run knows its data."""
    _, world_size, _, local_size = launch_environment()
    on_gpu = torch.cuda.is_available()
    check(config, world_size, on_gpu)
    check_data(config, rows=True)
    chosen: list[str] = []
    if open_choices(config):
        values, line = choose(config, roles(config), world_size, device_capacity(), host=host_capacity(local_size))
        config, chosen = with_values(config, values), ["", line]
    lines = [
        to_yaml(config),
        f"ranks: {world_size} ({'GPU' if on_gpu else 'CPU'})",
        "",
        "batch arithmetic",
        *(f"  {line}" for line in arithmetic(config, world_size)),
        *chosen,
    ]
    lines += ["", "models"]
    for name, role in roles(config):
        settings = role_settings(config, role, world_size=world_size, on_gpu=on_gpu)
        trained = isinstance(role, TrainedModelConfig)
        stage = settings["zero_optimization"].get("stage", 0)
        kind = ("LoRA" if role.lora else "trained") if isinstance(role, TrainedModelConfig) else "frozen"
        kind += " on the actor's base" if shares_base(role) else ""
        kind += (", states" if trained else ", weights") + " on the host while unused" if role.offloaded else ""
        architecture = read_architecture(role, name)
        lines.append(
            f"  {name}: {role.path} ({architecture.model_type}, {parameters(architecture) / 1e6:.1f} M), {kind}, {role_dtype(role, on_gpu)}, "
            f"ZeRO-{stage}: {SHARDED[stage]}" + (f", learning rate {role.learning_rate:g}" if trained else "")
        )
        lines.append(f"    DeepSpeed: {json.dumps(masked(settings))}")
    if config.task == "rl":
        lines.append(f"  rollout: {decoding(config, world_size, on_gpu)}")
        if config.uses_reference and config.actor.lora and config.reference.path is None:
            lines.append("  reference: the actor with its adapters off")
    where = "as on a GPU, where dtype=auto is bfloat16; " if not on_gpu else ""
    most = "data.max_prompt_tokens + rollout.max_new_tokens" if config.task == "rl" else "data.max_tokens"
    lines += ["", f"  planned {where}for rows of {longest_row(config)} tokens ({most}); a run knows how long its rows are"]
    try:
        lines += plan_memory(config, roles(config), world_size, capacity=device_capacity()).table()  # of a GPU, wherever this is asked
    except ValueError as error:
        lines.append(f"  memory of a GPU: {error}")
    return "\n".join(lines)


def decoding(config: Config, world_size: int, on_gpu: bool) -> str:
    """Which decoder the rollout has, and whose weights."""
    architecture = read_architecture(config.actor, "actor")
    way = "lean decoder" if is_lean(architecture) else "transformers' own forward on a paged cache"
    if borrows_weights(config, world_size, on_gpu):
        return f"{way}; on the actor's own weights"
    size = parameters(architecture) * (2 if role_dtype(config.actor, on_gpu) == "bfloat16" else 4) / 2**30
    use = ", adapters merged" if config.actor.lora else ""
    if lends_weights(config, world_size, on_gpu):
        return f"{way}; a whole copy of the actor on every rank ({size:.2f} GiB), gathered once per optimizer step: the actor computes on it too"
    return f"{way}; a whole copy of the actor on every rank ({size:.2f} GiB), filled once per rollout phase{use}"


def arithmetic(config: Config, world_size: int) -> list[str]:
    micro, tokens = config.train.micro_batch, config.train.forward_tokens

    def forwards(rows: int) -> str:
        count = f"forwards of at most {tokens} tokens" if tokens else f"{-(-rows // (micro * world_size))} forwards of {micro} rows"
        return f"{count} on each of {world_size} ranks"

    if config.task != "rl":
        return [f"one optimizer step = {config.train.batch} rows = {forwards(config.train.batch)}"]
    rollout, algorithm = config.rollout, config.algorithm
    rows = rollout.prompts * rollout.group_size
    minibatch = rows // algorithm.minibatches
    return [
        f"one rollout batch = {rollout.prompts} prompts x {rollout.group_size} samples = {rows} responses of at most {rollout.max_new_tokens} tokens",
        f"  {-(-rollout.prompts // world_size)} prompts on a rank, decoded in batches of at most {rollout.decoded} rows",
        f"one step = {algorithm.epochs} epochs x {algorithm.minibatches} minibatches = {algorithm.epochs * algorithm.minibatches} optimizer steps",
        f"one minibatch = {minibatch} responses = {forwards(minibatch)}",
        f"whole run = {config.train.steps} steps, {(config.train.steps or 0) * rows} responses",
    ]


def roles(config: Config) -> list[tuple[str, ModelConfig]]:
    """(name, role) of every model that will be loaded, with its path filled in."""
    if config.task == "sft":
        return [("actor", config.actor)]
    if config.task == "reward_model":
        return [("reward_model", config.reward_model)]
    found: list[tuple[str, ModelConfig]] = [("actor", config.actor)]
    reward_models = [(c.label, _with_body(config, c.model)) for c in config.reward.components if c.model]
    if config.algorithm.needs_critic:
        found.append(("critic", config.critic.model_copy(update={"path": critic_origin(config)})))
    if config.uses_reference and not (config.actor.lora and config.reference.path is None):
        found.append(("reference", config.reference.model_copy(update={"path": config.reference.path or config.actor.path})))
    return found + reward_models


def _with_body(config: Config, model: RewardModelConfig) -> RewardModelConfig:
    """Under `share_base` the path is that of adapters; the body is the actor's."""
    return model.model_copy(update={"path": config.actor.path}) if model.share_base else model


def parameters(architecture: PretrainedConfig) -> int:
    """Matrix weights: blocks, embedding, and the head where it is not tied."""
    shape = model_shape(architecture)
    tied = getattr(architecture, "tie_word_embeddings", False)
    return shape.block_params + shape.head_params * (1 if tied else 2)
