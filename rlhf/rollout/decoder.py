"""The lean decoder: the llama-like families over weights in decode layout, for packed tokens.

One class serves prefill and decode, on CPU in plain torch and on GPU with the kernels of `kernels`: what differs is attention, which the step
object knows. Fused matrices: q|k|v and gate|up lie next to each other in the flat buffer, so each is one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlhf.rollout import kernels
from rlhf.rollout.paged import CacheShape, DecodeStep, PrefillStep, Step
from rlhf.rollout.weights import Slice, vectors_last

LEAN_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


class Decoder(Protocol):
    """A causal language model on packed tokens."""

    shape: CacheShape
    heads: int
    vocabulary: int

    def forward(self, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | None) -> Tensor | None:
        """ids, positions: [n] int64. Logits [k, V] after the tokens at the indices `keep` [k]; None where none are asked for."""


def is_lean(config: PretrainedConfig) -> bool:
    """Whether the lean decoder computes this architecture exactly."""
    return config.model_type in LEAN_FAMILIES and config.hidden_act == "silu"


@dataclass
class _Layer:
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int | None


def lean_layout(config: PretrainedConfig) -> list[Slice]:
    """Every tensor of the model in the order of the flat buffer, under the names that transformers gives them."""
    c: Any = config
    hidden, inner, kind = c.hidden_size, c.intermediate_size, c.model_type
    dim = _head_dim(c)
    q, kv = c.num_attention_heads * dim, c.num_key_value_heads * dim
    attention_bias = kind == "qwen2" or bool(getattr(c, "attention_bias", False))
    o_bias = kind in ("llama", "qwen3") and attention_bias
    mlp_bias = kind == "llama" and bool(getattr(c, "mlp_bias", False))
    slices = [Slice("model.embed_tokens.weight", (c.vocab_size, hidden))]
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}"
        slices.append(Slice(f"{p}.input_layernorm.weight", (hidden,)))
        slices += [Slice(f"{p}.self_attn.{n}_proj.weight", (rows, hidden), n != "q") for n, rows in (("q", q), ("k", kv), ("v", kv))]
        if attention_bias:
            slices += [Slice(f"{p}.self_attn.{n}_proj.bias", (rows,), n != "q") for n, rows in (("q", q), ("k", kv), ("v", kv))]
        if kind == "qwen3":
            slices += [Slice(f"{p}.self_attn.{n}_norm.weight", (dim,)) for n in ("q", "k")]
        slices.append(Slice(f"{p}.self_attn.o_proj.weight", (hidden, q)))
        if o_bias:
            slices.append(Slice(f"{p}.self_attn.o_proj.bias", (hidden,)))
        slices.append(Slice(f"{p}.post_attention_layernorm.weight", (hidden,)))
        slices += [Slice(f"{p}.mlp.{n}_proj.weight", (inner, hidden), n == "up") for n in ("gate", "up")]
        if mlp_bias:
            slices += [Slice(f"{p}.mlp.{n}_proj.bias", (inner,), n == "up") for n in ("gate", "up")]
        slices.append(Slice(f"{p}.mlp.down_proj.weight", (hidden, inner)))
        if mlp_bias:
            slices.append(Slice(f"{p}.mlp.down_proj.bias", (hidden,)))
    slices.append(Slice("model.norm.weight", (hidden,)))
    if not c.tie_word_embeddings:
        slices.append(Slice("lm_head.weight", (c.vocab_size, hidden)))
    return vectors_last(slices)


def _head_dim(c: Any) -> int:
    return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def _windows(c: Any) -> list[int | None]:
    """Sliding window of each layer."""
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None)
    if c.model_type == "mistral":
        return [window] * c.num_hidden_layers
    if not kinds:
        return [None] * c.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class LeanDecoder:
    """Llama, Qwen2, Qwen3, Mistral and what shares their block (RMSNorm, rotary embedding with scaling, grouped queries, gated SiLU)."""

    def __init__(self, config: PretrainedConfig, weights: dict[str, Tensor], max_context: int):
        """weights: views of the flat buffer under transformers' names, neighbours as `lean_layout` puts them."""
        c: Any = config
        self.heads, dim = c.num_attention_heads, _head_dim(c)
        self.shape = CacheShape(c.num_hidden_layers, c.num_key_value_heads, dim)
        self.vocabulary, self.eps, self.scale = c.vocab_size, c.rms_norm_eps, 1 / math.sqrt(dim)
        self.embedding, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.device = self.embedding.device
        self._rows: dict[int, dict[str, int]] = {}  # batch -> rows of each product
        windows = _windows(c)
        self.layers = [self._layer(weights, i, windows[i]) for i in range(c.num_hidden_layers)]
        rotary = LlamaRotaryEmbedding(config).to(self.device)
        cos, sin = rotary(torch.empty(0, dtype=self.embedding.dtype, device=self.device), torch.arange(max_context, device=self.device)[None])
        self.cos, self.sin = (part[0, :, : dim // 2].contiguous() for part in (cos, sin))  # [max_context, D / 2]: both halves are equal

    @property
    def tuned(self) -> bool:
        return bool(self._rows)

    @staticmethod
    def _layer(weights: dict[str, Tensor], i: int, window: int | None) -> _Layer:
        def get(name: str) -> Tensor | None:
            return weights.get(f"model.layers.{i}.{name}")

        def need(name: str) -> Tensor:
            return weights[f"model.layers.{i}.{name}"]

        def fused(*names: str) -> Tensor:
            return neighbours([need(name) for name in names])

        def fused_bias(*names: str) -> Tensor | None:
            return fused(*names) if get(names[0]) is not None else None

        return _Layer(
            attention_norm=need("input_layernorm.weight"),
            qkv=fused("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            qkv_bias=fused_bias("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
            o=need("self_attn.o_proj.weight"),
            o_bias=get("self_attn.o_proj.bias"),
            mlp_norm=need("post_attention_layernorm.weight"),
            gate_up=fused("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            gate_up_bias=fused_bias("mlp.gate_proj.bias", "mlp.up_proj.bias"),
            down=need("mlp.down_proj.weight"),
            down_bias=get("mlp.down_proj.bias"),
            window=window,
        )

    def forward(self, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | None) -> Tensor | None:
        if self.device.type == "cuda":
            return self._on_gpu(ids, step, keep)
        x, delta, n = F.embedding(ids, self.embedding), None, len(ids)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # [n, 1, D / 2]
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._add_norm(x, delta, layer.attention_norm), layer.qkv, layer.qkv_bias)
            q, k, v = self._split(qkv)
            q, k = self._rotated(q, layer.q_norm, cos, sin), self._rotated(k, layer.k_norm, cos, sin)
            step.write(index, k, v)
            delta = F.linear(step.attend(index, q, self.scale, layer.window).reshape(n, -1), layer.o, layer.o_bias)
            gate, up = F.linear(self._add_norm(x, delta, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            delta = F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
        if keep is None:
            return None
        assert delta is not None
        return F.linear(self._add_norm(x[keep], delta[keep], self.norm), self.head)

    def _on_gpu(self, ids: Tensor, step: Step, keep: Tensor | None) -> Tensor | None:
        """The same with fused kernels. In decode steps each product may run with more rows than there are, where that is faster (`tune`)."""
        x, delta, n = F.embedding(ids, self.embedding), None, len(ids)
        rows = self._rows.get(n, _NO_ROWS) if isinstance(step, DecodeStep) else _NO_ROWS
        for index, layer in enumerate(self.layers):
            qkv = F.linear(kernels.add_norm(x, delta, layer.attention_norm, self.eps, rows["qkv"]), layer.qkv, layer.qkv_bias)
            if isinstance(step, DecodeStep):
                rotation = kernels.Rotation(self.cos, self.sin, layer.q_norm, layer.k_norm, self.eps)
                mixed = step.rotate_and_attend(index, qkv, self.heads, self.scale, layer.window, rotation, rows["o"])
            else:
                assert isinstance(step, PrefillStep)
                kernels.rope_and_cache(
                    qkv, self.cos, self.sin, step.positions, step.slots, step.cache.table, step.cache.pool[index],
                    self.heads, self.shape.kv_heads, layer.q_norm, layer.k_norm, self.eps,
                )  # fmt: skip
                q, k, v = self._split(qkv)
                step.written(k, v)
                mixed = step.attend(index, q, self.scale, layer.window)
            delta = F.linear(mixed.reshape(len(mixed), -1), layer.o, layer.o_bias)
            hidden = kernels.add_norm(x, delta, layer.mlp_norm, self.eps, rows["gate_up"])
            inner = kernels.silu_mul(F.linear(hidden, layer.gate_up, layer.gate_up_bias), n, rows["down"])
            delta = F.linear(inner, layer.down, layer.down_bias)
        if keep is None:
            return None
        assert delta is not None
        if len(keep) != n:
            x, delta = x[keep], delta[keep]
        return F.linear(kernels.add_norm(x, delta, self.norm, self.eps, rows["head"]), self.head)[: len(keep)]

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, (heads + 2 kv_heads) * D] -> q [n, heads, D], k and v [n, kv_heads, D], as views."""
        split = qkv.view(len(qkv), -1, self.shape.head_dim)
        return split[:, : self.heads], split[:, self.heads : -self.shape.kv_heads], split[:, -self.shape.kv_heads :]

    def tune(self, batches: list[int]) -> None:
        """Time every product with every number of rows in `batches`, and run each batch's with the fastest that has room for it: the library's choice
        of kernels is not monotonic (1.5B, H100: gate|up takes 29.8 us with 192 rows, 26.8 with 256). All layers in turn, so that none is cached."""
        kinds = {
            "qkv": [layer.qkv for layer in self.layers],
            "o": [layer.o for layer in self.layers],
            "gate_up": [layer.gate_up for layer in self.layers],
            "down": [layer.down for layer in self.layers],
            "head": [self.head],
        }
        best: dict[str, dict[int, int]] = {}
        stream = torch.cuda.Stream()
        for kind, matrices in kinds.items():
            seconds = {batch: _product_seconds(matrices, batch, stream) for batch in batches}
            fastest = {b: min((c for c in batches if b <= c <= 2 * b), key=seconds.__getitem__) for b in batches}
            # Only a gain beyond the noise of the clock is worth more rows.
            best[kind] = {b: c if seconds[c] < 0.98 * seconds[b] else b for b, c in fastest.items()}
        self._rows = {b: {kind: best[kind][b] for kind in kinds} for b in batches}

    def _add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """x += delta in place; RMSNorm of it (Zhang and Sennrich 2019, arXiv:1910.07467)."""
        if delta is not None:
            x += delta
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return weight * scaled.to(x.dtype)

    def _rotated(self, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """[n, heads, D], normalised per head where the model does, then rotated by position (Su et al. 2021, arXiv:2104.09864)."""
        if norm is not None:
            wide = x.float()
            x = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


_NO_ROWS = {"qkv": 0, "o": 0, "gate_up": 0, "down": 0, "head": 0}


def _product_seconds(matrices: list[Tensor], rows: int, stream: torch.cuda.Stream) -> float:
    """Seconds of x @ W.T for all W, [rows, K] each; from a graph, because the host cannot launch small products as fast as they run."""
    x = torch.randn(rows, matrices[0].shape[1], dtype=matrices[0].dtype, device=matrices[0].device)
    F.linear(x, matrices[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads may lock memory
        for matrix in matrices:
            F.linear(x, matrix)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(3):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 3000


def neighbours(tensors: list[Tensor]) -> Tensor:
    """One tensor over several that follow each other in memory, joined along their first dimension."""
    first = tensors[0]
    at = first.data_ptr()
    for tensor in tensors:
        assert tensor.data_ptr() == at and tensor.is_contiguous()
        at += tensor.numel() * tensor.element_size()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
