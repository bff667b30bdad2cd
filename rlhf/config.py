"""The configuration tree: strict, typed, checked before any model loads. Imports no torch.

A recipe is a YAML file; `key.sub=value` overrides on the command line win over it. Unknown keys fail with the nearest name,
values out of range with the key and the mend, DeepSpeed settings that contradict the recipe with both numbers.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rlhf.secrets import HIDDEN, masked, secrets_in

ROOT = Path(__file__).resolve().parent.parent

# What users of TRL, OpenRLHF and transformers type, and what it is called here.
FOREIGN_NAMES = {
    "num_generations": "rollout.group_size",
    "n_samples_per_prompt": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "generate_max_len": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "beta": "algorithm.kl.coef",
    "kl_coef": "algorithm.kl.coef",
    "init_kl_coef": "algorithm.kl.coef",
    "epsilon": "algorithm.clip_eps_low",
    "epsilon_low": "algorithm.clip_eps_low",
    "epsilon_high": "algorithm.clip_eps_high",
    "cliprange": "algorithm.clip_eps_low",
    "cliprange_value": "algorithm.value_clip",
    "vf_coef": "critic.learning_rate",
    "num_iterations": "algorithm.epochs",
    "num_ppo_epochs": "algorithm.epochs",
    "ppo_epochs": "algorithm.epochs",
    "num_mini_batches": "algorithm.minibatches",
    "scale_rewards": "algorithm.group_scale",
    "lam": "algorithm.gae_lambda",
    "learning_rate": "actor.learning_rate",
    "actor_learning_rate": "actor.learning_rate",
    "critic_learning_rate": "critic.learning_rate",
    "lr_scheduler_type": "actor.schedule",
    "warmup_ratio": "actor.warmup_steps",
    "warmup_steps": "actor.warmup_steps",
    "weight_decay": "actor.weight_decay",
    "max_grad_norm": "actor.max_grad_norm",
    "gradient_clipping": "actor.max_grad_norm",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch (accumulation follows from it)",
    "train_batch_size": "train.batch",
    "rollout_batch_size": "rollout.prompts",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "validation.every",
    "report_to": "tracking.wandb",
    "run_name": "tracking.name",
    "output_dir": "run_dir",
    "save_path": "run_dir",
    "model_name_or_path": "actor.path",
    "pretrain": "actor.path",
    "model": "actor.path",
    "gradient_checkpointing": "actor.gradient_checkpointing",
    "torch_compile": "actor.compile",
    "bf16": "actor.dtype",
    "temperature": "rollout.temperature",
    "use_peft": "actor.lora",
    "lora_r": "actor.lora.r",
    "lora_rank": "actor.lora.r",
    "missing_eos_penalty": "reward.missing_eos_penalty",
    "reward_funcs": "reward.components",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True)


Recomputed = bool | Literal["mlp"]  # of each decoder layer in the backward pass


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class LoraConfig(Section):
    """LoRA through peft (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="scale: the update is B A alpha / r")
    dropout: float = Field(0.0, ge=0, le=0, description="only 0: dropout makes the update's logprobs differ from the rollout's (trap 2)")
    target_modules: str | list[str] = Field("all-linear", description="module names as peft understands them")


class ModelConfig(Section):
    """A model that is read from a folder of safetensors."""

    path: Path | None = Field(None, description="folder in Hugging Face format (config.json, *.safetensors, tokenizer)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, float32 on CPU")
    attention: str = Field("sdpa", description="attn_implementation of transformers, for padded rows (packing=false); packed ones have their own")
    trust_remote_code: bool = Field(False, description="run code that the model folder ships")
    deepspeed: str | dict[str, Any] | None = Field(None, description="DeepSpeed JSON (path or mapping) for this role; default: the top-level one")
    compile: bool = Field(
        False,
        description="torch.compile of each decoder layer, from transformers' own operations, in the place of the fused kernels; the first forwards "
        "compile. Needs a C compiler and Triton on a GPU, a C++ compiler without one",
    )
    offload: bool | Literal["auto"] = Field(
        False,
        description="in pinned host memory while unused (trained: master weights and moments, which pass over the GPU in parts when weights are "
        "stepped, ZeRO 1-3; frozen: the weights, outside of their phase). auto: where the memory plan lacks room otherwise, frozen models first; "
        "false without a GPU and where true is refused",
    )

    @property
    def offloaded(self) -> bool:
        """`offload`, once `auto` has been resolved (`budget.choose`)."""
        if self.offload == "auto":
            raise RuntimeError("offload=auto is read before it was resolved")
        return self.offload


class TrainedModelConfig(ModelConfig):
    gradient_checkpointing: bool | Literal["mlp", "auto"] = Field(
        False,
        description="recompute activations in the backward pass: of whole layers (true), or of their MLPs, the widest (mlp). auto: as little as "
        "the memory plan has room for, false without a GPU",
    )
    lora: LoraConfig | None = Field(None, description="train LoRA adapters instead of all weights")
    learning_rate: float = Field(1e-6, ge=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay after the warm-up, over the run's optimizer steps")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="floor of the schedule, as a share of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; never on biases, norms and other one-dimensional weights")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moments")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="global gradient norm clip; 0 = off")

    @property
    def recomputed(self) -> Recomputed:
        """`gradient_checkpointing`, once `auto` has been resolved (`budget.choose`)."""
        if self.gradient_checkpointing == "auto":
            raise RuntimeError("gradient_checkpointing=auto is read before it was resolved")
        return self.gradient_checkpointing


class CriticConfig(TrainedModelConfig):
    init: Literal["actor", "reward", "path"] = Field(
        "actor", description="where the body comes from: the actor's folder, the first reward model, or `path`"
    )
    head: Literal["zero", "keep"] = Field("zero", description="zero: values start at 0 (trap 15); keep: the head that the folder holds")
    share_base: bool = Field(
        False,
        description="under actor.lora: the body is the actor's frozen base, held once; adapters (`lora`, default: the actor's) and head are its own",
    )
    learning_rate: float = Field(1e-5, ge=0, description="peak learning rate")
    dropout: float = Field(0.0, ge=0, le=0, description="only 0 (trap 2)")


class RewardModelConfig(ModelConfig):
    """A frozen reward model, as the task reward_model writes it."""

    share_base: bool = Field(
        False,
        description="under actor.lora: the body is the actor's frozen base, held once; `path` is the folder adapter/ of a run with reward_model.lora",
    )


class SourceConfig(Section):
    """Rows from a file (`path`) or from a task generator of the package reasoning-gym (`task`); exactly one of both."""

    path: Path | None = Field(None, description="jsonl, json, parquet or csv file, or a folder written by datasets.save_to_disk")
    task: str | None = Field(None, description="name of a reasoning-gym task")
    task_config: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that task")
    size: int | None = Field(None, ge=1, description="rows to take (files: the first `size`; tasks: how many to generate; tasks default to 1,000)")
    seed: int = Field(
        0,
        ge=0,
        description="seed of the task generator; row i is made from seed + i, so keep the seeds of two sources further apart than their sizes",
    )
    name: str | None = Field(None, description="name in metrics; default: the file's stem or the task's name")
    prompt_key: str = Field("prompt", description="column of the prompt: text or a list of {role, content}")
    response_key: str = Field("response", description="column of the demonstration (sft); may be missing if the prompt is a whole conversation")
    chosen_key: str = Field("chosen", description="column of the preferred response (reward_model)")
    rejected_key: str = Field("rejected", description="column of the other response (reward_model)")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.task is None):
            raise ValueError("give exactly one of `path` (a file) and `task` (a reasoning-gym generator)")
        return self

    @property
    def label(self) -> str:
        return self.name or self.task or (self.path.stem if self.path else "")


