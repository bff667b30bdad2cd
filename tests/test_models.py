"""Loading, heads, adapters and export: what arrives is what the file holds, what is saved is what was trained (traps 2, 14, 15, 33)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config import LoraConfig, ModelConfig
from rlhf.engine import WholePlacement, full_tensors
from rlhf.models.export import export_adapter, export_model, on_host
from rlhf.models.heads import ScalarModel
from rlhf.models.loading import (
    load_causal_lm,
    load_scalar_model,
    read_architecture,
    score_statistics,
    tensor_names,
    weighted_bits,
    without_dropout,
)
from rlhf.models.lora import WeightSource, adapter_parameters, adapters_off, add_adapters, weight_layout
from tests.helpers import ARCHITECTURES, VOCABULARY, single_world, tiny_tokenizer
from tests.test_memory import FAMILIES_AND_OTHERS

WORLD = single_world()
IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(7).expand(3, 7)


def causal(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_causal_lm(ModelConfig(path=folder), "actor", WholePlacement(WORLD), WORLD, dtype)


def scalar(folder: Path, head: str) -> Any:
    return load_scalar_model(ModelConfig(path=folder), "critic", WholePlacement(WORLD), WORLD, torch.float32, head)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    return found


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_models_compute_as_transformers_does(models: Path, name: str, dtype: torch.dtype) -> None:
    """Bit for bit; in bfloat16 too, where RoPE frequencies must stay float32."""
    assert torch.equal(logits(causal(models / name, dtype).eval()), logits(plain(models / name, dtype)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trap_2_dropout_of_the_folder_is_off_in_training_mode(models: Path, name: str) -> None:
    """trap 2: the gpt2 folder asks for 0.1 in three places."""
    model = causal(models / name)
    assert torch.equal(logits(model.train()), logits(model.eval()))
    critic = scalar(models / name, "zero")
    nn.init.ones_(critic.score.weight)
    with torch.no_grad():
        assert torch.equal(critic.train()(IDS, POSITIONS), critic.eval()(IDS, POSITIONS))
    if name == "gpt2":
        assert not torch.equal(logits(plain(models / name).train()), logits(plain(models / name)))


def test_trap_33_tied_weights_are_one_parameter(models: Path) -> None:
    """trap 33"""
    tied = causal(models / "llama")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = causal(models / "llama_untied")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# ---- heads


def test_trap_15_the_critics_head_starts_at_zero(models: Path) -> None:
    """trap 15: values are 0 at every token, with the actor's body below."""
    critic = scalar(models / "llama", "zero")
    with torch.no_grad():
        assert critic(IDS, POSITIONS).eq(0).all()
    body = plain(models / "llama").model.state_dict()
    assert all(torch.equal(t, critic.model.state_dict()[n]) for n, t in body.items())
    assert torch.equal(scalar(models / "scalar", "zero").score.weight, torch.zeros(1, 32))


def test_a_kept_head_is_the_folders(models: Path) -> None:
    model, reference = scalar(models / "scalar", "keep"), AutoModelForSequenceClassification.from_pretrained(models / "scalar").eval()
    assert torch.equal(model.score.weight, reference.score.weight)
    with pytest.raises(ValueError, match=r"llama: no score.weight in it: a language model without the scalar head"):
        scalar(models / "llama", "keep")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_scalar_models_are_read_by_transformers(models: Path, tmp_path: Path, name: str) -> None:
    """An exported reward model gives the same scores in AutoModelForSequenceClassification, right padding included."""
    model = scalar(models / name, "zero")
    nn.init.normal_(model.score.weight)
    export_model(tmp_path / "out", model, on_host(full_tensors(weight_layout(model))), models / name, tiny_tokenizer(), statistics=(0.5, 2.0))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = IDS.clamp(min=4)
    ids[1, 4:] = 3  # padding
    with torch.no_grad():
        theirs = loaded(ids, attention_mask=(ids != 3).long()).logits.squeeze(1)
        ours = model.eval()(ids, POSITIONS)[torch.arange(3), torch.tensor([6, 3, 6])]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert score_statistics(tmp_path / "out") == (0.5, 2.0)
    assert score_statistics(models / name) == (0.0, 1.0)
    again = scalar(tmp_path / "out", "keep")
    assert torch.equal(again.score.weight, model.score.weight)


