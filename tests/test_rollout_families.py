"""Causal LMs that the generic decoder drives in place: each against its own forward, sequence by sequence. The others: refused by name."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from rlhf.rollout.generic import GenericDecoder, refuse_unsupported
from rlhf.rollout.paged import Step

VOCAB, MAX_CONTEXT = 97, 64
LENGTHS = (9, 4, 12, 1)

ROTARY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**ROTARY, "num_key_value_heads": 2}
HEAD_DIM = {**GROUPED, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ONE_SLIDES = ["sliding_attention", "full_attention"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 4, "long_factor": [3.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2, scale by layer, pad token": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", ROTARY),
    "gpt_neox, sequential": ("gpt_neox", {**ROTARY, "use_parallel_residual": False}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "opt": ("opt", OPT),
    "opt, post-norm, projected": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "phi": ("phi", ROTARY),
    "phi3": ("phi3", {**GROUPED, "pad_token_id": 0}),
    "phi3, window": ("phi3", {**GROUPED, "pad_token_id": 0, "sliding_window": 5}),
    "phi3, longrope": ("phi3", {**GROUPED, "pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", {**GROUPED, "sliding_window": 5, "layer_types": ONE_SLIDES}),
    "falcon, multi-query": ("falcon", FALCON),
    "falcon, sequential, all heads": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False}),
    "falcon, new": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("stablelm", GROUPED),
    "stablelm, parallel": ("stablelm", {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "llama": ("llama", GROUPED),
    "llama, dynamic": ("llama", {**GROUPED, "rope_parameters": DYNAMIC}),
    "mistral, window": ("mistral", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", HEAD_DIM),
    "granite": ("granite", {**GROUPED, "attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "gemma": ("gemma", HEAD_DIM),
    "gemma3": ("gemma3_text", {**HEAD_DIM, "sliding_window": 5, "layer_types": ONE_SLIDES, "query_pre_attn_scalar": 16}),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 1.0}),
    "cohere2": ("cohere2", {**GROUPED, "logit_scale": 1.0, "sliding_window": 5, "layer_types": ONE_SLIDES}),
    "starcoder2": ("starcoder2", {**GROUPED, "sliding_window": 5}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4, "output_router_logits": True}),
    "qwen3_moe": ("qwen3_moe", {**HEAD_DIM, **EXPERTS}),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder-decoder": ("t5", {}, "encoder-decoder"),
    "decoder of an encoder-decoder": ("bart", {}, "encoder-decoder"),
    "encoder": ("roberta", {}, "encoder"),
    "state space": ("mamba", {}, "linear.attention"),
    "state space, falcon": ("falcon_mamba", {}, "linear.attention"),
    "recurrent": ("rwkv", {}, "state-space"),
    "recurrent, gemma": ("recurrent_gemma", {}, "linear.attention"),
    "hybrid": ("jamba", {}, "linear.attention"),
    "hybrid, bamba": ("bamba", {}, "linear.attention"),
    "linear attention": ("qwen3_next", {}, "linear.attention"),
    "convolution": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "conv"),
    "chunked attention": ("llama4_text", {}, "chunked_attention"),
    "alibi": ("bloom", {}, "alibi"),
    "alibi, mpt": ("mpt", {}, "alibi"),
    "alibi, falcon": ("falcon", {**FALCON, "alibi": True}, "alibi"),
    "soft-capping": ("gemma2", {}, "soft-capping"),
    "soft-capping by config": ("gemma3_text", {**HEAD_DIM, "attn_logit_softcapping": 50.0}, "soft-capping"),
    "sinks": ("gpt_oss", {}, "sinks"),
    "shared keys and values": ("gemma3n_text", {}, "share"),
    "keys wider than values": ("deepseek_v3", {"num_hidden_layers": 2, "first_k_dense_replace": 2}, "several shapes"),
    "mask of its own": ("doge", {"num_hidden_layers": 1}, "mask or bias"),
    "attention twice": ("diffllama", {"num_hidden_layers": 2}, "4 calls"),
    "not causal": ("gemma3_text", {**HEAD_DIM, "use_bidirectional_attention": True}, "not causal"),
    "window in the mask only": ("phimoe", {**GROUPED, "num_local_experts": 4, "sliding_window": 5}, "window"),
    "no attention interface": ("gptj", {"n_layer": 2}, "attention interface"),
    "no attention interface, neo": ("gpt_neo", {}, "attention interface"),
    "no attention interface, codegen": ("codegen", {"n_layer": 2}, "attention interface"),
    "looks on the host": ("jetmoe", {"num_hidden_layers": 1}, "meta device"),
    "multi-modal": ("gemma3", {}, "multi-modal"),
    "multi-modal, causal": ("fuyu", {}, "multi-modal"),
    "no language model": ("vit", {}, "not a causal"),
    "too few positions": ("gpt2", {**GPT2, "n_positions": 63}, "63 positions"),
    "too few positions, opt": ("opt", {**OPT, "max_position_embeddings": 63}, "63 positions"),
    "dynamic rope": ("llama", {**GROUPED, "max_position_embeddings": 63, "rope_parameters": DYNAMIC}, "past 63"),
    "longrope": ("phi3", {**GROUPED, "pad_token_id": 0, "original_max_position_embeddings": 63, "rope_parameters": LONGROPE}, "past 63"),
}


class DenseStep(Step):
    """The cache as a dictionary: (layer, sequence) -> keys and values, so that each token's attention can be written down plainly."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.rows: list[tuple[int, range]] = []  # of the packed tokens: sequence, its positions

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert k.is_contiguous() and v.is_contiguous()
        at = 0
        for sequence, span in self.rows:
            new = k[at : at + len(span)], v[at : at + len(span)]
            old = self.held.get((layer, sequence), (k[:0], v[:0]))
            assert len(old[0]) == span.start
            self.held[layer, sequence] = torch.cat((old[0], new[0])), torch.cat((old[1], new[1]))
            at += len(span)

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        assert q.is_contiguous()
        out, at = [], 0
        for sequence, span in self.rows:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in self.held[layer, sequence])
            scores = torch.einsum("qhd,khd->hqk", q[at : at + len(span)], k) * scale
            distance = torch.tensor(span)[:, None] - torch.arange(len(k))
            seen = (distance >= 0) & (distance < (window or len(k)))
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
            at += len(span)
        return torch.cat(out)