Sources = Annotated[list[SourceConfig], BeforeValidator(_listed)]


class DataConfig(Section):
    train: Sources = Field(min_length=1, description="sources of training rows")
    chat: bool | None = Field(None, description="wrap plain-text prompts in the chat template; default: only conversational rows are")
    system_prompt: str | None = Field(None, description="system message put before every conversation")
    examples: list[dict[str, str]] = Field(default_factory=list, description="messages ({role, content}) put before every prompt: few-shot examples")
    max_prompt_tokens: int = Field(512, ge=1, description="longer prompts are handled as `on_long_prompt` says")
    max_tokens: int = Field(1024, ge=2, description="longest whole sequence (sft, reward_model); longer ones are dropped and counted")
    on_long_prompt: Literal["drop", "truncate"] = Field("drop", description="truncate keeps the end of the prompt")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row stops the run before a model loads, or is skipped and counted")
    drop_held_out: bool = Field(False, description="rl: leave out training prompts that validation holds too (else they are only counted)")
    on_change: Literal["error", "accept"] = Field(
        "error", description="a checkpoint that was trained on other rows is not gone on from, or is: the draws go on, among the new rows"
    )
    shuffle: bool = Field(True, description="new order every epoch, decided by the seed")


class RolloutConfig(Section):
    prompts: int = Field(64, ge=1, description="prompts per step, over all ranks")
    group_size: int = Field(1, ge=1, description="samples per prompt")
    max_new_tokens: int = Field(256, ge=1, description="response window R")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the update scores at the same one (trap 16)")
    top_k: int = Field(0, ge=0, description="training must sample from the full distribution: anything but 0 is refused (trap 18)")
    top_p: float = Field(1.0, gt=0, le=1, description="anything but 1 is refused in training (trap 18)")
    eos_token_ids: list[int] = Field(default_factory=list, description="further end tokens, besides those of tokenizer and generation_config")
    max_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        128, description="most sequences decoded together on a rank. auto: all of a rank's in a rollout, up to 1,024; 128 without a GPU"
    )
    cache_tokens: int = Field(
        0, ge=0, description="tokens that the KV cache of a rank holds; 0 = what max_batch sequences need, as far as memory allows"
    )
    memory_fraction: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the memory that is free at the first rollout which the KV cache may take; less where the memory plan has no room for "
        "an update beside it",
    )
    prefill_tokens: int = Field(16_384, ge=1, description="most prompt tokens in one forward")
    release: bool = Field(
        False,
        description="give the memory of rollout weights and KV cache back for the update (GPU; or `release_inference_cache` of a DeepSpeed JSON)",
    )
    balance: Literal["auto", "queue", "plan"] = Field(
        "auto", description="prompts to ranks: pulled from a shared queue, or planned ahead; auto = plan where `deterministic`, else queue"
    )

    @model_validator(mode="after")
    def _full_distribution(self) -> RolloutConfig:
        if self.top_k != 0 or self.top_p != 1.0:
            raise ValueError(
                "top_k and top_p make the update score a distribution that was not sampled from (trap 18): remove them; they belong in validation"
            )
        return self

    @property
    def decoded(self) -> int:
        """`max_batch`, once `auto` has been resolved (`budget.choose`)."""
        if self.max_batch == "auto":
            raise RuntimeError("rollout.max_batch=auto is read before it was resolved")
        return self.max_batch


class RewardComponentConfig(Section):
    """One reward: a function (`function`: registered name or `package.module:name`) or a reward model (`model`)."""

    function: str | None = Field(None, description="registered name, or import path `package.module:function`")
    model: RewardModelConfig | None = Field(None, description="reward model folder, as the task reward_model writes it")
    name: str | None = Field(None, description="name in metrics")
    weight: float = Field(1.0, description="factor in the sum; 0 = measured only")
    clip: float | None = Field(None, gt=0, description="clamp of this component to [-clip, clip], before the weight")
    arguments: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the function")

    @model_validator(mode="after")
    def _one_origin(self) -> RewardComponentConfig:
        if (self.function is None) == (self.model is None):
            raise ValueError("give exactly one of `function` and `model`")
        return self

    @property
    def label(self) -> str:
        return self.name or (self.function.rsplit(":", 1)[-1] if self.function else "reward_model")


