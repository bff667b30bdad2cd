"""The recipe: what is refused, and whether the message tells key, place and mend; DeepSpeed settings; registries (traps 2, 18, 19, 32)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rlhf.config import (
    FOREIGN_NAMES,
    ROOT,
    AlgorithmConfig,
    Config,
    CriticConfig,
    KLConfig,
    LoraConfig,
    ModelConfig,
    RewardModelConfig,
    TrainConfig,
    TrainedModelConfig,
    bucket_size,
    flat_keys,
    hybrid_engine_words,
    load_config,
    parse_config,
    read_deepspeed,
    resolve_deepspeed,
    role_settings,
    to_yaml,
)

RECIPE = """\
task: rl
run_dir: runs/x
actor:
  path: models/m
  learning_rate: 2e-6
reward:
  components:
    function: exact_match
data:
  train:
    path: train.jsonl
algorithm:
  name: grpo
rollout:
  group_size: 4
train:
  steps: 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str = RECIPE, *overrides: str, **replace: str) -> Config:
        for old, new in replace.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "recipe.yaml").write_text(text)
        return load_config(tmp_path / "recipe.yaml", list(overrides))

    return write


def test_a_recipe_of_seventeen_lines(recipe: Any) -> None:
    config = recipe()
    assert config.actor.learning_rate == 2e-6  # YAML reads 2e-6 as text
    assert (config.algorithm.advantage, config.algorithm.policy_loss, config.algorithm.needs_critic) == ("group", "clip", False)
    assert config.data.train[0].path == Path("train.jsonl")  # one mapping stands for a list of one
    assert not config.uses_reference


def test_presets_can_be_overridden() -> None:
    assert AlgorithmConfig().whiten_advantages and AlgorithmConfig().gae_lambda == 0.95
    assert not AlgorithmConfig(whiten_advantages=False).whiten_advantages
    assert not AlgorithmConfig(name="grpo").whiten_advantages
    assert AlgorithmConfig(name="grpo", advantage="gae").needs_critic


