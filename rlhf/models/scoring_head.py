"""A language model whose head answers with logprobs instead of logits, so that those never exist as a whole.

Whoever scores tokens says which ones just before the forward; the head is the one module that has its weight then, also under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.ops.head import score_tokens
from rlhf.ops.logprobs import token_logprobs

# Families whose logits are what the head returns, with nothing behind it.
FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "ministral3", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "ernie4_5", "seed_oss", "glm4", "gemma3_text"),
    *("starcoder2", "stablelm", "nemotron", "exaone4", "arcee", "helium", "gpt2", "gpt_neox", "opt"),
)
_SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")  # what comes behind the head in others


def has_plain_head(config: PretrainedConfig) -> bool:
    """Whether logits are hidden states times the head's weight."""
    return config.model_type in FAMILIES and not any(getattr(config, name, None) for name in _SCALES)


@dataclass
class _Request:
    tokens: Tensor
    temperature: float
    entropy_gradient: bool
    answered: bool = False


class _Latest:
    """What the head of the forward that comes next is asked for."""

    request: _Request | None = None


_latest = _Latest()


def fuse_head(model: nn.Module) -> bool:
    """From here on the model's head scores tokens where `logprobs_of` asks it to. False, and nothing has changed, where it would not be right."""
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if config is None or not has_plain_head(config) or type(head) is not nn.Linear or head.bias is not None:
        return False
    plain = head.forward

    def forward(hidden: Tensor) -> Tensor:
        request, _latest.request = _latest.request, None
        if request is None:
            return plain(hidden)
        if hidden.shape[:-1] != request.tokens.shape:
            raise ValueError(f"the head was given {tuple(hidden.shape[:-1])} positions to score {tuple(request.tokens.shape)} tokens")
        request.answered = True
        flat = hidden.flatten(0, -2)
        scores = score_tokens(flat, head.weight, request.tokens.flatten(), request.temperature, request.entropy_gradient)
        return torch.stack(scores, -1).view(*request.tokens.shape, 2)

    head.forward = forward  # type: ignore[method-assign]
    return True


def logprobs_of(
    forward: Callable[..., Any], inputs: dict[str, Any], keep: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of `tokens` [b, k], float32, each scored by the logits at the positions `keep` [k] of the model's forward on `inputs`."""
    request = _latest.request = _Request(tokens, temperature, entropy_gradient)
    try:
        out = forward(**inputs, logits_to_keep=keep).logits
    finally:
        _latest.request = None
    if request.answered:
        logprobs, entropy = out.unbind(-1)
        return logprobs, entropy if entropy_gradient else entropy.detach()
    return token_logprobs(out, tokens, temperature, entropy_gradient)