class RewardConfig(Section):
    components: Annotated[list[RewardComponentConfig], BeforeValidator(_listed)] = Field(default_factory=list, description="weighted sum of these")
    clip: float | None = Field(None, gt=0, description="clamp of the sum to [-clip, clip]")
    while_decoding: bool = Field(
        True,
        description="functions score responses as they end, in calls of any size; false: one call on each rank, with all its responses, at the end",
    )
    workers: int = Field(1, ge=1, description="processes on each rank that functions run in, all at once; each imports all functions")
    timeout: float = Field(
        30.0,
        gt=0,
        description="seconds for a function to score one sample: the process of one that takes longer is killed, the sample lost and counted. A call "
        "with several has as long, and is repeated one by one if it takes longer",
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from a response that never ends")

    @model_validator(mode="after")
    def _workers_score_early(self) -> RewardConfig:
        if self.workers > 1 and not self.while_decoding:
            raise ValueError(f"workers={self.workers} score while decoding: leave out while_decoding=false, or workers")
        return self


class KLConfig(Section):
    """Where the KL to the reference goes, and as which estimator (Schulman 2020, http://joschu.net/blog/kl-approx.html; trap 19)."""

    coef: float = Field(0.0, ge=0, description="kl_coef; 0 = no reference model is loaded")
    place: Literal["reward", "loss"] = Field("reward", description="k1 in the reward, or k2 / k3 in the loss")
    estimator: Literal["k1", "k2", "k3", "k3_corrected"] = Field(
        "k1", description="k3_corrected carries the importance ratio; plain k3 is for parity with others"
    )
    controller: Literal["fixed", "adaptive"] = Field("fixed", description="adaptive: Ziegler et al. 2019, arXiv:1909.08593, eq. 2")
    target: float = Field(6.0, gt=0, description="adaptive: KL per response (nats) to steer to")
    horizon: int = Field(10_000, ge=1, description="adaptive: responses over which the coefficient can change by a factor e")

    @model_validator(mode="after")
    def _legal(self) -> KLConfig:
        legal = {"reward": ("k1",), "loss": ("k2", "k3", "k3_corrected")}
        if self.estimator not in legal[self.place]:
            raise ValueError(
                f"estimator {self.estimator} in the {self.place} has not the gradient of the reverse KL (trap 19): "
                f"use {' or '.join(legal[self.place])} there, or put k1 in the reward"
            )
        return self


class AlgorithmConfig(Section):
    name: Literal["ppo", "grpo"] = Field("ppo", description="preset of the entries below: ppo = gae + clip, grpo = group + clip")
    advantage: Literal["gae", "group"] = Field("gae", description="entry of ops.advantages.ADVANTAGES")
    policy_loss: Literal["clip"] = Field("clip", description="entry of ops.losses.POLICY_LOSSES")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")
    gae_lambda: float = Field(1.0, ge=0, le=1, description="GAE lambda")
    whiten_advantages: bool = Field(False, description="advantages to mean 0, variance 1 over all response tokens of the rollout batch; ppo: on")
    group_scale: Literal["std", "none"] = Field("std", description="group: divide by the group's standard deviation, or not (Dr. GRPO)")
    clip_eps_low: float = Field(0.2, gt=0, lt=1, description="ratio clip below 1")
    clip_eps_high: float = Field(0.2, gt=0, description="ratio clip above 1")
    value_clip: float | None = Field(0.2, gt=0, description="value clip around the rollout's values; null = off")
    entropy_coef: float = Field(0.0, ge=0, description="entropy bonus")
    loss_mean: Literal["tokens", "sequences", "constant"] = Field(
        "tokens", description="what the policy loss is a mean over; constant: rows x max_new_tokens"
    )
    kl: KLConfig = Field(default_factory=KLConfig)
    epochs: int = Field(1, ge=1, description="passes over each rollout batch")
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass")
    truncation: Literal["terminal", "bootstrap", "mask"] = Field("terminal", description="what a response without EOS means (trap 13)")
    critic_warmup_steps: int = Field(0, ge=0, description="first steps in which only the critic learns")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        presets: dict[str, dict[str, Any]] = {
            "ppo": {"advantage": "gae", "whiten_advantages": True, "gae_lambda": 0.95},
            "grpo": {"advantage": "group", "whiten_advantages": False},
        }
        if (
            isinstance(data, dict)
            and data.get("name") == "grpo"
            and isinstance(data.get("kl"), dict)
            and not {"place", "estimator"} & set(data["kl"])
        ):
            data = {**data, "kl": {**data["kl"], "place": "loss", "estimator": "k3_corrected"}}
        return {**presets.get(data.get("name", "ppo"), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> AlgorithmConfig:
        if self.advantage == "group" and self.group_scale == "std" and self.kl.coef and self.kl.place == "reward":
            raise ValueError(
                "kl.place=reward with advantage=group and group_scale=std: in a group of equal scores the KL alone would be blown up to deviation 1 "
                "(trap 11); use kl.place=loss with kl.estimator=k3_corrected, or group_scale=none"
            )
        if not self.needs_critic:
            if self.critic_warmup_steps:
                raise ValueError(f"critic_warmup_steps={self.critic_warmup_steps}: advantage `{self.advantage}` has no critic; remove it")
            if self.truncation == "bootstrap":
                raise ValueError(f"truncation=bootstrap needs values: advantage `{self.advantage}` has no critic; use terminal or mask")
        return self

    @property
    def needs_critic(self) -> bool:
        return self.advantage == "gae"


class TrainConfig(Section):
    """Batch arithmetic. rl: `steps` rollouts. sft, reward_model: `batch` rows per optimizer step. Forwards have as many tokens as there is room for
    (`micro_batch_tokens: auto`) unless `micro_batch` or `micro_batch_tokens` is given."""

    steps: int | None = Field(None, ge=1, description="rl: rollout steps; sft, reward_model: optimizer steps (instead of epochs)")
    epochs: int = Field(1, ge=1, description="sft, reward_model: passes over the data, where `steps` is not given")
    batch: int = Field(64, ge=1, description="sft, reward_model: rows (pairs) per optimizer step over all ranks")
    micro_batch: int = Field(8, ge=1, description="rows per forward on a rank (pairs for reward_model), where it is not planned by tokens")
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="tokens per forward on a rank instead of rows: forwards of equal length, as few as will do; needs packing. auto: as many as "
        "the memory plan has room for, 16,384 without a GPU; so it is where rows are packed and neither this nor micro_batch is given",
    )
    bad_steps: int = Field(
        3,
        ge=0,
        description="steps in a row whose gradients, logprobs or values are not finite, or that exploded, before weights go back to the last good "
        "checkpoint; after as many again the run stops, with the batch in the run folder",
    )
    stall_minutes: float = Field(
        10.0,
        gt=0,
        description="a phase without any progress for so long (twice the longest it has ever taken, if that is more) ends the job; keep it below "
        "the timeout of collectives (DEEPSPEED_TIMEOUT, 30). A rank that has stopped does so after a minute",
    )
    digest_every: int = Field(
        10, ge=1, description="steps between comparisons of what must be the same on all ranks; besides at step 1 and before every checkpoint"
    )
    packing: bool = Field(True, description="no padding: rows one behind the other in one forward; false = padded to the longest row of a forward")
    _before: int | None = PrivateAttr(None)

    @property
    def given_micro_batch(self) -> int:
        """`micro_batch` as the recipe has it, which a DeepSpeed JSON may repeat: of what memory had room for it knows nothing."""
        return self._before or self.micro_batch

    def with_micro_batch(self, rows: int) -> TrainConfig:
        changed = self.model_copy(update={"micro_batch": rows})
        changed._before = self.given_micro_batch
        return changed

    @model_validator(mode="before")
    @classmethod
    def _by_tokens(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("packing", True) is True and not given.keys() & {"micro_batch", "micro_batch_tokens"}:
            return {**given, "micro_batch_tokens": "auto"}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.micro_batch_tokens and not self.packing:
            raise ValueError("micro_batch_tokens counts tokens of packed rows: leave out packing=false, or give micro_batch instead")
        return self

    @property
    def forward_tokens(self) -> int | None:
        """`micro_batch_tokens`, once `auto` has been resolved (`budget.choose`)."""
        if self.micro_batch_tokens == "auto":
            raise RuntimeError("train.micro_batch_tokens=auto is read before it was resolved")
        return self.micro_batch_tokens


class ValidationConfig(Section):
    data: Annotated[list[SourceConfig], BeforeValidator(_listed)] = Field(default_factory=list, description="held-out sources; none = no validation")
    every: int = Field(10, ge=1, description="steps between validations")
    before_training: bool = Field(True, description="validate at step 0 too")
    verifier: str | None = Field(
        None, description="reward function whose score >= 1 counts as correct (pass@1), and what it fails on not at all; needed for rl"
    )
    temperature: float = Field(0.0, ge=0, description="0 = greedy")
    top_k: int = Field(0, ge=0, description="0 = off")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off")
    max_new_tokens: int | None = Field(None, ge=1, description="default: rollout.max_new_tokens")
    samples: int = Field(32, ge=0, description="samples written to samples/ at each validation; training rollouts: as many")
    best_metric: str | None = Field(
        None, description="metric whose best checkpoint is kept; default: the mean accuracy (rl, reward_model), the loss (sft)"
    )
    best_mode: Literal["max", "min"] | None = Field(None, description="direction of best_metric")


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep_last: int = Field(2, ge=1, description="older ones are deleted after a new one is complete; the best are kept besides")
    keep_best: int = Field(1, ge=1, description="so many of the best by validation are kept; a step that is among them is saved")
    background: bool = Field(False, description="states are copied to host memory (to pinned memory from GPUs) and written while training goes on")
    save_hf: bool = Field(True, description="write an HF folder (or PEFT adapter) into every checkpoint")
    last: bool = Field(True, description="write a checkpoint at the end")


class TrackingConfig(Section):
    wandb: Literal["off", "online", "offline"] = Field("off", description="metrics.jsonl is written in any case")
    project: str = Field("rlhf", description="wandb project")
    name: str | None = Field(None, description="wandb run name; default: the run folder's name")
    console: Literal["auto", "live", "plain"] = Field("auto", description="auto: live view on a terminal, plain lines in a log")
    timeout: float = Field(60.0, gt=0, description="seconds that the tracker may take at start and at the end before it is left behind")


_NO_BASE = "the actor trains all its weights, so it has no frozen base to share; give actor.lora, or set share_base=false"


class Config(Section):
    """A whole run."""

    task: Literal["sft", "reward_model", "rl"] = Field(description="what to train")
    run_dir: Path = Field(description="run folder: checkpoints, metrics, samples")
    seed: int = Field(0, ge=0, description="decides the order of all data and the noise of every sample")
    deterministic: bool | None = Field(None, description="bitwise reproducible weights; default: on CPU yes, on GPU no")
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; default: cores / ranks on this node")
    deepspeed: str | dict[str, Any] = Field("ds_configs/zero3.json", description="DeepSpeed JSON (path or mapping) for every role without its own")
    actor: TrainedModelConfig = Field(default_factory=TrainedModelConfig, description="the policy; also what sft trains")
    critic: CriticConfig = Field(default_factory=CriticConfig, description="the value model (ppo)")
    reference: ModelConfig = Field(
        default_factory=ModelConfig, description="frozen; default path: the actor's. With LoRA it is the actor, adapters off"
    )
    reward_model: TrainedModelConfig = Field(default_factory=TrainedModelConfig, description="what the task reward_model trains")
    reward: RewardConfig = Field(default_factory=RewardConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="before")
    @classmethod
    def _critic_adapters(cls, data: Any) -> Any:
        """A critic on the actor's base has adapters like the actor's, unless the recipe gives it others."""
        actor, critic = (data.get(role) if isinstance(data, dict) else None for role in ("actor", "critic"))
        if isinstance(actor, dict) and isinstance(critic, dict) and critic.get("share_base") and critic.get("lora") is None:
            return {**data, "critic": {**critic, "lora": actor.get("lora")}}
        return data

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        need(
            self.train_path is not None,
            f"{'reward_model' if self.task == 'reward_model' else 'actor'}.path: which model should be trained? Give its folder",
        )
        if self.task == "rl":
            need(self.train.steps is not None, "train.steps: give the number of rollout steps")
            need(bool(self.reward.components), "reward.components: give at least one function or model")
            need(any(c.weight for c in self.reward.components), "reward.components: every weight is 0, nothing would be learnt")
            need(
                not (self.deterministic and self.rollout.balance == "queue"),
                "rollout.balance=queue: which rank takes which prompt depends on timing, so bits may too; with deterministic=true use plan or auto",
            )
            labels = [c.label for c in self.reward.components]
            twice = next((name for name in labels if labels.count(name) > 1), None)
            need(twice is None, f"reward.components: two are called {twice}, so their metrics would be one; give each a `name`")
            truncation = self.algorithm.truncation
            need(
                truncation == "terminal" or not self.reward.missing_eos_penalty,
                f"reward.missing_eos_penalty={self.reward.missing_eos_penalty:g}: has no effect under algorithm.truncation={truncation}, "
                "which gives responses without an end no score; use truncation=terminal, or remove the penalty",
            )
            for i, component in enumerate(self.reward.components):
                if component.model and component.model.share_base:
                    need(self.actor.lora is not None, f"reward.components.{i}.model.share_base: {_NO_BASE}")
            rows = self.rollout.prompts * self.rollout.group_size
            need(
                rows % self.algorithm.minibatches == 0,
                f"algorithm.minibatches={self.algorithm.minibatches} does not divide rollout.prompts x rollout.group_size = {rows}",
            )
            if self.algorithm.advantage == "group":
                need(self.rollout.group_size > 1, "rollout.group_size=1: group advantages of single samples are all 0; use at least 2")
            if self.algorithm.needs_critic:
                if self.critic.init == "path":
                    need(self.critic.path is not None, "critic.path: critic.init=path needs it")
                need(
                    self.critic.path is None or self.critic.init == "path",
                    f"critic.path={self.critic.path}: not read under critic.init={self.critic.init}; set critic.init=path, or remove it",
                )
                if self.critic.init == "reward":
                    first = next((c.model for c in self.reward.components if c.model), None)
                    need(first is not None, "critic.init=reward: no reward model among reward.components")
                    need(
                        not (first and first.share_base),
                        "critic.init=reward: the first reward model has no body of its own (share_base); use critic.init=actor and its share_base",
                    )
                if self.critic.share_base:
                    need(self.actor.lora is not None, f"critic.share_base: {_NO_BASE}")
                    need(
                        critic_origin(self) == self.actor.path and self.critic.head == "zero",
                        f"critic.share_base: the body is the actor's base and the head starts at zero, but critic.init={self.critic.init} reads "
                        f"{critic_origin(self)} with head={self.critic.head}; use critic.init=actor and head=zero, or share_base=false",
                    )
                need(
                    self.algorithm.critic_warmup_steps < (self.train.steps or 0),
                    f"algorithm.critic_warmup_steps={self.algorithm.critic_warmup_steps}: the actor would never learn in {self.train.steps} steps",
                )
                need(
                    not (self.critic.head == "keep" and self.critic.init == "actor"),
                    "critic.head=keep: the actor's folder holds no scalar head; use critic.init=reward or path",
                )
            need(
                not (self.validation.data and self.validation.verifier is None),
                "validation.verifier: which reward function decides whether an answer is right?",
            )
        return self

    @property
    def train_path(self) -> Path | None:
        return self.reward_model.path if self.task == "reward_model" else self.actor.path

    @property
    def uses_reference(self) -> bool:
        return self.task == "rl" and self.algorithm.kl.coef > 0


# --------------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Recipe file + `key.sub=value` overrides -> checked `Config`. Raises ValueError that names file, line, key and mend."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}; recipes are in scripts/recipes/") from None
    tree, lines = _read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, e.g. `task: rl`")
    if HIDDEN in secrets_in(tree, own_names()):
        raise ValueError(f"{path}: holds {HIDDEN}, which is what a run folder's config.yaml has in the place of a secret; give its value")
    for override in overrides or []:
        _apply_override(tree, override)
        lines[override.split("=", 1)[0]] = -1
    return parse_config(tree, str(path), lines)


def parse_config(tree: dict[str, Any], origin: str = "config", lines: dict[str, int] | None = None) -> Config:
    """Mapping -> checked `Config`; `lines` maps dotted keys to line numbers (-1 = command line) for the messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e, origin, lines or {}) for e in _by_key(error.errors()))) from None


_ALTERNATIVES = ("str", "int", "float", "bool", "none", "literal[", "list[", "dict[", "constrained-")  # pydantic's names for what a key may be


def _by_key(errors: Iterable[Any]) -> list[dict[str, Any]]:
    """One error for each key, where each thing that it may be had one of its own."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        place = tuple(error["loc"])
        alternative = len(place) > 1 and str(place[-1]).startswith(_ALTERNATIVES) and ".".join(map(str, place)) not in flat_keys(Config)
        place = place[:-1] if alternative else place
        if alternative and place in found:
            found[place]["msg"] += ", or: " + error["msg"]
        else:
            found[place if alternative else (*place, len(found))] = {**error, "loc": place}
    return list(found.values())


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: write key.sub=value, e.g. actor.learning_rate=1e-6")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, key)]
            continue
        if not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[part]
    parsed, _ = _read_yaml(value, f"override {key}") if value else (None, {})
    branch = parsed
    for part in reversed(key.split(".")):
        branch = {part: branch}
    if secrets_in(branch, own_names()):
        raise ValueError(
            f"override {key}: command lines are in logs of launchers and in lists of processes, so no secret may be there: put it into an "
            "environment variable, which reward functions inherit, or into the recipe"
        )
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {key}: {part!r} is not an index below {len(node)}")
    return int(part)


def _read_yaml(text: str, origin: str) -> tuple[Any, dict[str, int]]:
    """(what it holds, dotted key -> line). ValueError for what is no YAML, and for a key that stands twice: the last one would win without a word."""
    try:
        return yaml.safe_load(text), _line_numbers(yaml.compose(text), origin)
    except yaml.YAMLError as error:  # its own message quotes the line, which may hold a secret
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}, column {mark.column + 1}" if mark else origin
        raise ValueError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or 'characters that it does not allow'}") from None


def _line_numbers(node: yaml.Node | None, origin: str, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    pairs: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(k.value), v, k.start_mark.line + 1) for k, v in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(i), v, v.start_mark.line + 1) for i, v in enumerate(node.value)]
    seen: dict[str, int] = {}
    for name, child, line in pairs:
        if name in seen:
            raise ValueError(f"{origin}:{line}: `{prefix}{name}` stands twice, first in line {seen[name]}; keep one")
        seen[name] = lines[prefix + name] = line
        lines.update(_line_numbers(child, origin, f"{prefix}{name}."))
    return lines


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError for a key that stands twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"`{twice}` stands twice in one object; keep one")
    return found


