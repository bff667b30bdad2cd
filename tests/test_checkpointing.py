"""What is computed again in the backward pass changes no bit of loss or gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PhiConfig

from rlhf.batching import pack
from rlhf.config import LoraConfig, Recomputed
from rlhf.models.checkpointing import decoder_layers, mlps, recompute
from rlhf.models.forward import inputs_of
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.lora import add_adapters
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import fuse_head, logprobs_of
from rlhf.ops import fused
from rlhf.preflight import check
from tests.helpers import rl_config
from tests.test_memory import FAMILIES

LENGTHS = [5, 9, 3]
PHI = PhiConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, resid_pdrop=0.0)  # no gated MLP
CONFIGS = {**FAMILIES, "phi": PHI}


def outcome(family: str, what: Recomputed, lora: bool, scalar: bool) -> dict[str, Tensor]:
    """Loss and gradients of a packed forward in float32."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32, attn_implementation="sdpa")
    module: Any = ScalarModel(model.model, CONFIGS[family].hidden_size) if scalar else model
    fuse(module)
    pack_attention(module)
    plain = module
    if lora:
        module = add_adapters(module, LoraConfig(r=4), 1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    fuse_head(plain)
    recompute(module, what, "actor")
    module.train()
    inputs = inputs_of(torch.arange(27).view(3, 9) % 11, pack(LENGTHS))
    if scalar:
        inputs.pop("use_cache")
        loss = module(**inputs).square().sum()
    else:
        loss = logprobs_of(module, inputs, torch.arange(sum(LENGTHS) - 1), inputs["input_ids"][:, 1:], 0.7)[0].sum()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in module.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("lora", "scalar"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_bits(family: str, lora: bool, scalar: bool) -> None:
    expected = outcome(family, False, lora, scalar)
    for what in (True, "mlp"):
        found = outcome(family, what, lora, scalar)
        assert found.keys() == expected.keys() and len(found) > 10
        assert all(torch.equal(found[name], expected[name]) for name in expected), what


def test_only_mlps_run_again() -> None:
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]), dtype=torch.float32)
    calls = {"q_proj": 0, "gate_proj": 0, "up_proj": 0}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in calls:
            module.register_forward_hook(lambda *_, last=last: calls.update({last: calls[last] + 1}))
    recompute(model, "mlp", "actor")
    model.train()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids).logits.sum().backward()
    assert calls == {"q_proj": 3, "gate_proj": 6, "up_proj": 6}
    with torch.no_grad():
        model(input_ids=ids)
    assert calls == {"q_proj": 6, "gate_proj": 9, "up_proj": 9}


def test_layers_without_a_known_mlp_are_refused(models: Path, tmp_path: Path) -> None:
    opt: Any = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    )
    assert len(decoder_layers(opt)) == 2
    with pytest.raises(ValueError, match=r"actor\.gradient_checkpointing=mlp: OPTDecoderLayer has no module called mlp, feed_forward or ffn"):
        mlps(opt, "actor")
    opt.save_pretrained(tmp_path / "opt")
    config = rl_config(models, actor={"path": tmp_path / "opt", "gradient_checkpointing": "mlp"}, train={"packing": False})
    with pytest.raises(ValueError, match="no module called mlp"):  # before anything loads
        check(config, 1, False)


class _SiluMul:
    """In place of the kernel: (gate, up, out, ...)."""

    def __getitem__(self, grid: object) -> Any:
        return lambda gate, up, out, *rest, **options: out.copy_(nn.functional.silu(gate) * up)


class _Gradient:
    """(gate, up, d_out, d_gate, d_up, out, width, block, again)."""

    def __getitem__(self, grid: object) -> Any:
        def launch(gate: Tensor, up: Tensor, d_out: Tensor, d_gate: Tensor, d_up: Tensor, out: Tensor, *rest: Any, **options: Any) -> None:
            sigmoid = torch.sigmoid(gate)
            out.copy_(gate * sigmoid * up)
            d_up.copy_(d_out * gate * sigmoid)
            d_gate.copy_(d_out * up * sigmoid * (1 + gate * (1 - sigmoid)))

        return launch


@pytest.mark.parametrize("what", [True, "mlp"])
def test_what_an_mlp_ends_with_is_not_computed_again(what: Recomputed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own autograd functions, without the kernels: the second run gives up where the last is kept that the backward pass needs."""
    monkeypatch.setattr(fused, "_silu_mul", _SiluMul())
    monkeypatch.setattr(fused, "_silu_mul_gradient", _Gradient())
    monkeypatch.setattr(fused, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    expected = outcome("qwen2", what, False, False)
    products: list[int] = []
    monkeypatch.setattr(fused, "_in_kernels", lambda *tensors: tensors[0].shape[-1] == 320)  # only the MLPs, by their inner width
    linear = nn.functional.linear
    monkeypatch.setattr(fused.F, "linear", lambda x, *rest: products.append(x.shape[-1]) or linear(x, *rest))
    found = outcome("qwen2", what, False, False)
    assert products.count(320) == 3  # one for each layer
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