def test_resolved_config_reads_back(recipe: Any, tmp_path: Path) -> None:
    config = recipe()
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("recipe_file", sorted((ROOT / "scripts" / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_are_valid(recipe_file: Path) -> None:
    load_config(recipe_file)


# ---- messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learning_rate", "learning_rat"), r"recipe.yaml:5: unknown key `actor.learning_rat`; did you mean `actor.learning_rate`\?"),
        (("algorithm:", "algorithms:"), r"recipe.yaml:12: unknown key `algorithms`; did you mean `algorithm`\?"),
        (("group_size: 4", "num_generations: 4"), r"recipe.yaml:15: unknown key `rollout.num_generations`; here it is called `rollout.group_size`"),
        (("  learning_rate: 2e-6", "  beta: 2e-6"), r"recipe.yaml:5: unknown key `actor.beta`; here it is called `algorithm.kl.coef`"),
        (("  name: grpo", "  gae_lambda: 2"), r"recipe.yaml:13: `algorithm.gae_lambda`: .*less than or equal to 1 \(given: 2\)"),
        (("2e-6", "fast"), r"recipe.yaml:5: `actor.learning_rate`: .*valid number.*\(given: 'fast'\)"),
        (("  steps: 10", "  micro_batch: 2"), r"train.steps: give the number of rollout steps"),
        (("run_dir: runs/x\n", ""), r"recipe.yaml: `run_dir` is missing; add it"),
        (("group_size: 4", "group_size: 1"), r"rollout.group_size=1: group advantages of single samples are all 0; use at least 2"),
        (("  path: models/m\n", ""), r"actor.path: which model should be trained\? Give its folder"),
        (("    function: exact_match", "    weight: 1"), r"recipe.yaml:\d: `reward.components.0`: give exactly one of `function` and `model`"),
        (("name: grpo", "minibatches: 3"), r"algorithm.minibatches=3 does not divide rollout.prompts x rollout.group_size = 256"),
        (("    path: train.jsonl", "    size: 3"), r"recipe.yaml:\d+: `data.train.0`: give exactly one of `path`"),
        (("  name: grpo", "  name: grpo\n  truncation: bootstrap"), r"truncation=bootstrap needs values: advantage `group` has no critic"),
        (("  name: grpo", "  name: grpo\n  critic_warmup_steps: 3"), r"critic_warmup_steps=3: advantage `group` has no critic; remove it"),
        (
            ("  steps: 10", "  steps: 10\n  packing: false\n  micro_batch_tokens: 64"),
            r"`train`: micro_batch_tokens counts tokens of packed rows: leave out packing=false",
        ),
        (
            ("  steps: 10", "  steps: 10\n  micro_batch_tokens: many"),
            r"recipe.yaml:\d+: `train.micro_batch_tokens`: .*valid integer.*, or: .*'auto' \(given: 'many'\)$",
        ),
        (
            ("  learning_rate: 2e-6", "  gradient_checkpointing: full"),
            r"recipe.yaml:5: `actor.gradient_checkpointing`: .*valid boolean.*'mlp' or 'auto'",
        ),
        (("  steps: 10", "  steps: 10\n  packing: false\n  micro_batch_tokens: auto"), r"micro_batch_tokens counts tokens of packed rows"),
        (("  group_size: 4", "  top_k: 5"), r"trap 18\): remove them; they belong in validation"),
        (("task: rl", "task: dpo"), r"recipe.yaml:1: `task`: .*'sft', 'reward_model' or 'rl' \(given: 'dpo'\)"),
        (("task: rl", "task: [rl"), r"recipe.yaml:2, column 8: not valid YAML: expected"),
        (("  group_size: 4", "  group_size: 4\n  group_size: 8"), r"recipe.yaml:16: `rollout.group_size` stands twice, first in line 15; keep one"),
        (("train:\n  steps: 10", "actor:\n  path: models/n"), r"recipe.yaml:16: `actor` stands twice, first in line 3; keep one"),
    ],
)
def test_mistakes_are_named_with_place_and_mend(recipe: Any, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**{change[0]: change[1]})


def test_all_mistakes_are_told_at_once(recipe: Any) -> None:
    with pytest.raises(ValueError) as caught:
        recipe(learning_rate="lr_rate", group_size="group_siz")
    assert "recipe.yaml:5" in str(caught.value) and "recipe.yaml:15" in str(caught.value)


def test_a_missing_recipe_names_the_folder_of_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml: No such file or directory; recipes are in scripts/recipes/"):
        load_config(tmp_path / "none.yaml")


def test_foreign_names_lead_to_keys_that_exist() -> None:
    known = set(flat_keys(Config))
    assert {new.split(" ")[0] for new in FOREIGN_NAMES.values()} <= known
    assert not [old for old in FOREIGN_NAMES if old in known]


# ---- overrides


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("actor.learning_rate=1e-5", lambda c: c.actor.learning_rate, 1e-5),
        ("algorithm.kl.coef=0.1", lambda c: c.algorithm.kl.coef, 0.1),  # a section that the recipe does not have
        ("data.train.path=other.jsonl", lambda c: c.data.train[0].path, Path("other.jsonl")),
        ("algorithm.value_clip=null", lambda c: c.algorithm.value_clip, None),
        ("algorithm.value_clip=", lambda c: c.algorithm.value_clip, None),
        ("rollout.eos_token_ids=[1, 2]", lambda c: c.rollout.eos_token_ids, [1, 2]),
        ("actor.lora={r: 8}", lambda c: c.actor.lora.r, 8),
        ("actor.lora.r=8", lambda c: c.actor.lora.r, 8),
        ("tracking.name=a=b", lambda c: c.tracking.name, "a=b"),
        ("deterministic=true", lambda c: c.deterministic, True),
    ],
)
def test_overrides(recipe: Any, override: str, read: Any, expected: Any) -> None:
    assert read(recipe(RECIPE, override)) == expected


