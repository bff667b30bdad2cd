"""Packed rows: every family computes what it computes on rows alone, values and gradients; what cannot is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    StableLmConfig,
)

from rlhf.batching import MicroBatchPlan, collate, pack
from rlhf.models.forward import last_token_scores, response_logprobs, response_values
from rlhf.models.heads import ScalarModel
from rlhf.models.packing import check_packing, check_positions, pack_attention
from rlhf.models.rotary import check_length
from rlhf.preflight import check
from tests.helpers import rl_config

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 4, "long_factor": [3.0] * 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**BASE),
    "qwen2": Qwen2Config(**BASE),
    "qwen2 with windows": Qwen2Config(**BASE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "mistral with windows": MistralConfig(**BASE, sliding_window=4),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=80),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=48, pad_token_id=0, dropout=0.0),
    "phi3": Phi3Config(**BASE),
    "phi3, longrope": Phi3Config(**BASE, original_max_position_embeddings=16, rope_parameters=LONGROPE),
    "llama, dynamic": LlamaConfig(**BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "olmo2": Olmo2Config(**BASE),
    "stablelm": StableLmConfig(**BASE),
    "cohere": CohereConfig(**BASE),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4),
}
PROMPTS, RESPONSES = torch.tensor([4, 2, 9, 1, 3]), torch.tensor([3, 8, 2, 1, 4])


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return model


def gradients(model: Any, packing: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropies, all gradients) of rows 3, 1, 2, 0 of a batch."""
    ids = torch.randint(3, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < RESPONSES[:, None]
    batch = collate(ids, PROMPTS, RESPONSES, mask, MicroBatchPlan([3, 1, 2, 0]), packing=packing)
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, batch, 0.7, entropy_gradient=True)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(2))
    ((logprobs + 0.3 * entropy) * weights * batch.mask).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logprobs.detach() * batch.mask, entropy.detach() * batch.mask, grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_rows_alone(family: str, checkpointing: bool) -> None:
    """Logprobs, entropies and gradients of packed rows are those of padded ones, also where layers are computed again for the backward pass."""
    config = FAMILIES[family]
    check_packing(config, "actor")
    padded, packed = build(config), build(config)
    pack_attention(packed)
    if checkpointing:
        packed.train()
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for found, expected in zip(gradients(packed, True), gradients(padded, False), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_values_and_scores_of_packed_rows() -> None:
    ids = torch.randint(3, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < RESPONSES[:, None]
    models = []
    for packing in (False, True):
        body = build(FAMILIES["llama"]).model
        models.append(ScalarModel(body, 48))
        torch.nn.init.constant_(models[-1].score.weight, 0.1)
        if packing:
            pack_attention(models[-1])
    padded, packed = (collate(ids, PROMPTS, RESPONSES, mask, MicroBatchPlan([4, 0, 1]), packing=p) for p in (False, True))
    known = torch.arange(9) <= padded.response_lengths[:, None]  # one more than the response
    torch.testing.assert_close(response_values(models[1], packed)[known], response_values(models[0], padded)[known], atol=1e-5, rtol=1e-5)
    lengths = PROMPTS + RESPONSES
    expected = last_token_scores(models[0], ids, lengths)
    torch.testing.assert_close(last_token_scores(models[1], ids, lengths, pack(lengths.tolist())), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (FalconConfig(**SMALL), "falcon.*attention interface"),
        (Gemma2Config(**BASE, head_dim=8), "gemma2.*attn_logit_softcapping"),
        (
            Llama4TextConfig(**BASE, attention_chunk_size=4, intermediate_size_mlp=64, num_local_experts=2, head_dim=8),
            "llama4_text.*chunked_attention",
        ),
        (PhimoeConfig(**BASE, sliding_window=4), "phimoe.*looks back 4 by its mask, to the start by its call"),
        (MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2), "mamba.*state-space"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(config: PretrainedConfig, why: str) -> None:
    with pytest.raises(ValueError, match=rf"actor: model type '{why}.*train.packing=false"):
        check_packing(config, "actor")


def test_other_positions_than_ours_are_refused() -> None:
    """A RoBERTa whose first position is 2: packed or padded, its own forward computes something else."""
    config = RobertaConfig(**SMALL, is_decoder=True, pad_token_id=1)
    for asked in (lambda: check_packing(config, "actor"), lambda: check_positions(build(config), "actor")):
        with pytest.raises(ValueError, match="actor: RobertaForCausalLM counts positions from 2 on, and every forward here from 0"):
            asked()
    check_positions(build(FAMILIES["llama"]), "actor")


def test_a_row_with_which_others_would_be_turned_differently_is_refused() -> None:
    """Past its first length Phi-3 turns every row of a forward by other frequencies: what a row's gradient is would depend on the rows beside it."""
    model, config = build(FAMILIES["phi3, longrope"]), FAMILIES["phi3, longrope"]
    ids = torch.randint(3, 97, (1, 17), generator=torch.Generator().manual_seed(1))
    short, beside = (model(input_ids=ids[:, :n]).logits[:, :10] for n in (10, 17))
    assert float((short - beside).detach().norm() / short.detach().norm()) > 0.01  # so it is in transformers
    check_length(config, 16, "actor", "lower it")
    with pytest.raises(ValueError, match=r"critic: 'longrope' .* past 16 tokens, .* the longest row has 17: lower it"):
        check_length(config, 17, "critic", "lower it")
    check_length(FAMILIES["llama, dynamic"], 64, "actor", "lower it")
    with pytest.raises(ValueError, match=r"actor: 'dynamic' .* past 64 tokens"):
        check_length(FAMILIES["llama, dynamic"], 65, "actor", "lower it")
    check_length(LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), 65, "actor", "")


def test_every_role_is_asked_before_anything_loads(models: Path, tmp_path: Path) -> None:
    """A reference that cannot be packed is named by the preflight."""
    FalconConfig(**SMALL).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = rl_config(models, algorithm={"kl": {"coef": 0.1}}, reference={"path": tmp_path}, train={"packing": True})
    with pytest.raises(ValueError, match="reference: model type 'falcon' cannot be trained on packed rows"):
        check(config, 1, on_gpu=False)


def test_a_packed_model_takes_no_padded_rows() -> None:
    """A mistake of ours must not train on sequences that see each other."""
    model = build(FAMILIES["llama"])
    pack_attention(model)
    gradients(model, True)
    with pytest.raises(ValueError, match="called with"):
        gradients(model, False)