def _explain(error: Any, origin: str, lines: dict[str, int]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    where = origin
    for depth in range(len(location), 0, -1):
        line = lines.get(".".join(location[:depth]))
        if line:
            where = "command line" if line < 0 else f"{origin}:{line}"
            break
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_nearest(location)}"
    if error["type"] == "missing":
        return f"{where}: `{key}` is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    hidden = not key or isinstance(error["input"], dict | list | BaseModel) or location[-1] == "arguments"  # there may be secrets in it
    given = "" if hidden else f" (given: {masked(error['input'])!r})"
    return f"{where}: {f'`{key}`: ' if key else ''}{message}{given}"


def _nearest(location: list[str]) -> str:
    name = location[-1]
    if name in FOREIGN_NAMES:
        return f"; here it is called `{FOREIGN_NAMES[name]}`"
    known = sorted(flat_keys(Config))
    here = [k for k in known if k.rsplit(".", 1)[0] == ".".join(location[:-1])] if len(location) > 1 else [k for k in known if "." not in k]
    close = difflib.get_close_matches(".".join(location), here, 1, 0.6) or [k for k in known if k.rsplit(".", 1)[-1] == name][:1]
    close = close or difflib.get_close_matches(".".join(location), known, 1, 0.5)
    return f"; did you mean `{close[0]}`?" if close else "; docs/configuration.md lists all keys"


