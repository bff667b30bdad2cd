"""Actor, critic, reference and reward model on one frozen base (`share_base`): the same bits as on a base each, and the base is there once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rlhf.models.compiling as compiling_module
import rlhf.ops.head as head_module
import rlhf.trainers.rl as rl_module
import rlhf.trainers.run as run_module
from rlhf.config import ROOT, Config, LoraConfig, ModelConfig, Recomputed, role_settings
from rlhf.distributed import World
from rlhf.engine import SharedPlacement, WholePlacement, full_tensors
from rlhf.models.compiling import compile_layers
from rlhf.models.export import export_adapter, export_model, on_host
from rlhf.models.forward import position_ids
from rlhf.models.loading import load_causal_lm, load_scalar_model
from rlhf.models.lora import adapter_parameters, add_adapters, check_adapter, frozen_base, load_adapter, weight_layout
from rlhf.preflight import check
from rlhf.rewards.compose import Rewards
from rlhf.rewards.model import RewardModel
from rlhf.trainers.rl import Models, learn
from rlhf.trainers.run import Run
from rlhf.types import Scores
from tests.distributed.steps import open_models
from tests.helpers import VOCABULARY, make_rollout, make_scores, rl_config, run_ranks, save_state, saved_state, single_world, tiny_tokenizer

ROLLOUT = make_rollout([4, 4, 9, 9, 2, 2, 5, 3], [3, 8, 5, 7, 4, 6, 1, 2], window=8)
SCORES = make_scores([0.3, -1.0, 0.5, 2.0, -0.2, 1.0, 0.1, 0.7])


def score(rewards: Rewards) -> Scores:
    """Of models alone. (collective)"""
    return rewards.score(ROLLOUT, rewards.early(), rewards.score_with_models(ROLLOUT))


@pytest.fixture(scope="module")
def reward(models: Path) -> Path:
    """A reward model with LoRA on `llama`, as the task reward_model leaves it: adapter/ and, merged, hf/."""
    folder, world = models.parent / "reward", single_world()
    module = scalar(models, world)
    generator = torch.Generator().manual_seed(4)
    module = add_adapters(module, LoraConfig(r=2), 9)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    export_adapter(folder / "adapter", module, on_host(adapter_parameters(module).items()), models / "llama", (0.5, 2.0))
    export_model(folder / "hf", module, on_host(full_tensors(weight_layout(module))), models / "llama", tiny_tokenizer(), (0.5, 2.0))
    return folder


def scalar(models: Path, world: World, packing: bool = False) -> Any:
    return load_scalar_model(ModelConfig(path=models / "llama"), "reward", WholePlacement(world), world, torch.float32, "zero", packing)


def recipe(
    models: Path, reward: Path, stage: int, shared: bool, sgd: bool = True, dtype: str = "float32", train: dict[str, Any] | None = None, **role: Any
) -> Config:  # fmt: skip
    """PPO with four roles under LoRA; shared: all of them on the actor's base."""
    role = {"dtype": dtype, **role}
    judge = {key: value for key, value in role.items() if key != "gradient_checkpointing"}
    return rl_config(
        models,
        stage,
        sgd,
        actor={"lora": {"r": 4}, "learning_rate": 0.3, **role},
        critic={"lora": {"r": 3}, "learning_rate": 0.3, "share_base": shared, **role},
        reward={"components": [{"model": {"path": reward / ("adapter" if shared else "hf"), "share_base": shared, **judge}}]},
        algorithm={"kl": {"coef": 0.1}, "minibatches": 2},
        rollout={"prompts": 8, "max_new_tokens": 8},
        train={"steps": 2, "micro_batch": 2, **(train or {})},
    )


def ppo_steps(held: Models, run: Run, steps: range) -> dict[str, Tensor]:
    """Everything that the steps compute: scores, logprobs, values, losses and norms."""
    found = {}
    for step in steps:
        scores = score(held.rewards)
        experience, update = learn(held, run.config, run.timer, ROLLOUT, lambda: SCORES, step, 0.1, run.world)
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None and experience.values is not None
        mask = experience.mask
        found |= {f"{step} {name}": torch.tensor(value) for name, value in update.metrics().items()}
        found |= {f"{step} scores": scores.total, f"{step} values": experience.values[:, :-1][mask]}
        found |= {f"{step} old": experience.old_logprobs[mask], f"{step} reference": experience.ref_logprobs[mask]}
    return found


def weights(held: Models) -> dict[str, Tensor]:
    return {f"{role} {n}": p.detach().clone() for role, engine in held.engines.items() for n, p in engine.module.named_parameters()}