def test_overrides_reach_into_lists(recipe: Any) -> None:
    listed = RECIPE.replace("    function: exact_match", "    - function: exact_match\n    - function: gsm8k")
    assert recipe(listed, "reward.components.1.weight=0.5").reward.components[1].weight == 0.5
    with pytest.raises(ValueError, match=r"override reward.components.2.weight: '2' is not an index below 2"):
        recipe(listed, "reward.components.2.weight=0.5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.learning_rate", r"override 'actor.learning_rate': write key.sub=value"),
        ("=3", r"override '=3': write key.sub=value"),
        ("actor.lr=3", r"command line: unknown key `actor.lr`"),
        ("actor.betas=[0.9", r"override actor.betas:1, column 5: not valid YAML"),
        ("actor.lora={r: 4, r: 8}", r"override actor.lora:1: `r` stands twice"),
        ("actor.learning_rate=-1", r"command line: `actor.learning_rate`: .*greater than or equal to 0 \(given: -1\)"),
    ],
)
def test_wrong_overrides(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(RECIPE, override)


# ---- traps


def test_trap_2_dropout_cannot_be_asked_for() -> None:
    """trap 2"""
    for section in (LoraConfig, CriticConfig):
        with pytest.raises(ValueError, match="less than or equal to 0"):
            section(dropout=0.1)


def test_registries_and_config_name_the_same_entries() -> None:
    from rlhf.ops.advantages import ADVANTAGES
    from rlhf.ops.kl import LOSS_ESTIMATORS
    from rlhf.ops.losses import POLICY_LOSSES

    def names(section: Any, key: str) -> set[str]:
        return set(get_args(section.model_fields[key].annotation))

    assert names(AlgorithmConfig, "advantage") == set(ADVANTAGES)
    assert names(AlgorithmConfig, "policy_loss") == set(POLICY_LOSSES)
    assert names(KLConfig, "estimator") == {"k1", *LOSS_ESTIMATORS, "k3_corrected"}


# ---- DeepSpeed


def resolve(tree: dict[str, Any], dtype: str = "float32", trained: bool = True, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"micro_batch": 4, "world_size": 2, "max_grad_norm": 0.5, "on_gpu": False, **changes}
    return resolve_deepspeed(tree, dtype=dtype, trained=trained, **arguments)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_deepspeed_configs_resolve_completely(name: str, dtype: str) -> None:
    """No "auto" is left: DeepSpeed does not resolve batch sizes itself."""
    source = f"ds_configs/{name}.json"
    resolved = resolve(source, dtype)  # type: ignore[arg-type]
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["train_batch_size"] == 8
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["managed_gradient_accumulation"] is False
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] == (dtype == "bfloat16")
    assert resolved["zero_optimization"]["stage"] == int(name[-1])
    assert resolved["timers"] == {"throughput": {"enabled": False}}


def test_a_bucket_of_zero_2_holds_the_largest_parameter() -> None:
    sizes = [10, 10, 60, 20]
    assert [bucket_size({"stage": stage}, sizes) for stage in (1, 2, 3)] == [12, 60, 12]
    assert [bucket_size({"stage": stage, "reduce_bucket_size": 30}, sizes) for stage in (1, 2, 3)] == [30, 60, 30]
    assert bucket_size({"stage": 2, "reduce_bucket_size": 90}, sizes) == 90 and bucket_size({"stage": 3}, [10**10]) == 500_000_000


@pytest.mark.parametrize("given", [{}, {"timers": "auto"}, {"timers": {}}, {"timers": {"throughput": "auto"}}])
def test_no_forward_waits_for_a_timer_unless_that_is_asked_for(given: dict[str, Any]) -> None:
    from deepspeed.utils.config import get_timers_config

    assert not get_timers_config(resolve(given)).enabled
    with pytest.raises(ValueError, match="recipe: `timers` must be an object"):
        resolve({"timers": True})
    asked = {"timers": {"throughput": {"enabled": True, "synchronized": False}}}
    assert resolve(asked)["timers"] == asked["timers"] and get_timers_config(resolve(asked)).enabled