# ---- adapters


def with_adapters(folder: Path, noise: float = 0.5) -> Any:
    model = add_adapters(causal(folder), LoraConfig(r=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_trap_14_adapters_off_is_the_base(models: Path, name: str) -> None:
    """trap 14: bitwise, and adapters on is something else, before and after."""
    model, reference = with_adapters(models / name), logits(plain(models / name))
    on = logits(model)
    assert (on - reference).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_compute_what_pefts_own_forward_does(models: Path, name: str) -> None:
    """Logits and gradients; qwen2 has biases. float64, so that only another formula would show."""
    ours, theirs = (with_adapters(models / name).double() for _ in range(2))
    patched = [layer for layer in theirs.modules() if isinstance(layer, LoraLayer) or hasattr(layer, "gate_proj")]
    assert sum(hasattr(layer, "gate_proj") for layer in patched) == 2 and all("forward" in vars(layer) for layer in patched)
    for layer in patched:
        del layer.forward
    found = []
    for model in (ours, theirs):
        out = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append({"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("lora_A" in n for n in found[0])
    for key, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][key], atol=1e-9, rtol=1e-9)


def test_what_the_products_cannot_do_is_pefts(models: Path) -> None:
    """Autocast, a second adapter, no rows."""
    ours, theirs = (with_adapters(models / "llama") for _ in range(2))
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            del layer.forward
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(ours), logits(theirs))
    layer = ours.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer(torch.zeros(1, 0, layer.in_features)).shape == (1, 0, layer.out_features)
    for model in (ours, theirs):
        model.add_adapter("second", model.peft_config["default"])
        model.set_adapter("second")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-6, rtol=1e-6)


def test_projections_are_computed_together_for_one_input_only(models: Path) -> None:
    """Another input than the first projection's, another order, a second call: each as peft computes it."""
    ours, theirs = (with_adapters(models / "llama").get_submodule("base_model.model.model.layers.0.self_attn") for _ in range(2))
    for layer in theirs.modules():
        vars(layer).pop("forward", None)
    a, b = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).split(1)
    makers = []
    for name, x in (("q", a), ("k", b), ("v", a), ("v", a), ("k", a), ("q", b), ("v", b), ("k", b), ("k", b)):
        found, expected = (getattr(attention, f"{name}_proj")(x) for attention in (ours, theirs))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        makers.append(found.grad_fn)
    kinds = ["Together" if type(maker).__name__ == "_LoraTogetherBackward" else type(maker).__name__ for maker in makers]
    assert kinds == ["Together", "_LoraProductBackward", "Together", "_LoraProductBackward", "Together", *["Together"] * 3, "_LoraProductBackward"]
    assert makers[0] is makers[2] is makers[4] and makers[5] is makers[6] is makers[7] is not makers[0]


def test_nothing_of_projections_computed_together_is_left_behind(models: Path) -> None:
    """Also where attention fails between them; and where each may be given an input of its own, each computes for itself."""
    model = with_adapters(models / "llama")
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    group = attention.q_proj.forward.keywords["together"]
    logits(model)
    assert group._input is None and not group._outputs
    attention.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert group._input is None and not group._outputs
    out = attention.q_proj(torch.zeros(1, 2, 32))
    assert type(out.grad_fn).__name__ == "_LoraProductBackward"


