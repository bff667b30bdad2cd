"""Model operations by formula, the numerator of MFU (the accounting of PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    forward  2 * block_params * tokens + 2 * head_params * response tokens + 4 * layers * q_dim * sum(length^2 / 2)
    update   3 forwards; 2 under LoRA, which needs no weight gradients of the base
    rollout  one forward over all tokens, a prompt counted once for all its samples

The head counts on response tokens only, because only their logits are needed. Recomputed operations never count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Feed-forward blocks of two matrices; every other family has the gated kind with three.
_UNGATED = {
    "apertus", "arcee", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "jais2",
    "mpt", "nanochat", "nemotron", "openai-gpt", "opt", "persimmon", "phi", "starcoder2", "xglm",
}  # fmt: skip

# Dense bf16 FLOP/s of the datasheets.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need to know of a dense decoder."""

    layers: int
    q_dim: int  # attention heads x head dim
    block_params: int  # matrix weights of all layers: attention and feed-forward, no embedding
    head_params: int  # matrix weights of the output head
    hidden: int
    inner: int  # width of the feed-forward block
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


def model_shape(config: Any, head_outputs: int | None = None) -> ModelShape:
    """Shape of the model that a transformers `config` describes; `head_outputs`: 1 for a value or reward head, default: the vocabulary."""
    config = config.get_text_config()
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    head_dim = _first(config, "head_dim", default=hidden // heads)
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads", default=heads)
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    matrices = 2 if config.model_type in _UNGATED else 3
    attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
    return ModelShape(
        layers=layers,
        q_dim=heads * head_dim,
        block_params=layers * (attention + matrices * hidden * inner),
        head_params=hidden * (head_outputs or _first(config, "vocab_size")),
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def forward_flops(shape: ModelShape, lengths: NDArray[np.int64], response_tokens: int) -> float:
    """One scoring pass over sequences of `lengths` [B] with `response_tokens` logits in all."""
    tokens = float(lengths.sum())
    return 2 * shape.block_params * tokens + 2 * shape.head_params * response_tokens + _attention_flops(shape, lengths)


def update_flops(shape: ModelShape, lengths: NDArray[np.int64], response_tokens: int, lora: bool = False) -> float:
    """Forward and backward over the same sequences."""
    return (2 if lora else 3) * forward_flops(shape, lengths, response_tokens)


def rollout_flops(shape: ModelShape, draws: NDArray[np.int64], prompt_lengths: NDArray[np.int64], response_lengths: NDArray[np.int64]) -> float:
    """Sampling of B rows; rows with the same entry in `draws` [B] share one prefill of their prompt."""
    _, first = np.unique(draws, return_index=True)
    repeated = np.delete(prompt_lengths, first)
    total = forward_flops(shape, prompt_lengths + response_lengths, int(response_lengths.sum()))
    return total - forward_flops(shape, repeated, 0)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name (`torch.cuda.get_device_name()`), None where it is not known."""
    return next((peak for chip, peak in _PEAK_FLOPS.items() if chip in device_name), None)


def _attention_flops(shape: ModelShape, lengths: NDArray[np.int64]) -> float:
    return float(4 * shape.layers * shape.q_dim * (lengths.astype(np.float64) ** 2 / 2).sum())


def _first(config: Any, *names: str, default: int | None = None) -> int:
    """The first of these attributes that is set: families name the same size differently."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    if default is None:
        raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: its model operations cannot be counted")
    return default