def scorer(held: Models) -> RewardModel:
    (found,) = held.rewards.scorers
    assert isinstance(found, RewardModel)
    return found


# ---- the same bits


FORWARDS: dict[str, dict[str, Any]] = {"packed": {}, "padded": {"packing": False}, "tokens": {"micro_batch_tokens": 30}}
HEADS, CHECKPOINTING, STAGES = ("one chunk", "chunks", "logits"), (False, True, "mlp"), ((0, 1), (0, 2), (1, 2), (2, 1), (2, 2))


def both_ways(
    world: World, models: Path, reward: Path, stage: int, checkpointing: Recomputed, forwards: str, head: str, backend: str | None
) -> list[dict[str, Tensor]]:  # fmt: skip
    if head == "logits":
        run_module.fuse_head = rl_module.fuse_head = lambda model: False  # type: ignore[assignment]
    elif head == "chunks":
        head_module.CHUNK_BYTES = 5 * VOCABULARY * 4
    compiling_module.BACKEND = backend or compiling_module.BACKEND
    results = []
    for shared in (False, True):
        config = recipe(models, reward, stage, shared, train=FORWARDS[forwards], gradient_checkpointing=checkpointing, compile=backend is not None)
        held, run = open_models(config, world)
        if not shared:  # with the same adapters on a base of its own, where the recipe could only say hf/
            module = load_adapter(scalar(models, world, config.train.packing), reward / "adapter").eval()
            if backend:
                compile_layers(module)
            scorer(held).forward = module
        before = weights(held)
        found = ppo_steps(held, run, range(1, 3))
        after = weights(held)
        for name in after:
            assert torch.equal(before[name], after[name]) == (".lora_" not in name and "score" not in name), name
        results.append(found | after)
    return results


def one_base_computes_the_same(models: Path, reward: Path, place: tuple[int, int], *how: Any) -> None:
    stage, ranks = place
    for apart, shared in run_ranks(both_ways, ranks, models, reward, stage, *how, timeout=110):
        assert apart.keys() == shared.keys() and {"2 reference", "2 values", "1 actor/pg_loss", "2 critic/vf_loss"} <= apart.keys()
        assert [name for name in apart if not torch.equal(apart[name], shared[name])] == []
        torch.testing.assert_close(shared["1 reference"], shared["2 reference"], atol=1e-5, rtol=1e-5)  # other rows meet in a forward of step 2
        for name in ("old", "values"):
            assert (shared[f"1 {name}"] - shared[f"2 {name}"]).abs().max() > 1e-2


# Every pair of values meets; of compiled layers, which take long, there is one more below.
PAIRWISE = [
    (place, CHECKPOINTING[j], tuple(FORWARDS)[(i + j) % 3], HEADS[(i + 2 * j) % 3], None) for i, place in enumerate(STAGES) for j in range(3)
]  # fmt: skip


@pytest.mark.parametrize(("place", "checkpointing", "forwards", "head", "backend"), PAIRWISE)
def test_one_base_computes_what_a_base_each_computes(
    models: Path, reward: Path, place: tuple[int, int], checkpointing: Recomputed, forwards: str, head: str, backend: str | None
) -> None:
    one_base_computes_the_same(models, reward, place, checkpointing, forwards, head, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("forwards", "head", "checkpointing"), list(itertools.product(FORWARDS, HEADS, CHECKPOINTING)))
@pytest.mark.parametrize("place", STAGES)
def test_one_base_computes_what_a_base_each_computes_full_grid(
    models: Path, reward: Path, place: tuple[int, int], checkpointing: Recomputed, forwards: str, head: str
) -> None:
    one_base_computes_the_same(models, reward, place, checkpointing, forwards, head, None)


@pytest.mark.parametrize(
    ("i", "j"), [pytest.param(i, j, marks=[] if (i, j) == (0, 1) else pytest.mark.slow) for i, j in itertools.product(range(3), range(3))]
)
def test_one_base_computes_what_a_base_each_computes_compiled(models: Path, reward: Path, i: int, j: int) -> None:
    how = (CHECKPOINTING[j], tuple(FORWARDS)[(i + j) % 3], HEADS[i])
    one_base_computes_the_same(models, reward, ((2, 1), (2, 2), (0, 2))[i], *how, "eager" if (i, j) == (0, 1) else "aot_eager")


def scores_of(world: World, models: Path, reward: Path, shared: bool) -> Tensor:
    held, _ = open_models(recipe(models, reward, 0, shared), world)
    assert (scorer(held).mean, scorer(held).std) == (0.5, 2.0)
    return score(held.rewards).total