def test_adapters_are_of_the_bases_dtype(models: Path) -> None:
    """ZeRO-3 casts nothing that was loaded in parts: float32 adapters in a bfloat16 model stay so, and each keeps a float32 copy of its input."""
    model = add_adapters(causal(models / "llama").bfloat16(), LoraConfig(r=4), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_adapters_start_equal_and_change_nothing(models: Path) -> None:
    first, second = (add_adapters(causal(models / "llama"), LoraConfig(r=4), seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(logits(first.eval()), logits(plain(models / "llama")))
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)


def test_a_scalar_head_trains_whole_beside_adapters(models: Path) -> None:
    model = add_adapters(scalar(models / "llama", "zero"), LoraConfig(r=4), seed=0)
    trained = {n.rsplit("model.", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in n or n == "score.weight" for n in trained)


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_are_merged_into_bfloat16_with_one_rounding(transposed: bool) -> None:
    """As the export merges in float32, but for ties; factors cut to bfloat16 would change every third element."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (192, 256) if transposed else (256, 192)
    weight = torch.nn.Parameter((0.02 * torch.randn(256, 192, generator=generator)).bfloat16())
    a = torch.nn.Parameter(0.05 * torch.randn(64, columns, generator=generator))
    b = torch.nn.Parameter(0.05 * torch.randn(rows, 64, generator=generator))
    source = WeightSource("weight", weight, a, b, 0.5, transposed)
    base = weight.detach().clone()
    source.merge(a.detach(), b.detach(), slice(0, len(base)), base, base)
    assert float((base == source.merged()).float().mean()) > 0.99
    torch.testing.assert_close(base, source.merged(), atol=1e-5, rtol=2**-7)


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_untied", "gpt2"])
def test_merged_weights_compute_as_the_adapted_model(models: Path, tmp_path: Path, name: str) -> None:
    model = with_adapters(models / name, 0.1)
    export_model(tmp_path / "hf", model, on_host(full_tensors(weight_layout(model))), models / name, tiny_tokenizer())
    merged = plain(tmp_path / "hf")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    if name != "llama_untied":
        assert merged.lm_head.weight is merged.get_input_embeddings().weight  # trap 33
    from peft import PeftModel

    export_adapter(tmp_path / "adapter", model, on_host(adapter_parameters(model).items()), models / name)
    adapted = PeftModel.from_pretrained(plain(models / name), tmp_path / "adapter").eval()
    for module in model.modules():  # peft's forward, in its order of sums
        vars(module).pop("forward", None)
    assert torch.equal(logits(adapted), logits(model))


# ---- export


@pytest.mark.parametrize("family", sorted(set(FAMILIES_AND_OTHERS) - {"mixtral", "apertus"}))
def test_every_family_is_read_and_written_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Whose files may have other names than its modules (GPT-NeoX's head, as in Pythia). Refused: experts, and buffers in files (apertus)."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    reference = AutoModelForCausalLM.from_config(without_dropout(copy.deepcopy(FAMILIES_AND_OTHERS[family])), dtype=torch.float32).eval()
    reference.save_pretrained(theirs)
    assert logits(causal(theirs).eval()).sub(logits(reference)).abs().max() < 1e-5
    export_model(ours, causal(theirs), on_host(full_tensors(weight_layout(causal(theirs)))), theirs, tiny_tokenizer())
    assert tensor_names(ours).keys() == tensor_names(theirs).keys()
    assert torch.equal(logits(plain(ours)), logits(reference))


@pytest.mark.parametrize(("name", "left"), [("gpt_neox", "gpt_neox.layers.0.attention."), ("gpt2", "transformer.h.0.attn.")])
def test_masks_that_former_versions_wrote_are_passed_over(name: str, left: str, tmp_path: Path) -> None:
    """They are in Pythia's files; anything else that no parameter takes is refused."""
    AutoModelForCausalLM.from_config(FAMILIES_AND_OTHERS[name], dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"{left}bias": torch.ones(1, 1, 4, 4), f"{left}masked_bias": torch.tensor(-1e9), f"{left}rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(causal(tmp_path).eval()), logits(plain(tmp_path)))
    scalar(tmp_path, "zero")
    save_file(tensors | {f"{left}weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not used"):
        causal(tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trap_33_export_loads_equal_and_still_tied(models: Path, tmp_path: Path, name: str) -> None:
    """trap 33: the tied weight is written once, logits are equal, the folder's own config (dropout too) is kept."""
    model = causal(models / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    export_model(tmp_path, model, on_host(full_tensors(weight_layout(model))), models / name, tiny_tokenizer())
    loaded = plain(tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert loaded.config.tie_word_embeddings == plain(models / name).config.tie_word_embeddings
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "llama_untied")
    assert ("lm_head.weight" in tensor_names(tmp_path)) == (not tied)
    if name == "gpt2":
        assert loaded.config.attn_pdrop == 0.1


# ---- what can go wrong


class Damaging(WholePlacement):
    """A placement whose `write` gets one thing wrong."""

    def __init__(self, damage: str) -> None:
        super().__init__(WORLD)
        self.damage = damage

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        whole = whole.clone()
        if whole.dim() == 2:
            flat = whole.view(-1)
            if self.damage == "bit":
                flat.view(torch.int32)[5] ^= 1
            elif self.damage == "swapped":
                flat[:20] = flat[:20].roll(10)
            elif self.damage == "missing":
                flat[-10:] = 0
        super().write(parameter, whole)


@pytest.mark.parametrize("damage", ["bit", "swapped", "missing"])
def test_the_checksum_sees_what_did_not_arrive(models: Path, damage: str) -> None:
    with pytest.raises(RuntimeError, match=r"what arrived differs from the file in \['model.embed_tokens.weight"):
        load_causal_lm(ModelConfig(path=models / "llama"), "actor", Damaging(damage), WORLD, torch.float32)
    load_causal_lm(ModelConfig(path=models / "llama"), "actor", Damaging("none"), WORLD, torch.float32)


def test_checksums_add_up_over_slices() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(70_000).to(dtype)  # longer than the positions' period
        whole = weighted_bits(tensor)
        assert (weighted_bits(tensor[:12_345]) + weighted_bits(tensor[12_345:], 12_345) - whole) % 2**64 == 0
        assert weighted_bits(tensor.flip(0)) != whole


def copy_without(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_do_not_fit_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    norm = "model.norm.weight"
    with pytest.raises(ValueError, match=rf"missing \['{norm}'\]"):
        causal(copy_without(models / "llama", tmp_path / "a", lambda s: s.pop(norm)))
    with pytest.raises(ValueError, match=r"not used \['model.extra.weight'\]"):
        causal(copy_without(models / "llama", tmp_path / "b", lambda s: s.update({"model.extra.weight": torch.zeros(1)})))
    with pytest.raises(ValueError, match=rf"{norm} has shape \(31,\), the model needs \(32,\)"):
        causal(copy_without(models / "llama", tmp_path / "c", lambda s: s.update({norm: torch.zeros(31)})))


def test_folders_that_are_no_model_are_refused_with_the_mend(models: Path, tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        read_architecture(ModelConfig(path=folder), "actor")

    with pytest.raises(ValueError, match=r"actor.path=.*no such model folder .* hub names are not resolved"):
        read(tmp_path / "none")
    for name, changes, message in (
        ("encoder", {"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ("quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights cannot be trained"),
    ):
        shutil.copytree(models / "llama", tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    shutil.copytree(models / "llama", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors in it; convert it"):
        read(tmp_path / "bin")


def test_scalar_model_names(models: Path) -> None:
    assert {n.split(".")[0] for n, _ in scalar(models / "gpt2", "zero").named_parameters()} == {"transformer", "score"}
    assert isinstance(scalar(models / "llama", "zero"), ScalarModel)


def test_a_target_of_lora_that_no_module_has_is_refused(models: Path) -> None:
    """peft is content with one name that fits, and would adapt less than was asked for."""
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    with pytest.raises(ValueError, match=r"no module is called v_prj; did you mean v_proj\?"):
        add_adapters(model, LoraConfig(r=2, target_modules=["q_proj", "v_prj"]), 0)
    add_adapters(model, LoraConfig(r=2, target_modules=["q_proj", "self_attn.v_proj"]), 0)