@pytest.mark.parametrize("tree", [{}, {"data_types": {}}, {"data_types": {"grad_accum_dtype": "auto"}}, {"data_types": {"grad_accum_dtype": "fp32"}}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_32_gradients_accumulate_in_fp32_always(tree: dict[str, Any], dtype: str) -> None:
    """trap 32"""
    assert resolve(tree, dtype)["data_types"]["grad_accum_dtype"] == "fp32"


def test_trap_32_bf16_accumulation_is_refused() -> None:
    """trap 32: by name; and at ZeRO-0 with bf16, where DeepSpeed has no fp32 sums."""
    with pytest.raises(ValueError, match=r"recipe: `data_types.grad_accum_dtype` is 'bf16': gradients are accumulated in fp32 \(trap 32\)"):
        resolve({"data_types": {"grad_accum_dtype": "bf16"}})
    config = parse_config({**yaml.safe_load(RECIPE), "deepspeed": {"zero_optimization": {"stage": 0}}})
    role = TrainedModelConfig(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"stage=0 with bfloat16.*use stage 1, or dtype=float32"):
        role_settings(config, role, world_size=1, on_gpu=False)
    role_settings(config, TrainedModelConfig(dtype="float32"), world_size=1, on_gpu=False)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, r'`train_micro_batch_size_per_gpu` is 8 but train.micro_batch is 4; write "auto" there'),
        ({"gradient_accumulation_steps": 4}, r"`gradient_accumulation_steps` is 4 but the accumulation that DeepSpeed may see"),
        ({"train_batch_size": 64}, r"`train_batch_size` is 64 but train.micro_batch x ranks is 8"),
        ({"gradient_clipping": 1.0}, r"`gradient_clipping` is 1.0 but max_grad_norm is 0.5"),
        ({"bf16": {"enabled": True}}, r"`bf16.enabled` is True but the model dtype is float32"),
        ({"bf16": True}, r"`bf16` must be an object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": float("inf")}}, r"`zero_optimization.reduce_bucket_size` is inf; it takes a whole"),
        ({"zero_optimization": [2]}, r"`zero_optimization` must be an object"),
        ({"bf16": {"check_grad_overflow": False}}, r"`bf16.check_grad_overflow`: a gradient that is not finite would go into the weights; remove it"),
        ({"zero_optimisation": {"stage": 2}}, r"unknown key `zero_optimisation`; did you mean `zero_optimization`\?"),
        ({"tensor_parallel": {"autotp_size": 2}}, r"`tensor_parallel`: tensor parallelism is not supported"),
        ({"sequence_parallel_size": 2}, r"`sequence_parallel_size`: sequence parallelism is not supported"),
        ({"compile": {"deepcompile": True}}, r"`compile.deepcompile` is not supported: set actor.compile"),
        ({"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}}, r"`zero_optimization.zenflow` is not supported; remove it"),
        (
            {"zero_optimization": {"stage": 3, "module_granularity_threshold": 9}},
            r'`zero_optimization.module_granularity_threshold`: write "stage3_module_granularity_threshold"',
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            r'`zero_optimization.cpu_offload`: write "offload_optimizer": \{"device": "cpu"\}',
        ),
        ({"fp16": {"enabled": True}}, r"`fp16`: fp16 loss scaling is not supported: use bf16 or fp32"),
        ({"torch_autocast": {"enabled": True}}, r"`torch_autocast`: the rollout and the fused kernels compute in the model's own dtype"),
        ({"scheduler": {"type": "WarmupLR"}}, r"`scheduler`: schedules are set in the recipe: actor.schedule"),
        ({"zero_optimization": {"stage": 4}}, r"`zero_optimization.stage` is 4; 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, r"`zero_optimization.overlap_comm` needs stage 2 or 3, the stage is 1"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, r"`zero_optimization.zero_quantized_weights`: forwards and rollouts"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r'`zero_optimization.offload_param.device` is "nvme": checkpoints',
        ),
    ],
)
def test_contradictions_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^recipe: {message}"):
        resolve(tree)