def test_adapters_score_as_the_merged_reward_model(models: Path, reward: Path) -> None:
    (found,), (expected,) = (run_ranks(scores_of, 1, models, reward, shared) for shared in (True, False))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- the base is there once


def what_is_held(world: World, models: Path, reward: Path, stage: int, dtype: str) -> dict[str, Any]:
    import deepspeed

    moved = 0
    broadcast = deepspeed.comm.broadcast

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal moved
        moved += tensor.numel() * tensor.element_size()
        return broadcast(tensor, *arguments, **options)

    deepspeed.comm.broadcast = counting
    held, run = open_models(recipe(models, reward, stage, True, dtype=dtype), world)
    assert held.critic is not None
    ppo_steps(held, run, range(1, 2))
    base = frozen_base(held.actor.module)
    roles: dict[str, nn.Module] = {"actor": held.actor.module, "critic": held.critic.module, "reward": scorer(held).forward.module}  # type: ignore[attr-defined]
    own = {name: [p for p in module.parameters() if all(p is not b for b in base.values())] for name, module in roles.items()}
    size = {name: sum(p.numel() * p.element_size() for p in parameters) for name, parameters in {"base": list(base.values()), **own}.items()}
    parameters = {id(p): p for module in roles.values() for p in module.parameters()}
    storages = {p.untyped_storage().data_ptr() for p in base.values()}
    body = frozen_base(held.critic.module)
    return {
        "moved": moved,
        "size": size,
        "parameters": len(parameters) - len(base) - sum(map(len, own.values())),
        "storages": len(base) - len(storages),
        "same": all(body[name].data_ptr() == base[name].data_ptr() for name in body if name != "score.weight"),
        "trained": [
            n for module in roles.values() for n, p in module.named_parameters() if p.requires_grad and ".lora_" not in n and "score" not in n
        ],
    }


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16")])
def test_the_base_is_held_and_broadcast_once(models: Path, reward: Path, stage: int, dtype: str) -> None:
    for found in run_ranks(what_is_held, 2, models, reward, stage, dtype):
        assert found["same"] and found["parameters"] == found["storages"] == 0 and not found["trained"]
        size = found["size"]
        assert 0 < max(size["critic"], size["reward"]) < size["base"] / 2
        assert size["base"] < found["moved"] <= size["base"] + size["actor"] + size["critic"]


@pytest.mark.parametrize("name", ["llama_untied", "qwen2", "gpt2"])
def test_other_architectures_share_too(models: Path, tmp_path: Path, name: str) -> None:
    """Untied heads, biases and gpt2's transposed weights: a reward model with LoRA, written and read again on the base of a trained actor."""
    role, world = ModelConfig(path=models / name), single_world()
    actor = add_adapters(load_causal_lm(role, "actor", WholePlacement(world), world, torch.float32), LoraConfig(r=4), 0)
    apart, shared = (
        load_scalar_model(role, "reward", placement, world, torch.float32, "zero")
        for placement in (WholePlacement(world), SharedPlacement(world, frozen_base(actor)))
    )
    trained = add_adapters(apart, LoraConfig(r=2), 9)
    with torch.no_grad():
        for parameter in [p for module in (actor, trained) for p in adapter_parameters(module).values()]:
            parameter.normal_(std=0.2)
    export_adapter(tmp_path, trained, on_host(adapter_parameters(trained).items()), models / name)
    read = load_adapter(shared, tmp_path)
    ids = ROLLOUT.input_ids
    with torch.no_grad():
        found, expected = (module.eval()(input_ids=ids, position_ids=position_ids(ids)) for module in (read, trained))
    assert torch.equal(found, expected) and expected.std() > 0.1
    with pytest.raises(ValueError, match=r"actor's base has no \['.*so it cannot be shared"):
        load_scalar_model(role, "reward", SharedPlacement(world, {"other": nn.Parameter(torch.zeros(1), False)}), world, torch.float32, "zero")


# ---- what is saved


