"""Any causal LM of transformers on a paged cache: its own forward, with only the attention replaced.

Packed tokens go in ([1, n], several sequences side by side), so the attention must be the only place where tokens meet. What breaks that,
or changes the attention's maths in a way that `Step.attend` does not know, is refused by name: on the meta device before weights are
loaded, and by the attention function itself.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from rlhf.models.packing import objection, obstacle
from rlhf.models.rotary import freeze, limit_of
from rlhf.rollout.paged import CacheShape, Step

# No mask function is registered under this name on purpose: transformers' mask creation then returns None at once (masking_utils,
# `_preprocess_mask_arguments`; the same in 5.17 and 5.23), so no forward builds a mask or looks at the positions on the host.
NAME = "rlhf_paged"

# Families whose fault no structural check below would see, or would put less plainly.
_REFUSED = {
    "bloom": "alibi attention",
    "mpt": "alibi attention",
    "gemma2": "logit soft-capping in attention",
    "gemma3n_text": "layers that share the keys and values of others",
    "gpt_oss": "attention sinks",
}


class _Active:
    """The forward that is running; the attention function has no other way to learn of it."""

    decoder: GenericDecoder
    step: Step


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, HQ, n, D], key and value [1, HK, n, D] -> [1, n, HQ, D]."""
    decoder, step = _Active.decoder, _Active.step
    if why := objection(module, attention_mask, dropout, is_causal, options):
        raise decoder.refusal(why)
    layer = decoder.layer_of(module)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # the kernels want a token's heads side by side
    step.write(layer, k, v)
    return step.attend(layer, q, q.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)


class _PagedFalconAttention(FalconAttention):
    """Falcon calls no attention interface. It also repeats keys and values to all heads, which the cache need not hold."""

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        qkv = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:  # [q * (heads / kv heads), k, v] of each kv head
            qkv = qkv.view(1, qkv.shape[1], self.num_kv_heads, -1, self.head_dim)
            query, key, value = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]
        else:
            query, key, value = self._split_heads(qkv)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out, _none = paged_attention(self, query, key, value, attention_mask, scaling=self.inv_norm_factor)
        return self.dense(out.flatten(2)), None


class _Probe(Step):
    """Attends to nothing, and notes what a cache has to hold."""

    def __init__(self) -> None:
        self.heads: set[int] = set()
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer -> (kv heads, k dim, v dim)
        self.windows: dict[int, int | None] = {}

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.shapes[layer] = (k.shape[1], k.shape[2], v.shape[2])

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        self.windows[layer] = window
        self.heads.add(q.shape[1])
        return q.new_zeros(*q.shape[:2], self.shapes[layer][2])


class GenericDecoder:
    """Drives `model` (eval, on its device) on packed tokens.

    Raises ValueError if the model does more between tokens than the paged attention covers.
    """

    def __init__(self, model: nn.Module):
        _own_configs(model)
        self.model, self.config = model, model.config
        for module in model.modules():
            _switch(module)
        freeze(model)
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._layer: dict[int, int] = {}  # id of an attention module -> layer of the cache
        self._calls: list[int] = []
        self._probe()

    def _probe(self) -> None:
        probe, device = _Probe(), next(self.model.parameters()).device
        self._probing = True
        token = torch.zeros(2, dtype=torch.int64, device=device)
        logits = self.forward(token, torch.arange(2, device=device), probe, token[:1])
        self._probing = False
        assert logits is not None
        self.vocabulary, layers, said = logits.shape[-1], len(self._layer), self.config.num_hidden_layers
        if not layers == len(self._calls) == said:
            raise self.refusal(f"{len(self._calls)} calls of the attention interface, from {layers} modules; its config says {said} layers")
        shapes = set(probe.shapes.values())
        if len(shapes) != 1 or len(probe.heads) != 1 or any(k_dim != v_dim for _, k_dim, v_dim in shapes):
            raise self.refusal(f"keys and values of several shapes (heads, k dim, v dim): {sorted(shapes)}")
        kv_heads, head_dim, _ = shapes.pop()
        self.shape, self.heads = CacheShape(layers, kv_heads, head_dim), probe.heads.pop()
        for layer, expected in _windows(self.config).items():
            if probe.windows[layer] != expected:
                raise self.refusal(f"layer {layer} passes window {probe.windows[layer]} to its attention, its config says {expected}")

    def layer_of(self, module: nn.Module) -> int:
        if self._probing:
            self._calls.append(self._layer.setdefault(id(module), len(self._layer)))
        return self._layer[id(module)]

    def refusal(self, why: str) -> UnsupportedModelError:
        return _refusal(self.config, why)

    @torch.no_grad()
    def forward(self, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | None) -> Tensor | None:
        """Logits [len(keep), V] of the tokens at the indices `keep`; None leaves them out. ids, positions: [n] int64."""
        index = ids[:0] if keep is None else keep  # the head on no rows is a head skipped
        _Active.decoder, _Active.step = self, step
        try:
            options = {"logits_to_keep": index} if self._takes_keep else {}
            logits = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **options).logits[0]
        finally:
            del _Active.decoder, _Active.step
        if keep is None:
            return None
        return logits if self._takes_keep else logits[index]