def test_forwards_are_planned_by_tokens_unless_a_recipe_says_otherwise() -> None:
    for given, expected in (({}, "auto"), ({"micro_batch": 4}, None), ({"packing": False}, None), ({"micro_batch_tokens": None}, None)):
        assert TrainConfig(**given).micro_batch_tokens == expected
    assert TrainConfig(micro_batch=4, micro_batch_tokens="auto").micro_batch_tokens == "auto"
    tree: dict[str, Any] = {"task": "sft", "run_dir": "run", "actor": {"path": "m"}, "data": {"train": {"path": "x.jsonl"}}}
    config = parse_config(tree)
    assert config.train.micro_batch_tokens == "auto" and parse_config(yaml.safe_load(to_yaml(config))) == config


def test_numbers_that_agree_are_fine() -> None:
    resolve({"train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "gradient_clipping": 0.5, "fp16": {"enabled": False}, "scheduler": "auto"})
    resolve({"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1, "compile": {"deepcompile": False}, "comment": "of ours"})


def test_frozen_models_run_at_stage_3_or_0() -> None:
    for stage, expected in ((0, 0), (1, 0), (2, 0), (3, 3)):
        tree = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "Adam"}}
        resolved = resolve(tree, trained=False)
        assert resolved["zero_optimization"]["stage"] == expected
        assert "optimizer" not in resolved
        assert "offload_optimizer" not in resolved["zero_optimization"]


def test_the_users_tree_is_not_changed_and_unowned_autos_are_dropped() -> None:
    tree = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "hybrid_engine": {"enabled": True}}
    before = json.dumps(tree)
    resolved = resolve(tree)
    assert json.dumps(tree) == before
    assert "reduce_bucket_size" not in resolved["zero_optimization"]
    assert "hybrid_engine" not in resolved


def with_engine_block(block: Any, **more: Any) -> Config:
    return parse_config({**yaml.safe_load(RECIPE), "deepspeed": {"hybrid_engine": block}, **more})


def test_the_hybrid_engine_block_is_read_as_words_for_our_engine() -> None:
    """DeepSpeed-Chat's keys; the actor's own JSON comes before the one for all roles."""
    every = {"enabled": True, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": True, "pin_parameters": True}
    every["tp_gather_partition_size"] = 8
    assert hybrid_engine_words(with_engine_block(every)) == {"max_context": 512, "release": True}
    assert hybrid_engine_words(with_engine_block({})) == {"max_context": 0, "release": False}
    actor = {**yaml.safe_load(RECIPE)["actor"], "deepspeed": {"hybrid_engine": {"max_out_tokens": 64}}}
    assert hybrid_engine_words(with_engine_block(every, actor=actor)) == {"max_context": 64, "release": False}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enabled": False}, "`hybrid_engine.enabled` is False.*set it to true or remove the block"),
        ({"inference_tp_size": 2}, "`hybrid_engine.inference_tp_size` is 2.*set it to 1"),
        ({"max_out_tokens": "many"}, "`hybrid_engine.max_out_tokens` is 'many'"),
        ({"max_out_token": 5}, "`hybrid_engine.max_out_token` is unknown; known: .*max_out_tokens"),
        ([], "`hybrid_engine` must be an object"),
    ],
)
def test_what_the_hybrid_engine_cannot_do_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid_engine_words(with_engine_block(block))


def test_a_deterministic_run_has_no_queue() -> None:
    with pytest.raises(ValueError, match=r"rollout.balance=queue.*use plan or auto"):
        parse_config({**yaml.safe_load(RECIPE), "deterministic": True, "rollout": {"balance": "queue"}})


def test_unreadable_deepspeed_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deepspeed=none.json: no such file; ds_configs/ has zero1.json"):
        read_deepspeed("none.json")
    (tmp_path / "a.json").write_text('{\n "zero": ,\n}')
    with pytest.raises(ValueError, match=r"a.json:2: not valid JSON"):
        read_deepspeed(str(tmp_path / "a.json"))
    (tmp_path / "twice.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(ValueError, match=r"twice.json: `stage` stands twice in one object; keep one"):
        read_deepspeed(str(tmp_path / "twice.json"))
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match=r"b.json: a DeepSpeed config is a JSON object"):
        read_deepspeed(str(tmp_path / "b.json"))