def tiny(family: str, options: dict[str, Any]) -> PreTrainedConfig:
    special = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2} if options else {}
    return CONFIG_MAPPING[family](**{**special, **options})


def model_of(config: PreTrainedConfig) -> nn.Module:
    """Random weights far wider than those of a fresh model, whose attention is almost even and hides any fault."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def run(decoder: GenericDecoder, sequences: list[Tensor], cuts: list[int]) -> list[Tensor]:
    """Logits of all tokens, with each sequence fed from cut to cut, and at each cut those that go on packed together."""
    step, logits = DenseStep(), [torch.empty(0, VOCAB) for _ in sequences]
    for start, end in itertools.pairwise(cuts):
        step.rows = [(i, range(start, min(end, len(s)))) for i, s in enumerate(sequences) if len(s) > start]
        ids = torch.cat([sequences[i][span.start : span.stop] for i, span in step.rows])
        positions = torch.cat([torch.tensor(span) for _, span in step.rows])
        out = decoder.forward(ids, positions, step, torch.arange(len(ids)))
        assert out is not None
        for (i, _), part in zip(step.rows, out.split([len(span) for _, span in step.rows]), strict=True):
            logits[i] = torch.cat((logits[i], part))
    return logits


@pytest.mark.parametrize("name", RIGHT)
def test_family_matches_its_own_forward(name: str) -> None:
    config = tiny(*RIGHT[name])
    refuse_unsupported(config, MAX_CONTEXT)  # also runs it where no value can be read: nothing waits for the device
    model = model_of(config)
    sequences = [torch.randint(3, VOCAB, (n,)) for n in LENGTHS]
    want = [model(input_ids=s[None], use_cache=False).logits[0] for s in sequences]
    decoder = GenericDecoder(model)
    assert (decoder.shape.layers, decoder.shape.head_dim, decoder.heads, decoder.vocabulary) == (2, 8, 4, VOCAB)
    for how, cuts in {"packed": [0, 12], "two chunks": [0, 5, 12], "decode": [0, 3, *range(4, 13)]}.items():
        for got, expected in zip(run(decoder, sequences, cuts), want, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, msg=lambda text, how=how: f"{name}, {how}: {text}")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    family, options, why = REFUSED[name]
    config = tiny(family, options)
    with pytest.raises(ValueError, match=f"'{family}'.*{why}"):
        refuse_unsupported(config, MAX_CONTEXT)


def test_cache_holds_kv_heads_once() -> None:
    decoder = GenericDecoder(model_of(tiny(*RIGHT["falcon, new"])))
    assert decoder.shape.kv_heads == 2  # the model itself repeats them to 4


def test_keep_picks_rows_and_none_skips_the_head() -> None:
    decoder = GenericDecoder(model_of(tiny(*RIGHT["granite"])))
    ids, positions, step = torch.tensor([5, 6, 7, 8]), torch.tensor([0, 1, 2, 0]), DenseStep()
    step.rows = [(0, range(3)), (1, range(1))]
    everything = decoder.forward(ids, positions, step, torch.arange(4))
    step.held.clear()
    some = decoder.forward(ids, positions, step, torch.tensor([3, 2]))
    assert everything is not None and some is not None
    torch.testing.assert_close(some, everything[[3, 2]])
    step.held.clear()
    assert decoder.forward(ids, positions, step, None) is None
    assert step.held[1, 1][0].shape == (1, 2, 8)  # but the cache was filled


def test_actor_of_the_same_config_object_keeps_its_attention() -> None:
    config = tiny(*RIGHT["llama"])
    actor, replica = model_of(config), model_of(config)
    replica.config = actor.config
    for module in (*actor.modules(), *replica.modules()):
        if hasattr(module, "config"):
            module.config = actor.config
    before = copy.deepcopy(actor.config)
    want = actor(input_ids=torch.tensor([[5, 6]])).logits
    GenericDecoder(replica)
    assert actor.config._attn_implementation == before._attn_implementation
    torch.testing.assert_close(actor(input_ids=torch.tensor([[5, 6]])).logits, want)