def _own_configs(model: nn.Module) -> None:
    """Copy every config, because the actor may hold the same object, and its attention must not switch."""
    own: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            if id(config) not in own:
                own[id(config)] = copy.deepcopy(config)
                if getattr(config, "output_router_logits", False):
                    own[id(config)].output_router_logits = False  # a training loss
            module.config = own[id(config)]


def _switch(module: nn.Module) -> None:
    if isinstance(module, FalconAttention):
        module.__class__ = _PagedFalconAttention
    if isinstance(module, PreTrainedModel):
        # Not set_attn_implementation: it declines models it does not recognise (falcon) with no more than a warning.
        module.config._attn_implementation_internal = NAME
        # It looks for padding among the tokens on the host, each forward, where the config names a pad token.
        module.warn_if_padding_and_no_attention_mask = lambda *_: None


def _windows(config: PreTrainedConfig) -> dict[int, int | None]:
    """Window of each layer as far as the config tells."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return {i: window if kind == "sliding_attention" else None for i, kind in enumerate(types[: config.num_hidden_layers])}
    return dict.fromkeys(range(config.num_hidden_layers), window)


class UnsupportedModelError(ValueError):
    """The model would be sampled from wrongly."""


def _refusal(config: PreTrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"rollout cannot generate with model type {config.model_type!r}: {why}")


def refuse_unsupported(config: PreTrainedConfig, max_context: int, model_class: type[PreTrainedModel] | None = None) -> None:
    """Raise ValueError, before any weights are loaded, if the paged path would get this model wrong.

    max_context: longest prompt and response together. model_class: of the model, where not what AutoModelForCausalLM takes.
    """
    family = config.model_type
    if family in _REFUSED:
        raise _refusal(config, _REFUSED[family])
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "an encoder-decoder")
    name = model_class.__name__ if model_class else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, "")
    if not name:
        raise _refusal(config, "not a causal language model of transformers")
    if config.sub_configs or name.endswith("ForConditionalGeneration"):
        raise _refusal(config, "more than a language model (multi-modal or composed)")
    if hasattr(config, "is_decoder") and family != "gpt_neox":
        raise _refusal(config, "made of an encoder's or encoder-decoder's layers")
    if getattr(config, "alibi", False):
        raise _refusal(config, "alibi attention")
    if getattr(config, "attn_logit_softcapping", None):
        raise _refusal(config, "logit soft-capping in attention")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refusal(config, "layers that share the keys and values of others")
    if other := set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        raise _refusal(config, f"layers of type {sorted(other)}")
    if (moving := limit_of(config)) and max_context > moving[0]:
        raise _refusal(config, f"{moving[1]!r} rotary scaling changes past {moving[0]} tokens, and up to {max_context} are asked for")
    if (table := getattr(config, "n_positions", None)) and max_context > table:
        raise _refusal(config, f"it has {table} positions, and up to {max_context} tokens are asked for")
    with torch.device("meta"):
        model = _construct(copy.deepcopy(config), model_class)
    if why := obstacle(model, interface=family != "falcon"):
        raise _refusal(config, why)
    for path, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if learned and ("pos" in path or "wpe" in path) and max_context > (rows := module.num_embeddings - getattr(module, "offset", 0)):
            raise _refusal(config, f"it has {rows} positions, and up to {max_context} tokens are asked for")
    try:
        GenericDecoder(model.bfloat16().eval())  # the one type that all kernels for experts take
    except UnsupportedModelError:
        raise
    except Exception as error:  # mostly a forward that reads values on the host, which no CUDA graph can hold
        raise _refusal(config, f"its forward fails on the meta device ({type(error).__name__}: {error})") from error


def _construct(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> PreTrainedModel:
    return model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
