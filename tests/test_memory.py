"""The memory plan against what autograd keeps, and the budget. On CPU the custom functions of `rlhf.ops.fused` run themselves; only the launches of
their kernels do nothing, since what is kept does not depend on values. A stand-in keeps for packed attention what the flash kernel keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf import budget, memory
from rlhf.batching import pack
from rlhf.budget import choose, open_choices, read_budget, smaller, with_value, with_values, write_budget
from rlhf.config import Config, LoraConfig, Recomputed, TrainedModelConfig, parse_config, role_settings
from rlhf.engine import WholePlacement, _neighbours
from rlhf.memory import GIB, MemoryMeter, Plan, largest_forward, lends_weights, longest_row, plan_memory
from rlhf.metrics.flops import model_shape
from rlhf.models import packing
from rlhf.models.activations import count_kept
from rlhf.models.checkpointing import recompute
from rlhf.models.forward import inputs_of
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.loading import load_causal_lm, load_scalar_model, without_dropout
from rlhf.models.lora import add_adapters
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import FAMILIES as HEADS
from rlhf.models.scoring_head import fuse_head, has_plain_head, logprobs_of
from rlhf.ops import fused
from rlhf.preflight import decoding, roles
from rlhf.trainers import probe
from rlhf.trainers.probe import stand_in, worst_rows
from rlhf.trainers.run import Run
from tests.helpers import rl_config, single_world

_SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 8}
_SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, head_dim=16),
    "qwen2": Qwen2Config(**_SIZES, head_dim=16),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    "mistral": MistralConfig(**_SIZES, sliding_window=None, head_dim=16),
}
_OTHERS = {**_SIZES, "head_dim": 16, "ffn_dim": 320, "word_embed_proj_dim": 128, "max_position_embeddings": 128, "pad_token_id": 0}
OTHERS = sorted((*(set(HEADS) - set(FAMILIES)), "granite", "cohere", "gemma", "glm", "phi", "apertus", "mixtral"))
FAMILIES_AND_OTHERS = {**FAMILIES, **{name: CONFIG_MAPPING[name](**_OTHERS) for name in OTHERS}}
LENGTHS = [60, 40, 70]


class _Launched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **options: None


class _Flash(torch.autograd.Function):
    """Keeps what variable-length flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q.contiguous(), k.contiguous(), v.contiguous(), out, torch.zeros(q.shape[:2]))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:3])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in bfloat16."""
    for name in ("_add_norm", "_head_norm", "_silu_mul", "_rotate_heads"):
        monkeypatch.setattr(fused, name, _Launched())
    monkeypatch.setattr(fused, "_in_kernels", lambda *tensors: True)
    monkeypatch.setattr(fused, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()))


def kept_bytes(module: Any, packed: bool, scalar: bool, checkpointing: Recomputed) -> int:
    """Bytes that a forward keeps for its backward pass, each storage once, parameters left out."""
    rows, width = len(LENGTHS), max(LENGTHS)
    tokens, size = sum(LENGTHS) if packed else rows * width, next(module.parameters()).element_size()
    angles = 2 * tokens * getattr(module.config, "head_dim", 0) * size  # what is computed again holds them besides
    ids = torch.zeros(rows, width, dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # or an address might be given to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if scalar:
            inputs = inputs_of(ids, pack(LENGTHS) if packed else None)
            inputs.pop("use_cache")
            result = module(**inputs).sum()
        elif packed:
            inputs = inputs_of(ids, pack(LENGTHS))
            keep_ = torch.arange(1, sum(LENGTHS)) - 1
            result = logprobs_of(module, inputs, keep_, inputs["input_ids"][:, 1:], 1.0)[0].sum()
        else:
            result = logprobs_of(module, inputs_of(ids, None), torch.arange(width - 1), ids[:, 1:], 1.0)[0].sum()
    assert result.requires_grad
    return sum(found.values()) + (checkpointing is True) * angles


def blank(family: str, dtype: torch.dtype, scalar: bool, fused: bool = True) -> Any:
    make: Any = AutoModel if scalar else AutoModelForCausalLM
    module = make.from_config(without_dropout(copy.deepcopy(FAMILIES_AND_OTHERS[family])), dtype=dtype, attn_implementation="sdpa")
    module = ScalarModel(module, 128) if scalar else module
    if fused:
        fuse(module)
    return module


def adapted(module: Any, lora: bool) -> Any:
    if not lora:
        return module
    targets = ["q_proj", "v_proj"] if module.config.model_type == "mixtral" else "all-linear"  # experts can have none
    plain, module = module, add_adapters(module, LoraConfig(r=8, target_modules=targets), 0)
    plain.enable_input_require_grads()  # as under ZeRO-3: else the first norm keeps nothing
    return module.to(next(plain.parameters()).dtype)


def built(family: str, dtype: torch.dtype, packed: bool, lora: bool, checkpointing: Recomputed, scalar: bool) -> torch.nn.Module:
    plain = blank(family, dtype, scalar)
    if packed:
        pack_attention(plain)
    module: torch.nn.Module = adapted(plain, lora)
    fuse_head(plain)
    recompute(plain, checkpointing, "actor")
    return module.train()


def predicted(family: str, dtype: torch.dtype, packed: bool, lora: bool, checkpointing: Recomputed, scalar: bool) -> float:
    """As `held_by` does, on this test's tokens."""
    with torch.device("meta"):
        module = adapted(blank(family, dtype, scalar), lora)
    tokens = sum(LENGTHS) if packed else len(LENGTHS) * max(LENGTHS)
    scored = tokens - 1 if packed else tokens - len(LENGTHS)
    kept = count_kept(module, compiled=False)
    shape, chunked = model_shape(FAMILIES_AND_OTHERS[family]), has_plain_head(FAMILIES_AND_OTHERS[family])
    return memory.Forward(shape, dtype.itemsize, tokens, scored, 1 if scalar else 300, kept, checkpointing, chunked, not lora).kept()