def test_each_role_may_have_its_own() -> None:
    tree = {**yaml.safe_load(RECIPE), "deepspeed": "ds_configs/zero1.json", "reference": {"deepspeed": "ds_configs/zero3.json"}}
    config = parse_config(tree)
    assert role_settings(config, config.actor, world_size=1, on_gpu=False)["zero_optimization"]["stage"] == 1
    assert role_settings(config, config.reference, world_size=1, on_gpu=False)["zero_optimization"]["stage"] == 3


# ---- one base for several roles


def on_one_base(critic: dict[str, Any], lora: Any = None, **sections: Any) -> Config:
    tree = yaml.safe_load(RECIPE.replace("grpo", "ppo"))
    tree["actor"]["lora"] = lora
    return parse_config({**tree, "critic": {"share_base": True, **critic}, **sections})


def test_a_critic_on_the_actors_base_has_adapters_like_the_actors_unless_told(tmp_path: Path) -> None:
    config = on_one_base({}, {"r": 8, "alpha": 4})
    assert config.critic.lora == config.actor.lora == LoraConfig(r=8, alpha=4)
    assert on_one_base({"lora": {"r": 2}}, {"r": 8}).critic.lora == LoraConfig(r=2)
    assert on_one_base({"init": "path", "path": "models/m"}, {"r": 8}).critic.share_base
    assert on_one_base({"share_base": False}, {"r": 8}).critic.lora is None
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


REWARD_ON_BASE: dict[str, Any] = {"components": {"model": {"path": "models/adapter", "share_base": True}}}


@pytest.mark.parametrize(
    ("critic", "lora", "sections", "message"),
    [
        ({}, None, {}, r"critic.share_base: the actor trains all its weights, .* give actor.lora, or set share_base=false"),
        ({"init": "path", "path": "models/other"}, {}, {}, r"critic.share_base: .* critic.init=path reads models/other .* use critic.init=actor"),
        ({"init": "path", "path": "models/m", "head": "keep"}, {}, {}, r"critic.share_base: .* with head=keep; use .* head=zero"),
        ({"init": "reward"}, {}, {"reward": {"components": {"model": {"path": "models/r"}}}}, r"critic.init=reward reads models/r"),
        ({"init": "reward"}, {}, {"reward": REWARD_ON_BASE}, r"critic.init=reward: the first reward model has no body of its own"),
        ({"share_base": False}, None, {"reward": REWARD_ON_BASE}, r"reward.components.0.model.share_base: the actor trains all its weights"),
        ({"share_base": False}, {}, {"reference": {"share_base": True}}, r"unknown key `reference.share_base`"),
    ],
)
def test_what_cannot_share_the_base_is_refused(critic: dict[str, Any], lora: Any, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_one_base(critic, lora, **sections)


@pytest.mark.parametrize(
    ("zero", "role", "further", "message"),
    [
        ({"stage": 0}, TrainedModelConfig(offload=True), {}, "offload=true: ZeRO-0 has no flat master weights"),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            TrainedModelConfig(offload=True),
            {},
            "zero_optimization.offload_optimizer .* the same",
        ),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, ModelConfig(offload=True), {}, "zero_optimization.offload_param .* the same"),
        ({"stage": 3}, TrainedModelConfig(offload=True), {"optimizer": {"type": "SGD"}}, "remove `optimizer`"),
        ({"stage": 2}, RewardModelConfig(offload=True, share_base=True), {}, "offload=true with share_base=true"),
        ({"stage": 3}, TrainedModelConfig(offload=True), {}, None),
        ({"stage": 0}, ModelConfig(offload=True), {}, None),
    ],
)
def test_offload_is_refused_where_it_cannot_be(
    recipe: Any, zero: dict[str, Any], role: ModelConfig, further: dict[str, Any], message: str | None
) -> None:
    config = recipe().model_copy(update={"deepspeed": {"zero_optimization": zero, **further}})
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        role_settings(config, role, world_size=2, on_gpu=False)