def two_steps(world: World, models: Path, reward: Path, stage: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AdamW: two steps, and one step, a checkpoint, another step in models that were loaded anew."""
    config = recipe(models, reward, stage, True, sgd=False)
    held, run = open_models(config, world)
    straight = ppo_steps(held, run, range(1, 2))
    for name, engine in held.engines.items():
        save_state(engine, folder / name)
    if export := run._exporter(held.actor, None):
        export(folder)
    straight = ppo_steps(held, run, range(2, 3)) | weights(held)
    again, run = open_models(config, world)
    for name, engine in again.engines.items():
        engine.load(folder / name)
    return straight, ppo_steps(again, run, range(2, 3)) | weights(again)


def trained(folder: Path) -> dict[str, Tensor]:
    """What was kept of an engine's weights."""
    return {key.removeprefix("weight/"): tensor for key, tensor in saved_state(folder)[0].items() if key.startswith("weight/")}


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_a_checkpoint_holds_what_each_role_trains_and_resumes(models: Path, reward: Path, tmp_path: Path, stage: int, ranks: int) -> None:
    for straight, resumed in run_ranks(two_steps, ranks, models, reward, stage, tmp_path):
        assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    for role, rank in (("actor", 4), ("critic", 3)):
        state = trained(tmp_path / role)
        assert [name for name in state if ".lora_" not in name and not name.endswith("score.weight")] == []
        assert {tensor.shape[0] for name, tensor in state.items() if ".lora_A" in name} == {rank}
        assert any("score" in name for name in state) == (role == "critic")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    actor = trained(tmp_path / "actor")
    assert adapter.keys() == {name.replace(".default.", ".") for name in actor}
    assert all(torch.equal(adapter[name.replace(".default.", ".")], tensor) for name, tensor in actor.items())
    from peft import PeftModel

    plain, merged = (AutoModelForCausalLM.from_pretrained(folder) for folder in (models / "llama", tmp_path / "hf"))
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():  # in float64, as such large adapters leave float32 few digits
        found, expected = (model.double().eval()(ROLLOUT.input_ids).logits for model in (merged, adapted))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- what is refused


def test_zero_3_and_other_dtypes_are_refused_before_anything_loads(models: Path, reward: Path) -> None:
    for role in ("critic", "reward"):
        config = recipe(models, reward, 3, True)
        sharing = config.critic if role == "critic" else config.reward.components[0].model
        assert sharing is not None
        with pytest.raises(ValueError, match=r"ZeRO-3 can not run two engines on one base: .* use ds_configs/zero2.json or share_base=false"):
            role_settings(config, sharing, world_size=2, on_gpu=False)
        apart = sharing.model_copy(update={"deepspeed": str(ROOT / "ds_configs" / "zero2.json")})  # the actor is still partitioned
        with pytest.raises(ValueError, match="ZeRO-3 can not run two engines"):
            role_settings(config, apart, world_size=2, on_gpu=False)
        with pytest.raises(ValueError, match=r"the base is float32 \(actor.dtype\), the role that shares it bfloat16"):
            role_settings(recipe(models, reward, 2, True), sharing.model_copy(update={"dtype": "bfloat16"}), world_size=2, on_gpu=False)
    with pytest.raises(ValueError, match="ZeRO-3 can not run two engines"):
        check(recipe(models, reward, 3, True), 1, False)
    check(recipe(models, reward, 2, True), 1, False)


def changed(reward: Path, folder: Path, **entries: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((reward / "adapter" / "adapter_model.safetensors").read_bytes())
    config = json.loads((reward / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **entries}))
    return folder


def test_reward_models_that_are_not_adapters_on_this_base_are_refused(models: Path, reward: Path, tmp_path: Path) -> None:
    check_adapter(reward / "adapter", models / "llama", "reward.components.0.model")
    for folder, message in (
        (
            reward / "hf",
            r"reward.components.0.model.path=.*hf: no adapter \(adapter_config.json and adapter_model.safetensors\) in it; share_base needs",
        ),
        (None, "path=None: no adapter"),
        (changed(reward, tmp_path / "a", base_model_name_or_path=str(models / "qwen2")), "trained on the base .*qwen2, but the actor's is .*llama"),
        (changed(reward, tmp_path / "b", base_model_name_or_path=None), "on the base None"),
        (changed(reward, tmp_path / "c", peft_type="IA3"), "an adapter of type IA3"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapter(folder, models / "llama", "reward.components.0.model")
    headless = changed(reward, tmp_path / "d")
    tensors = load_file(headless / "adapter_model.safetensors")
    tensors.pop("base_model.model.score.weight")
    save_file(tensors, headless / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="without a scalar head"):
        check_adapter(headless, models / "llama", "reward.components.0.model")
    with pytest.raises(ValueError, match=r"the adapters do not fit the base: \['base_model.model.score.weight'\]"):
        load_adapter(scalar(models, single_world()), headless)
    for entries, message in (({"use_rslora": True}, "use_rslora=True are not supported"), ({"rank_pattern": {"q_proj": 1}}, "rank_pattern=")):
        folder = changed(reward, tmp_path / next(iter(entries)), **entries)
        with pytest.raises(ValueError, match=message):
            check_adapter(folder, models / "llama", "reward.components.0.model")
        with pytest.raises(ValueError, match=message):
            load_adapter(scalar(models, single_world()), folder)