VARIANTS = [
    (packed, lora, checkpointing, scalar)
    for packed in (True, False)
    for lora, checkpointing, scalar in (
        *((False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)),
        *((False, "mlp", False), (True, "mlp", False), (True, "mlp", True)),
    )
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("packed", "lora", "checkpointing", "scalar"), VARIANTS)
def test_activations_in_kernels(
    family: str, packed: bool, lora: bool, checkpointing: Recomputed, scalar: bool, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_in_groups", lambda q, k, v, *rest: _Flash.apply(q, k, v))
    found = kept_bytes(built(family, torch.bfloat16, packed, lora, checkpointing, scalar), packed, scalar, checkpointing)
    assert predicted(family, torch.bfloat16, packed, lora, checkpointing, scalar) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("packed", "lora", "checkpointing", "scalar"), VARIANTS)
def test_activations_in_plain_torch(
    family: str, packed: bool, lora: bool, checkpointing: Recomputed, scalar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_in_groups", lambda q, k, v, *rest: _Flash.apply(q, k, v))
    found = kept_bytes(built(family, torch.float32, packed, lora, checkpointing, scalar), packed, scalar, checkpointing)
    assert predicted(family, torch.float32, packed, lora, checkpointing, scalar) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(
    ("lora", "checkpointing", "scalar"), [(False, False, False), (True, False, True), (False, "mlp", False), (False, True, False)]
)
def test_activations_of_other_families(family: str, lora: bool, checkpointing: Recomputed, scalar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the operations that their layers are made of: norms that are more, or elsewhere, or keep a mean; MLPs without a gate; tanh, squares."""
    if family == "opt" and checkpointing == "mlp":
        pytest.skip("its layers have no MLP of their own: refused (`checkpointing.mlps`)")
    monkeypatch.setattr(packing, "_in_groups", lambda q, k, v, *rest: _Flash.apply(q, k, v))
    found = kept_bytes(built(family, torch.bfloat16, True, lora, checkpointing, scalar), True, scalar, checkpointing)
    assert predicted(family, torch.bfloat16, True, lora, checkpointing, scalar) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2", "llama, dynamic", "gpt_neo"])
def test_activations_of_attention_that_is_the_models_own(family: str) -> None:
    """Rows that are not packed: matrices of tokens by tokens, more than all the rest here."""
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    local = {"num_layers": 3, "num_heads": 8, "attention_types": [[["global"], 3]], "attention_dropout": 0.0, "embed_dropout": 0.0}
    more = {"llama, dynamic": dynamic, "gpt_neo": {**local, "resid_dropout": 0.0}}.get(family, {})
    config = CONFIG_MAPPING[family.split(",")[0]](**{**_OTHERS, **more} if family != "gpt_neo" else {"hidden_size": 128, "vocab_size": 300, **more})

    def make() -> Any:
        return AutoModelForCausalLM.from_config(without_dropout(config), dtype=torch.bfloat16, attn_implementation="eager")

    with torch.device("meta"):
        module = make()
    shape, tokens = model_shape(config), len(LENGTHS) * max(LENGTHS)
    kept = count_kept(module, False, row=max(LENGTHS))
    found = kept_bytes(make().train(), False, False, False)
    planned = memory.Forward(shape, 2, tokens, tokens - len(LENGTHS), 300, kept, chunked=False).kept()
    assert planned == pytest.approx(found, rel=0.05) and kept.layer > 2 * 8 * max(LENGTHS)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "falcon_h1", "jamba"])
def test_layers_that_are_no_attention_are_counted(family: str) -> None:
    """Rows that are not packed again, and as the update calls the model: with a mask these would look into it. Some pad short rows by a multiple."""
    config = CONFIG_MAPPING[family](vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4)

    def make() -> Any:
        return AutoModelForCausalLM.from_config(without_dropout(config), dtype=torch.bfloat16, attn_implementation="sdpa")

    with torch.device("meta"):
        kept = count_kept(make(), False, row=max(LENGTHS))
    tokens = len(LENGTHS) * max(LENGTHS)
    found = kept_bytes(make().train(), False, False, False)
    assert memory.Forward(model_shape(config), 2, tokens, tokens - len(LENGTHS), 300, kept, chunked=False).kept() == pytest.approx(found, rel=0.05)


def test_without_a_plan_layers_are_computed_again(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_counted", {})

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("it reads values")

    monkeypatch.setattr(memory, "count_kept", refused)
    found, line = chosen(auto(**ALL), 80)
    assert found.actor.recomputed is True and not on_host(found)
    assert "no plan of the memory: actor: what its activations take cannot be counted (RuntimeError: it reads values)" in line


# --------------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Any:
    def make(stage: int = 3, **sections: Any) -> Config:
        bf16 = {"dtype": "bfloat16"}
        trained = {"actor": bf16, "critic": bf16, "reference": bf16, "algorithm": {"kl": {"coef": 0.1}}}
        merged = {name: {**trained.get(name, {}), **sections.get(name, {})} for name in {*trained, *sections}}
        return rl_config(models, stage, sgd=False, **merged).model_copy(update={"run_dir": tmp_path})

    return make


def planned(config: Config, ranks: int = 2, capacity: int | None = None) -> Plan:
    return plan_memory(config, roles(config), ranks, capacity=capacity)


def test_phases_and_shares(recipe: Any) -> None:
    plan = planned(recipe())
    assert list(plan.phases) == ["gen", "ref", "values", "old_log_prob", "update_actor", "update_critic", "hand_over", "save_checkpoint"]
    parameters = 50 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32  # llama, tied
    update = plan.phases["update_actor"]
    assert update["actor: weights"] == 2 * parameters / 2 and update["actor: moments"] == 8 * parameters / 2
    assert update["rollout: weights"] == 2 * parameters  # a whole copy
    assert "actor: activations" not in plan.phases["gen"] and "rollout: prefill and logits" not in update

    two = planned(recipe(2)).phases["update_actor"]
    assert two["actor: weights"] == 2 * parameters and two["actor: gradients"] == 4 * parameters / 2 and "rollout: weights" not in two
    one = planned(recipe(1)).phases["update_actor"]
    assert one["actor: gradients"] == 4 * parameters and one["actor: master weights"] == 4 * parameters / 2

    assert "a whole copy of the actor" in decoding(recipe(), 2, True) and "adapters" not in decoding(recipe(), 2, True)
    assert decoding(recipe(2), 2, True) == "lean decoder; on the actor's own weights"
    assert decoding(recipe(2, actor={"lora": {"r": 4}}), 2, True).endswith("adapters merged")

    lora = planned(recipe(2, actor={"lora": {"r": 4}}))
    assert lora.phases["update_actor"]["actor: moments"] < two["actor: moments"] / 2
    assert lora.phases["ref"]["actor: forward"] and "reference: weights" not in lora.phases["ref"]
    shared = planned(recipe(2, actor={"lora": {"r": 4}}, critic={"share_base": True})).phases["update_critic"]
    assert shared["critic: weights"] == shared["critic: moments"] / 2  # adapters and head alone
    released = planned(recipe(rollout={"release": True}))
    assert "rollout: KV cache" in released.phases["gen"] and "rollout: KV cache" not in released.phases["update_actor"]
    assert any(line.split()[:1] == ["sum"] for line in plan.table())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(stage: int, recipe: Any) -> None:
    """What is on the host is in no phase but its own."""
    plain = planned(recipe(stage))
    plan = planned(recipe(stage, actor={"offload": True}, reference={"offload": True}))
    for phase, items in plan.phases.items():
        assert not {"actor: master weights", "actor: moments"} & set(items)
        assert ("reference: weights" in items) == (phase in ("ref", "values", "old_log_prob"))
        assert items.get("reference: weights", 0) <= plain.phases[phase]["reference: weights"]
        assert items["critic: moments"] == plain.phases[phase]["critic: moments"]
    update, sent = plain.phases["update_actor"], plan.on_host
    assert sent == {
        "actor": update["actor: master weights"] + update["actor: moments"],
        "reference": update["reference: weights"],
    }
    assert plan.phases["ref"]["reference: weights"] == sent["reference"]
    assert any("pinned host memory" in line for line in plan.table()) and not plain.on_host
    held = [memory.held_by(recipe(stage), "actor", recipe(stage, actor={"offload": o}).actor, 2, 100) for o in (False, True)]
    assert held[1].step - held[0].step == sent["actor"]  # of a small model all parts are there at once


def test_frozen_models_are_there_to_score(recipe: Any) -> None:
    """Reward models and reference come together; each goes when it has scored."""
    model = {"path": recipe().actor.path, "dtype": "bfloat16"}
    plain, plan = (
        planned(recipe(reference={"offload": o}, reward={"components": [{"model": {**model, "offload": o}, "name": "judge"}]})) for o in (False, True)
    )
    for phase, items in plan.phases.items():
        assert ("judge: weights" in items) == (phase == "reward")
        assert ("reference: weights" in items) == (phase in ("reward", "ref", "values", "old_log_prob"))
        assert "judge: weights" in plain.phases[phase] and plan.total(phase) <= plain.total(phase)
    scoring = ["gen", "reward", "ref", "values", "old_log_prob"]
    assert list(plan.phases) == [*scoring, "update_actor", "update_critic", "hand_over", "save_checkpoint"]
    assert "judge: forward" in plan.phases["reward"] and plan.total("reward") == plain.total("reward")


def test_phases_around_the_update(recipe: Any) -> None:
    validation = {"data": [{"path": "none.jsonl"}], "verifier": "exact_match"}
    model = {"path": recipe().actor.path, "dtype": "bfloat16"}
    plan = planned(recipe(validation=validation))
    assert plan.phases["testing"] == plan.phases["gen"] and plan.total("hand_over") < plan.total("gen")
    assert plan.phases["save_checkpoint"] == plan.phases["hand_over"]  # all is there already
    judged = planned(recipe(validation=validation, reward={"components": [{"model": model}]}, rollout={"prefill_tokens": 1, "max_batch": 1}))
    assert judged.total("testing") == judged.total("reward") > judged.total("gen")  # a reward model's forward takes more than a token's
    released = planned(recipe(validation=validation, rollout={"release": True}))
    assert {"rollout: weights"} == {item for item in released.phases["hand_over"] if item.startswith("rollout")}
    assert not any(item.startswith("rollout") for item in released.phases["save_checkpoint"])
    assert released.phases["save_checkpoint"].keys() - released.phases["hand_over"].keys() == {"actor: gathered"}
    unsaved = planned(recipe(checkpoint={"save_hf": False}, rollout={"release": True}))
    assert "actor: gathered" not in unsaved.phases["save_checkpoint"]


@pytest.mark.parametrize(
    ("stage", "sections", "ranks", "lends"),
    [
        (3, {}, 2, True),
        (3, {}, 1, False),
        (3, {"rollout": {"release": True}}, 2, False),
        (3, {"actor": {"lora": {"r": 4}}}, 2, False),
        (3, {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}}, 2, False),
        (3, {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}}}, 2, False),
        (3, {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}}, 2, False),
        (2, {}, 2, False),
    ],
)
def test_what_the_rollout_lends_is_not_gathered(recipe: Any, stage: int, sections: dict[str, Any], ranks: int, lends: bool) -> None:
    config = recipe(stage, **sections)
    assert lends_weights(config, ranks, on_gpu=True) == lends
    assert ("the actor computes on it too" in decoding(config, ranks, True)) == lends
    plan = planned(config, ranks)
    for phase in ("old_log_prob", "update_actor", "save_checkpoint"):
        assert ("actor: gathered" in plan.phases[phase]) == (stage == 3 and ranks > 1 and not lends)
    assert ("critic: gathered" in plan.phases["update_critic"]) == (stage == 3 and ranks > 1)

    single = {
        "name": "ppo",
        "kl": {"coef": 0.1, "place": "loss", "estimator": "k2"},
        "minibatches": 1,
    }
    for warmup in (0, 2):
        several = {**single, "critic_warmup_steps": warmup, "minibatches": 2}
        assert "old_log_prob" not in planned(recipe(algorithm={**single, "critic_warmup_steps": warmup}, train={"steps": 5})).phases
        assert "old_log_prob" in planned(recipe(algorithm=several, train={"steps": 5})).phases


def test_weights_that_ranks_do_not_divide_are_brought_together_apart(recipe: Any) -> None:
    """No more at a time than the plan says."""
    items = [planned(recipe(), ranks).phases["hand_over"].get("actor: gathered", 0.0) for ranks in (2, 3)]
    uneven = 2 * (2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 50 * 32 + 32)  # bytes of all: no size has a multiple of 3
    assert items == [0.0, float(uneven)]
    assert [list(part) for part in _neighbours([3, 1, 2, 9, 1], 4)] == [[0, 1], [2, 3], [4]] and not list(_neighbours([], 4))


def test_what_others_hold_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.of_others(1) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (17 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * GIB)
    assert memory.of_others(1) == 5 * GIB - memory.CONTEXT and memory.of_others(2) == 5 * GIB - memory.CONTEXT - memory.NCCL
    meter = MemoryMeter(True, 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: GIB)
    meter.end("gen")
    assert meter.peaks == {"gen": GIB + 7 * GIB - 2 * GIB - 3 * GIB} and meter.taken == {"gen": 7 * GIB}


def test_what_was_held_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.held_now() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB // 2, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 22 * GIB)
    assert memory.held_now() == "it held 23.5 of 24.0 GiB, 20.0 of them in tensors (22.0 at most)"


def test_budget_of_tokens_and_rows(recipe: Any) -> None:
    tokens, rows = recipe(train={"micro_batch_tokens": 4096}), recipe(train={"micro_batch": 4})
    assert (largest_forward(tokens, 768), largest_forward(rows, 768)) == (4096, 3072)
    activations = [planned(c).phases["update_actor"]["actor: activations"] for c in (tokens, rows)]
    unseen = 3072 - 4 * 256  # of four rows the head sees 256 response tokens each; 32 numbers of each and 16 bytes are kept of what it sees
    assert activations[0] * 3072 / 4096 == pytest.approx(activations[1] + (2 * 32 + 16) * unseen)
    padded = recipe(train={"micro_batch": 4, "packing": False})
    assert [memory.most_scored(c, 3072) for c in (tokens, rows, padded)] == [3072, 1024, 3072]
    assert sum(worst_rows(tokens, 768)) == 4096 and worst_rows(rows, 768) == [768] * 4
    assert largest_forward(tokens, 5000) == 5000  # a longer row has a forward of its own


def test_nothing_is_measured_on_cpu() -> None:
    meter = MemoryMeter(on_gpu=False)
    meter.begin()
    meter.end("gen")
    assert meter.compare(Plan({"gen": {"CUDA": 1.0}})) == ({}, [])


def test_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter(on_gpu=True)
    meter.peaks = {"gen": 1.05 * GIB, "ref": 2.0 * GIB, "reward": 1.0}
    metrics, remarks = meter.compare(Plan({"gen": {"all": GIB}, "ref": {"all": GIB}}))
    assert metrics["memory/ref_gb"] == 2 * GIB / 1e9 and metrics["memory/gen_planned_gb"] == GIB / 1e9 and len(metrics) == 4
    assert remarks == ["memory, GiB measured of planned: ref 2.0 of 1.0"]
    assert meter.compare(Plan()) == ({}, [])  # once


# --------------------------------------------------------------------------------------------------------------------------
# The budget


def test_smaller(recipe: Any) -> None:
    tokens, rows = recipe(train={"micro_batch_tokens": 4096}), recipe(train={"micro_batch": 5})
    assert smaller(tokens, "update_actor", 100) == ("train.micro_batch_tokens", 3072)
    assert smaller(rows, "values", 100) == ("train.micro_batch", 2)
    assert smaller(rows, "gen", 100) == ("rollout.max_batch", 64)
    least = {"micro_batch": 1}
    release = ("rollout.release", True)  # what is left when a forward is as small as can be, and where there is none
    assert release == smaller(recipe(train=least), "ref", 9) == smaller(tokens, "update_critic", 4097) == smaller(rows, "hand_over", 9)
    released = {"rollout": {"release": True}}
    for config, phase, longest in ((recipe(train=least, **released), "ref", 9), (rows, "set-up", 9), (recipe(**released), "save_checkpoint", 9)):
        with pytest.raises(ValueError, match="out of memory"):
            smaller(config, phase, longest)
    with pytest.raises(ValueError, match="cannot be smaller"):
        smaller(recipe(train={"micro_batch_tokens": 256}, **released), "ref", 9)
    assert smaller(tokens, "update_actor", 100, bounded=True) == release  # else the cache would take what fewer tokens leave
    assert smaller(recipe(**released), "update_actor", 100, bounded=True)[0] == "train.micro_batch"
    write_budget(rows.run_dir, 0, *release)
    assert read_budget(rows).rollout.release is True


def test_a_deepspeed_json_may_repeat_the_rows_that_memory_had_no_room_for(recipe: Any) -> None:
    config = recipe(train={"micro_batch": 8}, deepspeed={"train_micro_batch_size_per_gpu": 8})
    for rows in (4, 2):
        config = with_value(config, "train.micro_batch", rows)
    assert config.train.micro_batch == 2
    assert role_settings(config, config.actor, world_size=1, on_gpu=False)["train_micro_batch_size_per_gpu"] == 8


def test_budget_is_kept(recipe: Any) -> None:
    config = recipe(train={"micro_batch_tokens": 4096})
    assert read_budget(config) is config
    write_budget(config.run_dir, 0, "train.micro_batch_tokens", 1024)
    write_budget(config.run_dir, 1, "rollout.max_batch", 7)
    found = read_budget(config)
    assert (found.train.micro_batch_tokens, found.rollout.max_batch) == (1024, 7)
    assert read_budget(recipe(train={"micro_batch_tokens": 512})).train.micro_batch_tokens == 512  # never more than the recipe says
    assert read_budget(recipe(train={"micro_batch": 3})).train.micro_batch_tokens is None


# --------------------------------------------------------------------------------------------------------------------------
# The probe


@pytest.mark.parametrize("checkpointing", [False, "mlp"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_stand_in_keeps_what_the_model_keeps(name: str, lora: Any, checkpointing: Recomputed, recipe: Any) -> None:
    """And nothing random is drawn for it."""
    trained = {"lora": lora, "gradient_checkpointing": checkpointing}
    role = dict(roles(recipe(2, actor=trained, critic=trained)))[name]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = stand_in(role, name, True, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    world = single_world()
    placement = WholePlacement(world)
    if name == "critic":
        plain: Any = load_scalar_model(role, name, placement, world, torch.bfloat16, "zero", packing=True)
    else:
        plain = load_causal_lm(role, name, placement, world, torch.bfloat16, packing=True)
    whole = add_adapters(plain, role.lora, 0) if role.lora else plain
    whole.train()
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in whole.parameters())
    fuse_head(plain)
    recompute(plain, checkpointing, name)
    # Its parameters are fewer, so what only they keep is found by the same means in both.
    found = [kept_bytes(module, True, name == "critic", False) for module in (made, whole)]
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------------------------------
# What the recipe leaves to the plan

_QWEN_7B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the size of Qwen2.5-7B, without a weight in it."""
    folder = tmp_path_factory.mktemp("7B")
    _QWEN_7B.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


_built: dict[str, Any] = {}


@pytest.fixture
def auto(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = memory.blank_model

    def once(role: Any, architecture: Any, *rest: Any) -> Any:
        """Of hundreds of plans for few models."""
        key = f"{architecture.to_json_string()} {getattr(role, 'lora', None)} {role.compile} {rest}"
        if key not in _built:
            _built[key] = made(role, architecture, *rest)
        return _built[key]

    monkeypatch.setattr(memory, "blank_model", once)

    def make(task: str = "rl", tokens: Any = "auto", checkpointing: Any = "auto", **sections: Any) -> Config:
        role = {"path": large, "dtype": "bfloat16", "gradient_checkpointing": checkpointing}
        tree: dict[str, Any] = {
            "task": task,
            "run_dir": tmp_path,
            "actor": role,
            "reward_model": role if task == "reward_model" else {},
            "critic": {"dtype": "bfloat16", "gradient_checkpointing": checkpointing},
            "reference": {"dtype": "bfloat16"},
            "reward": {"components": {"function": "exact_match"}},
            "data": {"train": {"path": "none.jsonl"}, "max_prompt_tokens": 512, "max_tokens": 2048},
            "rollout": {"prompts": 128, "group_size": 8, "max_new_tokens": 1024},
            "algorithm": {"name": "grpo", "kl": {"coef": 0.001}},
            "train": {"steps": 1, "micro_batch_tokens": tokens},
        }
        merged = {name: {**tree.get(name, {}), **section} if isinstance(section, dict) else section for name, section in sections.items()}
        return parse_config(tree | merged)

    return make


def chosen(config: Config, gib: float | None, ranks: int = 8) -> tuple[Config, str]:
    values, line = choose(config, roles(config), ranks, None if gib is None else int(gib * GIB))
    assert set(values) == set(open_choices(config))
    resolved = with_values(config, values)
    assert not open_choices(resolved)
    return resolved, line


def needed(config: Config, gib: float, ranks: int, give_way: bool = False) -> float:
    """GiB of the largest phase that depends on the choice, by the plan of the resolved recipe on such a device."""
    held = {name: memory.held_by(config, name, role, ranks, memory.longest_row(config)) for name, role in roles(config)}
    plan = memory.plan_of(config, held, ranks, memory.longest_row(config), True, int(gib * GIB), give_way)
    return max(plan.total(phase) for phase in plan.phases if phase not in memory.AROUND) / GIB


@pytest.mark.parametrize(
    ("task", "sections"),
    [
        ("rl", {}),
        ("rl", {"rollout": {"release": True}, "actor": {"lora": {"r": 64}}}),
        ("rl", {"algorithm": {"name": "ppo"}}),
        ("rl", {"rollout": {"cache_tokens": 100_000}}),
        ("sft", {}),
        ("reward_model", {}),
    ],
)
def test_what_is_chosen_fits_and_more_memory_costs_no_speed(task: str, sections: dict[str, Any], auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, name = auto(task, **sections), "reward_model" if task == "reward_model" else "actor"
    before, seen = (0, -9, 0), set()
    for gib in (16, 24, 40, 48, 56, 64, 72, 80, 96, 112, 141, 192, 288):
        found, line = chosen(config, gib)
        role, tokens = getattr(found, name), found.train.forward_tokens
        assert tokens is not None and tokens % 256 == 0 and longest_row(config) <= tokens <= budget.MOST
        assert f"train.micro_batch_tokens={tokens}" in line and f"{name}.gradient_checkpointing={str(role.recomputed).lower()}" in line
        level = -sum(budget.LEVELS.index(trained.recomputed) for _, trained in roles(found) if isinstance(trained, TrainedModelConfig))
        gives_way = "a KV cache that has the rest" in line
        fits = needed(found, gib, 8, gives_way) <= gib * (1 - budget.MARGIN) + 1e-6
        assert fits == ("it may run out of memory" not in line)
        now = (int(fits), level, tokens)  # with as much recomputation the budget never falls, and recomputation never grows
        assert now >= before, (gib, now, before)
        if fits and not gives_way and tokens < budget.MOST and "no rows to take" not in line:  # nothing larger fits
            assert needed(with_value(found, "train.micro_batch_tokens", tokens + 256), gib, 8) > gib * (1 - budget.MARGIN)
        assert ("tokens fit with" in line) == (level < 0 and fits)
        before = now
        seen.add(role.recomputed)
    assert before[:2] == (1, 0) and len(seen) > 1


def test_checkpointing_for_a_budget_of_the_recipe(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for gib in (24, 60, 80, 100, 141, 288):
        found, _ = chosen(auto(tokens=16_384), gib)
        assert found.train.forward_tokens == 16_384
        levels.append(budget.LEVELS.index(found.actor.recomputed))
        assert needed(found, gib, 8) <= gib * (1 - budget.MARGIN) or levels[-1] == 2
    assert levels == sorted(levels, reverse=True) and set(levels) == {0, 1, 2}
    assert open_choices(auto(tokens=16_384, checkpointing="mlp")) == []


def test_a_budget_for_checkpointing_of_the_recipe(auto: Any) -> None:
    budgets = [chosen(auto(checkpointing=what), 80)[0].train.forward_tokens or 0 for what in (False, "mlp", True)]
    assert budgets[0] < budgets[1] < budgets[2]
    assert chosen(auto(checkpointing="mlp"), 80)[0].actor.recomputed == "mlp"


def test_budget_is_no_more_than_there_is_to_compute(auto: Any) -> None:
    few = auto(rollout={"prompts": 8, "group_size": 2, "max_new_tokens": 1024})
    found, line = chosen(few, 288)
    assert found.train.forward_tokens == 2 * 1536 and found.actor.recomputed is False and "no rows to take" in line  # two rows on each of 8 ranks
    long = auto(rollout={"prompts": 128, "group_size": 8, "max_new_tokens": 56_000})
    assert chosen(long, 288)[0].train.forward_tokens == 56_576  # the longest row is larger than what is worth while


def test_the_cache_gives_way_where_nothing_else_is_left(auto: Any) -> None:
    """The rollout's cache follows from the plan: of all that is free it has what the other phases leave."""
    config = auto("rl", rollout={"max_batch": 512, "prompts": 512})
    found, line = chosen(config, 48)
    assert "beside a KV cache that has the rest" in line and found.actor.recomputed is True and found.train.forward_tokens >= 4096
    held = {name: memory.held_by(found, name, role, 8, 1536) for name, role in roles(found)}
    free, bounded = (memory.plan_of(found, held, 8, 1536, True, int(48 * GIB), give_way) for give_way in (False, True))
    assert bounded.cache == bounded.phases["gen"]["rollout: KV cache"] < free.phases["gen"]["rollout: KV cache"] and free.cache is None
    assert max(bounded.total(phase) for phase in bounded.phases if phase != "gen") <= 48 * GIB * (1 - budget.MARGIN) + 1
    fixed = found.model_copy(update={"deterministic": True})
    assert memory.plan_of(fixed, held, 8, 1536, True, int(48 * GIB)).cache is None  # no size may depend on the device
    more = with_value(found, "train.micro_batch_tokens", found.train.forward_tokens + 1536)
    held_more = {name: memory.held_by(more, name, role, 8, 1536) for name, role in roles(more)}
    whole = memory.plan_of(more, held_more, 8, 1536, True, int(48 * GIB), False)
    over = max(whole.total(phase) for phase in whole.phases if phase != "gen") - 48 * GIB
    least = memory.plan_of(more, held_more, 8, 1536, True, int(48 * GIB)).cache
    cache = whole.phases["gen"]["rollout: KV cache"]
    assert least is not None and least >= min(cache / 4, cache - over) - 1  # not next to nothing for the margin's sake
    released = found.model_copy(update={"rollout": found.rollout.model_copy(update={"release": True})})
    assert memory.plan_of(released, held, 8, 1536, True, int(48 * GIB)).cache is None  # the update has all of it


def test_a_device_that_is_too_small(auto: Any) -> None:
    found, line = chosen(auto(), 12)
    assert (found.train.forward_tokens, found.actor.recomputed) == (1536, True)
    assert "update_actor takes" in line and "it may run out of memory" in line


OFFLOAD = {"offload": "auto"}
ALL: dict[str, Any] = {"actor": OFFLOAD, "critic": OFFLOAD, "reference": OFFLOAD}
SIZES = (24, 32, 40, 44, 48, 52, 56, 60, 64, 68, 72, 80, 88, 96, 112, 141, 192, 288)


def on_host(config: Config) -> set[str]:
    return {name for name, role in roles(config) if role.offloaded}


def levels_of(config: Config) -> list[int]:
    return [budget.LEVELS.index(role.recomputed) for _, role in roles(config) if isinstance(role, TrainedModelConfig)]


@pytest.fixture
def judged(auto: Any, large: Path) -> Any:
    """Under PPO with a reward model: all that may leave, may."""
    judge = {"model": {"path": large, "dtype": "bfloat16", **OFFLOAD}, "name": "judge"}
    return lambda **more: auto(**{"algorithm": {"name": "ppo"}, "reward": {"components": [{"function": "exact_match"}, judge]}, **ALL, **more})


def recipes(auto: Any, judged: Any) -> dict[str, tuple[Config, int]]:
    """(recipe, ranks) by name."""
    return {
        "ppo": (judged(), 8),
        "grpo": (auto(**ALL), 8),
        "zero2": (auto(**ALL, rollout={"release": True}).model_copy(update={"deepspeed": "ds_configs/zero2.json"}), 2),
        "sft": (auto("sft", **ALL), 8),
        "reward_model": (auto("reward_model", reward_model=OFFLOAD), 8),
        "own tokens": (auto(tokens=16_384, **ALL), 8),
        "own checkpointing": (auto(checkpointing="mlp", **ALL), 8),
    }


@pytest.mark.parametrize("name", ["ppo", "grpo", "zero2", "sft", "reward_model", "own tokens", "own checkpointing"])
def test_frozen_models_leave_first_then_states_then_layers_are_computed_again(
    name: str, auto: Any, judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more memory never means more of any of them."""
    config, ranks = recipes(auto, judged)[name]
    everybody = {name for name, _ in roles(config)}
    trained = {name for name, role in roles(config) if isinstance(role, TrainedModelConfig)}
    open_levels = "mlp" not in str(config.actor.gradient_checkpointing)
    before, seen = (everybody, [9] * len(trained)), []
    for gib in SIZES:
        found, line = chosen(config, gib, ranks)
        away, levels = on_host(found), levels_of(found)
        assert away <= before[0] and sum(levels) <= sum(before[1]), gib
        assert not away & trained or everybody - trained <= away  # the frozen first
        assert not (open_levels and sum(levels)) or away == everybody  # recomputation last
        fits = needed(found, gib, ranks, "a KV cache that has the rest" in line) <= gib * (1 - budget.MARGIN) + 1e-6
        assert fits == ("it may run out of memory" not in line)
        for role in everybody:
            section = "reward.components.1.model" if role == "judge" else role
            assert f"{section}.offload={str(role in away).lower()}" in line
        before = (away, levels)
        seen.append(away)
    assert not seen[-1] and seen[0] == everybody
    if name in ("ppo", "zero2"):  # elsewhere the frozen models are too small for a step of their own between these sizes
        assert any(away and away != everybody for away in seen)


def test_a_little_more_memory_than_is_enough_brings_the_states_back(auto: Any) -> None:
    """Between two sizes that need recomputation and nothing at all lies one where offload alone does."""
    kinds = [(sum(levels_of(found)), sorted(on_host(found))) for found in (chosen(auto(**ALL), gib)[0] for gib in (52, 64, 72))]
    assert kinds == [(1, ["actor", "reference"]), (0, ["actor", "reference"]), (0, [])]
    fixed = auto(actor={"offload": False}, reference=OFFLOAD)
    assert {name for gib in SIZES for name in on_host(chosen(fixed, gib)[0])} == {"reference"}  # what the recipe says wins
    kept = auto(actor={"offload": True}, reference=OFFLOAD)
    assert on_host(chosen(kept, 288)[0]) == {"actor"}


@pytest.mark.parametrize(
    ("deepspeed", "sections"),
    [
        ({"zero_optimization": {"stage": 0}}, {"actor": {"dtype": "float32"}}),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {}),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "SGD"}}, {}),
    ],
)
def test_auto_is_false_where_offload_is_refused(deepspeed: dict[str, Any], sections: dict[str, Any], auto: Any) -> None:
    config = auto("sft", actor={**OFFLOAD, **sections.get("actor", {})}).model_copy(update={"deepspeed": deepspeed})
    role_settings(config, config.actor, world_size=8, on_gpu=True)  # does not raise before it is resolved
    for gib in (12, 288):
        found, line = chosen(config, gib)
        assert not on_host(found) and "actor.offload=false" in line and "no plan" not in line


def test_auto_is_false_on_a_shared_base(auto: Any, large: Path) -> None:
    judge = {"model": {"path": large, "dtype": "bfloat16", "share_base": True, **OFFLOAD}, "name": "judge"}
    lora = {**OFFLOAD, "lora": {"r": 64}}
    config = auto(actor=lora, reference={"path": large, **OFFLOAD}, reward={"components": [judge]}).model_copy(
        update={"deepspeed": "ds_configs/zero2.json"}
    )
    found, line = chosen(config, 24, ranks=2)
    assert on_host(found) == {"actor", "reference"} and "reward.components.0.model.offload=false" in line


def test_the_host_has_to_have_room(auto: Any, judged: Any) -> None:
    """Frozen models 2 x 1.8 GiB, states 2 x 10.6 GiB."""
    frozen = {"reference", "judge"}
    for host, expected in ((1, set()), (8, frozen), (27, {*frozen, "actor"}), (64, {*frozen, "actor", "critic"})):
        values, line = choose(config := judged(), roles(config), 8, 60 * GIB, host=host * GIB)
        assert on_host(with_values(config, values)) == expected
        assert (f"no more can be offloaded to the {host}.0 GiB" in line) == (host != 64)
    assert "offloaded to" not in choose(config, roles(config), 8, 288 * GIB, host=GIB)[1]  # nor need it
    config = auto("sft", actor={"offload": True})  # as the recipe says, whatever there is
    assert on_host(with_values(config, choose(config, roles(config), 8, 60 * GIB, host=GIB)[0])) == {"actor"}


def test_the_cache_leaves_room_for_what_comes_back(auto: Any) -> None:
    """What is sized while frozen weights are away must not grow into their place: the largest phase would need as much as before, or more."""
    caches = []
    for offload in (False, True):
        config = auto(tokens=4096, checkpointing=False, reference={"dtype": "bfloat16", "offload": offload}, rollout={"max_new_tokens": 8192})
        plan = planned(config, 8, 60 * GIB)
        caches.append(plan.phases["gen"]["rollout: KV cache"])
    assert 0 < caches[1] <= caches[0]


def test_room_on_the_host(tmp_path: Path) -> None:
    def write(**files: str) -> int | None:
        for name, text in files.items():
            file = tmp_path / name.replace("__", ".").replace("_", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return memory.host_capacity(2, tmp_path)

    assert memory.host_capacity(2, tmp_path) is None
    assert write(proc_meminfo="MemTotal: 8000 kB\nMemAvailable:    3000 kB\n") == 4000 * 1024
    assert write(proc_meminfo="MemTotal: 8000 kB\nMemAvailable:    1000 kB\n") == 4000 * 1024  # a later start chooses the same
    assert write(proc_self_cgroup="4:memory:/old\n0::/job/step\n") == 4000 * 1024
    assert write(sys_fs_cgroup_job_step_memory__max="max\n") == 4000 * 1024
    assert write(sys_fs_cgroup_job_memory__max="5000\n") == 2500


def test_states_that_are_small_stay(auto: Any) -> None:
    config = auto("sft", actor={**OFFLOAD, "lora": {"r": 8}})  # 12 bytes of 20 M adapters, an eighth on each rank
    assert on_host(chosen(config, 12)[0]) == set() and levels_of(chosen(config, 12)[0]) == [2]


def test_few_combinations_are_planned(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 x 3 levels and 2 ** 4 sets on the host; each with some budgets, by halving."""
    seen, plan = [], budget.plan_of

    def counted(config: Config, held: Any, *rest: Any) -> Plan:
        seen.append((tuple(levels_of(config)), frozenset(on_host(config))))
        return plan(config, held, *rest)

    monkeypatch.setattr(budget, "plan_of", counted)
    chosen(judged(), 12)
    assert len(set(seen)) == 9 + 3 and len(seen) <= 13 * 8 + 1  # the last once more, with a cache that gives way


def test_without_a_gpu(auto: Any) -> None:
    found, line = chosen(auto(), None)
    assert (found.train.forward_tokens, found.actor.recomputed) == (16_384, False)
    assert line == "auto: train.micro_batch_tokens=16384 actor.gradient_checkpointing=false: no GPU to measure by"
    found, line = chosen(auto(**ALL), None)
    assert not on_host(found) and line.endswith("actor.offload=false reference.offload=false: no GPU to measure by")
    for read in (lambda: auto().train.forward_tokens, lambda: auto().actor.recomputed, lambda: auto(**ALL).reference.offloaded):
        with pytest.raises(RuntimeError, match="auto is read before it was resolved"):
            read()


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_probe_holds_what_an_update_will(lora: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside activations: what is there, the stand-in's weights and gradients, and a reserve are together what the plan says."""
    config = recipe(2, actor={"lora": lora})
    plan, made, reserved = plan_memory(config, roles(config), 1), [], []
    there, others, total, whole, empty = 1 << 20, 1 << 22, 1 << 40, probe.stand_in, torch.empty
    planned = sum(v for item, v in plan.phases["update_actor"].items() if item not in ("actor: activations", "actor: backward", "actor: step"))

    def stand_in(*arguments: Any) -> Any:
        made.append(whole(*arguments))
        return made[-1]

    def reserve(size: Any, *arguments: Any, **options: Any) -> Tensor:
        if options.get("dtype") is torch.uint8:
            reserved.append(size)
            size = 0
        return empty(size, *arguments, **options)

    def taken() -> int:
        return there + sum(p.numel() * p.element_size() for p in made[0].parameters())

    monkeypatch.setattr(probe, "stand_in", stand_in)
    monkeypatch.setattr(torch, "empty", reserve)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total - taken() - others, total))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, taken)
    world, meter = SimpleNamespace(device=torch.device("cpu")), MemoryMeter(True, others)
    run: Any = SimpleNamespace(config=config, world=world, longest=12, plan=plan, on_gpu=True, meter=meter)
    probe._try(run, "actor", lambda module, lengths, config: next(p for p in module.parameters() if p.requires_grad).sum())
    gradients = sum(p.numel() * p.element_size() for p in made[0].parameters() if p.requires_grad)
    assert reserved[0] > 0 and taken() + gradients + reserved[0] == pytest.approx(planned, abs=1)


def test_a_rollout_decodes_all_that_a_rank_has(auto: Any) -> None:
    """1,024 rows of 1,536 tokens, 28 layers, 4 key-value heads of 128."""
    token = 28 * 2 * 4 * 128 * 2
    for ranks, rows in ((1, 1024), (8, 128), (3, 342)):
        found, line = chosen(config := auto(rollout={"max_batch": "auto"}), 1000, ranks)
        assert found.rollout.decoded == rows and f"rollout.max_batch={rows} " in line
        cache = plan_memory(found, roles(found), ranks).phases["gen"]["rollout: KV cache"]
        assert cache == pytest.approx((rows + 1) * 1536 * token, rel=0.001)
    assert chosen(auto(rollout={"max_batch": "auto", "group_size": 64}), 1000, 1)[0].rollout.decoded == 1024
    assert chosen(auto(rollout={"max_batch": "auto"}, deterministic=True), 1000, 1)[0].rollout.decoded == 128
    assert chosen(config, None)[0].rollout.decoded == 128
    with pytest.raises(RuntimeError, match="auto is read before it was resolved"):
        _ = config.rollout.decoded
    assert smaller(chosen(config, 1000, 1)[0], "gen", 1536) == ("rollout.max_batch", 512)


def test_layers_without_a_known_mlp_are_computed_again_as_a_whole(auto: Any, tmp_path: Path) -> None:
    OPTConfig(hidden_size=4096, ffn_dim=16_384, num_hidden_layers=32, num_attention_heads=32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = auto(actor={"path": tmp_path, "gradient_checkpointing": "auto", "dtype": "bfloat16"})
    assert {chosen(config, gib)[0].actor.recomputed for gib in (24, 48, 64, 80, 100, 120, 141, 192, 288)} == {False, True}


def test_what_was_chosen_is_kept_for_a_run_that_goes_on(auto: Any) -> None:
    config = auto()
    write_budget(config.run_dir, 0, "chosen", {"train.micro_batch_tokens": 20_480, "actor.gradient_checkpointing": "mlp"})
    assert read_budget(config) is config  # a fresh start chooses afresh
    found = read_budget(config, config.run_dir)
    assert (found.train.forward_tokens, found.actor.recomputed) == (20_480, "mlp")
    own = auto(tokens=24_576, checkpointing=True)  # what the recipe says wins
    assert read_budget(own, config.run_dir) is own
    key, value = smaller(found, "update_actor", 1536)
    assert (key, value) == ("train.micro_batch_tokens", 16_384)
    write_budget(config.run_dir, 0, key, value)
    for start in (read_budget(config, config.run_dir), read_budget(with_value(config, key, 32_768)), read_budget(own)):
        assert start.train.forward_tokens == 16_384  # memory has run out with more
    elsewhere = config.model_copy(update={"run_dir": config.run_dir / "other"})
    assert read_budget(elsewhere, config.run_dir).train.forward_tokens == 16_384
    write_budget(config.run_dir, 0, "chosen", {"rollout.max_batch": 1024})
    write_budget(config.run_dir, 0, "rollout.max_batch", 256)
    left_open = auto(rollout={"max_batch": "auto"}).model_copy(update={"run_dir": config.run_dir / "other"})
    assert read_budget(left_open, config.run_dir).rollout.decoded == 256


def test_offload_is_kept_for_a_run_that_goes_on(judged: Any, auto: Any) -> None:
    config = judged()
    values, _ = choose(config, roles(config), 8, 40 * GIB)
    write_budget(config.run_dir, 0, "chosen", values)
    found = read_budget(config, config.run_dir)
    assert not open_choices(found) and on_host(found) == {"actor", "critic", "reference", "judge"}
    assert found.reward.components[0] == config.reward.components[0] and found.reward.components[1].model.offloaded is True
    assert on_host(read_budget(judged(reference={"offload": False}), config.run_dir)) == {"actor", "critic", "judge"}
    fewer = read_budget(auto(**ALL), config.run_dir)  # a recipe that has no such component any more
    assert not open_choices(fewer) and on_host(fewer) == {"actor", "reference"}


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_is_left_open_later_is_chosen_beside_what_was_chosen_before(goes_on: bool, auto: Any) -> None:
    before: dict[str, Any] = {"train.micro_batch_tokens": 20_480, "actor.gradient_checkpointing": True}
    config = auto("sft", actor=OFFLOAD)
    write_budget(config.run_dir, 0, "chosen", before)
    told: list[str] = []
    run: Any = SimpleNamespace(
        config=read_budget(config, config.run_dir if goes_on else None),
        world=SimpleNamespace(size=1, is_main=True, local_size=1, gather_objects=lambda value: [value], broadcast_object=lambda value: value),
        console=SimpleNamespace(message=told.append),
        resume_from=config.run_dir / "checkpoints" / "checkpoint-1" if goes_on else None,
        on_gpu=False,
    )
    Run.expect(run, 1536)
    kept = json.loads((config.run_dir / "budget.json").read_text())["chosen"]
    fresh = {"train.micro_batch_tokens": 16_384, "actor.gradient_checkpointing": False}
    assert kept == {**(before if goes_on else fresh), "actor.offload": False}
    assert told[0].startswith("auto: actor.offload=false:" if goes_on else "auto: train.micro_batch_tokens=16384")
    assert run.config.actor.offloaded is False and run.config.train.forward_tokens == kept["train.micro_batch_tokens"]