def flat_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of the tree, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections_of(field.annotation):
            keys.extend(flat_keys(section, f"{prefix}{name}."))
    return keys


@functools.cache
def own_names() -> frozenset[str]:
    """What keys of the tree are called, none of which is a secret: `prompt_key` is a column."""
    return frozenset(name.rsplit(".", 1)[-1] for name in flat_keys(Config))


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for argument in getattr(annotation, "__args__", ()) for s in _sections_of(argument)]


# --------------------------------------------------------------------------------------------------------------------------
# DeepSpeed JSON

# The trainer owns these: "auto" (or absent) takes the recipe's value, another number is refused.
_REFUSED = {
    "fp16": "fp16 loss scaling is not supported: use bf16 or fp32 (actor.dtype)",
    "scheduler": "schedules are set in the recipe: actor.schedule, actor.warmup_steps",
    "zero_force_ds_cpu_optimizer": "remove it",
    "pipeline": "pipeline parallelism is not supported",
    "torch_autocast": "the rollout and the fused kernels compute in the model's own dtype: set actor.dtype",
    "compression_training": "not supported",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
}
# Names that DeepSpeed's `zero_optimization` takes beside those that are looked at here.
_RENAMED = {
    **{
        name: f"stage3_{name}"
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
            *("gather_16bit_weights_on_model_save", "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
        )
    },
    "cpu_offload": 'offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'offload_param": {"device": "cpu"}',
}
# The keys of `zero_optimization` in DeepSpeed 0.19.8, and what they take (tests/test_review.py compares them with its own).
_ZERO: dict[str, type] = {
    **dict.fromkeys(
        (
            *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm"),
            *("compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint", "ignore_unused_parameters", "legacy_stage1"),
            *("round_robin_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
            *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings"),
            *("enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "parameter_alignment", "cpu_offload_use_pin_memory"),
            *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
            *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
        ),
        bool,
    ),
    **dict.fromkeys(
        (
            *("stage", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
            *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
            *("stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size"),
        ),
        int,
    ),
    **dict.fromkeys(("offload_param", "offload_optimizer", "leaf_module", "zenflow"), dict),
}
# What DeepSpeed 0.19.8 looks for at the top level; anything else it passes over without a word.
_TOP_LEVEL = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation", "gradient_clipping"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "prescale_gradients", "sparse_gradients", "optimizer", "scheduler", "legacy_fusion"),
    *("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types", "communication_data_type", "seq_parallel_communication_data_type"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "hybrid_engine", "compile"),
    *("comms_logger", "flops_profiler", "monitor_config", "tensorboard", "wandb", "comet", "csv_monitor", "timers", "wall_clock_breakdown"),
    *("memory_breakdown", "steps_per_print", "dump_state", "log_level", "disable_allgather", "disable_python_gc", "dataloader_drop_last"),
    *("checkpoint", "nebula", "elasticity", "autotuning", "compression_training", "weight_quantization", "data_efficiency", "curriculum_learning"),
    *("sparse_attention", "tensor_parallel", "sequence_parallel_size", "expert_parallel", "pipeline", "aio", "vocabulary_size"),
    *("use_data_before_expert_parallelism", "use_node_local_storage"),
}


def read_deepspeed(source: str | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A DeepSpeed JSON as (mapping, where it came from). Relative paths are tried from here and from the repository."""
    if isinstance(source, dict):
        return copy.deepcopy(source), "recipe"
    for candidate in (Path(source), ROOT / source):
        if candidate.is_file():
            try:
                tree = json.loads(candidate.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
            except json.JSONDecodeError as error:
                raise ValueError(f"{candidate}:{error.lineno}: not valid JSON: {error.msg}") from None
            except ValueError as error:
                raise ValueError(f"{candidate}: {error}") from None
            if not isinstance(tree, dict):
                raise ValueError(f"{candidate}: a DeepSpeed config is a JSON object")
            return tree, str(candidate)
    raise ValueError(f"deepspeed={source}: no such file; ds_configs/ has zero1.json, zero2.json and zero3.json")


_HYBRID_ENGINE = {"enabled", "max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters", "tp_gather_partition_size"}


def hybrid_engine_words(config: Config) -> dict[str, Any]:
    """The block `hybrid_engine` of the actor's DeepSpeed JSON, known from DeepSpeed-Chat, as this engine's settings: {"max_context", "release"}.

    pin_parameters and tp_gather_partition_size have nothing to set here: weights are gathered in one pass and keep their place. ValueError for
    what cannot be had.
    """
    tree, origin = read_deepspeed(config.deepspeed if config.actor.deepspeed is None else config.actor.deepspeed)
    block = tree.get("hybrid_engine", {})
    if not isinstance(block, dict):
        raise ValueError(f"{origin}: `hybrid_engine` must be an object")
    for key in block:
        if key not in _HYBRID_ENGINE:
            raise ValueError(f"{origin}: `hybrid_engine.{key}` is unknown; known: {', '.join(sorted(_HYBRID_ENGINE))}")
    if block.get("enabled", True) is not True:
        raise ValueError(
            f"{origin}: `hybrid_engine.enabled` is {block['enabled']!r}: rollouts have no other engine; set it to true or remove the block"
        )
    if block.get("inference_tp_size", 1) != 1:
        raise ValueError(
            f"{origin}: `hybrid_engine.inference_tp_size` is {block['inference_tp_size']!r}: every rank decodes with whole weights; set it to 1"
        )
    longest = block.get("max_out_tokens", 0)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 0:
        raise ValueError(f"{origin}: `hybrid_engine.max_out_tokens` is {longest!r}: a number of tokens (prompt and response) is needed")
    return {"max_context": longest, "release": bool(block.get("release_inference_cache", False))}


def resolve_deepspeed(
    source: str | dict[str, Any], *, dtype: str, trained: bool, micro_batch: int, world_size: int, max_grad_norm: float = 0.0, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed settings of one role: `"auto"` resolved, what the recipe owns filled in, contradictions refused.

    dtype is "float32" or "bfloat16". A frozen model runs at stage 3 or 0 (DeepSpeed has no other stage without an optimizer).
    """
    tree, origin = read_deepspeed(source)
    tree.pop("hybrid_engine", None)  # `hybrid_engine_words` has read it; DeepSpeed's own engine never sees it
    for key in tree.keys() - _TOP_LEVEL:
        if close := difflib.get_close_matches(key, _TOP_LEVEL, 1, 0.86):
            raise ValueError(f"{origin}: unknown key `{key}`; did you mean `{close[0]}`?")
    for key, mend in _REFUSED.items():
        block = tree.pop(key, None)
        idle = isinstance(block, dict) and (block.get("enabled") in (False, "auto") or block.get("autotp_size") in (0, 1, "auto"))
        if block not in (None, "auto", {}, 0, 1) and not idle:  # False is 0
            raise ValueError(f"{origin}: `{key}`: {mend}")

    def own(key: str, value: Any, ours: str) -> None:
        given = tree.get(key, "auto")
        if given != "auto" and given != value:
            raise ValueError(f'{origin}: `{key}` is {given!r} but {ours} is {value!r}; write "auto" there, or change one of them')
        tree[key] = value

    # The program decides when a window of backward passes ends, so DeepSpeed's own accumulation count is always 1 (FACTS: deepspeed#8184).
    own("train_micro_batch_size_per_gpu", micro_batch, "train.micro_batch")
    own("gradient_accumulation_steps", 1, "the accumulation that DeepSpeed may see (windows end where the trainer steps)")
    own("train_batch_size", micro_batch * world_size, "train.micro_batch x ranks")
    own("managed_gradient_accumulation", False, "who ends an accumulation window (the trainer)")
    if trained:
        own("gradient_clipping", max_grad_norm, "max_grad_norm")
    else:
        tree["gradient_clipping"] = 0.0
    bf16 = tree.get("bf16", {})
    if not isinstance(bf16, dict):
        raise ValueError(f'{origin}: `bf16` must be an object such as {{"enabled": "auto"}}')
    enabled = bf16.get("enabled", "auto")
    if enabled != "auto" and bool(enabled) != (dtype == "bfloat16"):
        raise ValueError(f'{origin}: `bf16.enabled` is {enabled} but the model dtype is {dtype}; write "auto" there, or set the role\'s dtype')
    if bf16.get("check_grad_overflow", True) in (False, None):
        raise ValueError(f"{origin}: `bf16.check_grad_overflow`: a gradient that is not finite would go into the weights; remove it")
    tree["bf16"] = {**bf16, "enabled": dtype == "bfloat16"}
    accumulate = tree.setdefault("data_types", {}).get("grad_accum_dtype", "auto")
    if accumulate not in ("auto", "fp32"):
        raise ValueError(f'{origin}: `data_types.grad_accum_dtype` is {accumulate!r}: gradients are accumulated in fp32 (trap 32); write "auto"')
    tree["data_types"]["grad_accum_dtype"] = "fp32"
    zero = tree.setdefault("zero_optimization", {})
    _check_zero(zero, origin)
    if zero.get("zenflow") not in (None, "auto"):
        raise ValueError(f"{origin}: `zero_optimization.zenflow` is not supported; remove it")
    if isinstance(compiled := tree.get("compile"), dict) and compiled.get("deepcompile") not in (None, "auto", False):
        raise ValueError(f"{origin}: `compile.deepcompile` is not supported: set actor.compile")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{origin}: `zero_optimization.stage` is {stage!r}; 0, 1, 2 or 3")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key, "auto") not in ("auto", False):
            raise ValueError(
                f"{origin}: `zero_optimization.{key}`: forwards and rollouts would compute with other weights than are trained; remove it"
            )
        zero.pop(key, None)
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise ValueError(f'{origin}: `zero_optimization.{key}.device` is "nvme": checkpoints and rollouts take what is in memory; use "cpu"')
    overlap = zero.get("overlap_comm", "auto")
    if overlap == "auto":
        overlap = stage >= 2 and on_gpu
    if overlap and stage < 2:
        raise ValueError(f'{origin}: `zero_optimization.overlap_comm` needs stage 2 or 3, the stage is {stage}; write "auto"')
    zero["overlap_comm"] = overlap
    offload = zero.get("offload_optimizer")
    if trained and "optimizer" not in tree and isinstance(offload, dict) and offload.get("device", "none") != "none":
        tree["zero_force_ds_cpu_optimizer"] = False  # or DeepSpeed refuses our AdamW, which runs on the CPU as well
    timers = {} if tree.get("timers", "auto") == "auto" else tree["timers"]
    if not isinstance(timers, dict):
        raise ValueError(f'{origin}: `timers` must be an object such as {{"throughput": {{"enabled": false}}}}')
    if timers.get("throughput", "auto") == "auto":  # it waits for the device before every forward, which leaves that idle
        tree["timers"] = {**timers, "throughput": {"enabled": False}}
    if not trained:
        tree.pop("optimizer", None)
        zero.pop("offload_optimizer", None)
        if stage in (1, 2):
            zero["stage"] = 0
    _resolve_auto(tree, origin)
    return tree


def _check_zero(zero: Any, origin: str) -> None:
    """ValueError with file and key for what DeepSpeed would refuse with a traceback once models are loaded, or take under another name."""
    if not isinstance(zero, dict):
        raise ValueError(f'{origin}: `zero_optimization` must be an object such as {{"stage": 3}}')
    for key, value in zero.items():
        if key in _RENAMED:
            raise ValueError(f'{origin}: `zero_optimization.{key}`: write "{_RENAMED[key]}"')
        if key not in _ZERO:
            close = difflib.get_close_matches(key, _ZERO, 1, 0.6)
            raise ValueError(f"{origin}: `zero_optimization.{key}`: unknown key" + (f"; did you mean `{close[0]}`?" if close else ""))
        kind, words = _ZERO[key], {bool: "true or false", int: "a whole number", dict: "an object"}
        whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()  # JSON writes 5e8, too
        if value is None or value == "auto" or (whole if kind is int else isinstance(value, kind)):
            continue
        if key != "stage":  # which is told what it may be
            raise ValueError(f"{origin}: `zero_optimization.{key}` is {value!r}; it takes {words[kind]}")
    for key in ("offload_param", "offload_optimizer"):
        device = (zero[key] if isinstance(zero.get(key), dict) else {}).get("device", "none")
        if device not in ("none", "cpu", "nvme", "auto", None):
            raise ValueError(f"{origin}: `zero_optimization.{key}.device` is {device!r}; none or cpu")


def bucket_size(zero: dict[str, Any], gradients: Sequence[int]) -> int:
    """Elements that are reduced together, of parameters with so many each: an eighth of a model's gradients, so that most of them are on their way,
    and added up, while the backward pass is still at work; at most DeepSpeed's own 500 million; or what `zero_optimization` says.

    Under ZeRO-2 no less than the largest: one that is larger than its bucket DeepSpeed 0.19.8 reduces where it lies, on a stream of its own, and
    ranks that keep nothing of it give its memory back meanwhile."""
    given = int(zero.get("reduce_bucket_size", max(1, min(500_000_000, sum(gradients) // 8))))
    return max(given, *gradients) if zero.get("stage", 0) == 2 and gradients else given


def role_settings(config: Config, role: ModelConfig, *, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Resolved DeepSpeed settings of one model of the run; a `TrainedModelConfig` is trained, any other frozen."""
    trained = isinstance(role, TrainedModelConfig)
    dtype = role_dtype(role, on_gpu)
    tree = resolve_deepspeed(
        config.deepspeed if role.deepspeed is None else role.deepspeed,
        dtype=dtype,
        trained=trained,
        micro_batch=config.train.given_micro_batch,
        world_size=world_size,
        max_grad_norm=role.max_grad_norm if isinstance(role, TrainedModelConfig) else 0.0,
        on_gpu=on_gpu,
    )
    if isinstance(role, TrainedModelConfig):
        _own_optimizer(tree, role)
    if shares_base(role):
        _check_base(config, tree["zero_optimization"].get("stage", 0), dtype, role_dtype(config.actor, on_gpu))
    if trained and tree["zero_optimization"].get("stage", 0) == 0 and dtype == "bfloat16":
        raise ValueError("zero_optimization.stage=0 with bfloat16: DeepSpeed has no fp32 gradient accumulation there; use stage 1, or dtype=float32")
    if role.offload is True:  # `auto` is never refused: `can_offload`
        _check_offload(tree, role)
    return tree


def can_offload(settings: dict[str, Any], role: ModelConfig) -> bool:
    """Whether `offload=true` would not be refused. settings: `role_settings` of the role."""
    try:
        _check_offload(settings, role)
    except ValueError:
        return False
    return True


def _check_offload(tree: dict[str, Any], role: ModelConfig) -> None:
    """ValueError if `offload` has nothing to do here, or somebody else does it."""
    zero = tree["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise ValueError(f"offload=true: zero_optimization.{key} of the DeepSpeed JSON puts the same on the host; remove one of them")
    if isinstance(role, TrainedModelConfig):
        if zero.get("stage", 0) == 0:
            raise ValueError("offload=true: ZeRO-0 has no flat master weights and moments to send away; use stage 1, 2 or 3, or offload=false")
        if "optimizer" in tree:
            raise ValueError("offload=true steps AdamW in parts, other optimizers may not allow that: remove `optimizer` from the DeepSpeed JSON")
    elif shares_base(role):
        raise ValueError("offload=true with share_base=true: the weights are the actor's, which needs them itself; remove one of them")


def _own_optimizer(tree: dict[str, Any], role: TrainedModelConfig) -> None:
    """The numbers of an `optimizer` block are the recipe's: "auto" or absent takes them, others are refused."""
    if "optimizer" not in tree:
        return
    given = tree["optimizer"].setdefault("params", {})
    ours: dict[str, Any] = {"lr": role.learning_rate, "weight_decay": role.weight_decay}
    if "adam" in str(tree["optimizer"].get("type", "")).lower():
        ours |= {"betas": list(role.betas), "eps": role.eps}
    for key, value in ours.items():
        if given.setdefault(key, value) != value:
            raise ValueError(f'`optimizer.params.{key}` is {given[key]!r} but the recipe says {value!r}; write "auto" there, or change one of them')


def shares_base(role: ModelConfig) -> bool:
    """Whether a role computes on the actor's frozen base, with adapters and a head of its own."""
    return isinstance(role, CriticConfig | RewardModelConfig) and role.share_base


def _check_base(config: Config, stage: int, dtype: str, actor_dtype: str) -> None:
    """ValueError if a role with this stage and dtype cannot compute on the actor's base."""
    tree, _ = read_deepspeed(config.deepspeed if config.actor.deepspeed is None else config.actor.deepspeed)
    if 3 in (stage, tree.get("zero_optimization", {}).get("stage", 0)):
        raise ValueError(
            "share_base=true: ZeRO-3 can not run two engines on one base: each keeps its own account of what is gathered and fails on parameters "
            "that the other has in flight; use ds_configs/zero2.json or share_base=false"
        )
    if dtype != actor_dtype:
        raise ValueError(f"share_base=true: the base is {actor_dtype} (actor.dtype), the role that shares it {dtype}; give both the same dtype")


def critic_origin(config: Config) -> Path | None:
    """The folder that the critic's body is read from."""
    reward = next((c.model.path for c in config.reward.components if c.model), None)
    return {"actor": config.actor.path, "path": config.critic.path, "reward": reward}[config.critic.init]


def role_dtype(role: ModelConfig, on_gpu: bool) -> str:
    return role.dtype if role.dtype != "auto" else "bfloat16" if on_gpu else "float32"


def _resolve_auto(tree: dict[str, Any], origin: str, prefix: str = "") -> None:
    """An "auto" that nobody owns means DeepSpeed's default: the key is dropped."""
    for key in list(tree):
        if tree[key] == "auto":
            del tree[key]
        elif isinstance(tree[key], dict):
            _resolve_auto(tree[key], origin, f"{prefix}{key}.")


def shown(config: Config) -> dict[str, Any]:
    """The resolved config as it may be written and printed: secrets are `***`."""
    tree: dict[str, Any] = masked(config.model_dump(mode="json"), own_names())
    return tree


def to_yaml(config: Config) -> str:
    """The same as YAML, which `load_config` reads back if there is no secret in it."""
    return yaml.safe_dump(shown(config), sort_keys=False, width=120)
