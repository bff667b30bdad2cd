"""Log-probabilities of given tokens under logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    logits: Float[Tensor, "*n v"], tokens: Int[Tensor, "*n"], temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """(logprob of each token, entropy of its distribution), float32, under softmax(logits / temperature).

    `logits` must already be the ones that score `tokens`: the logits at position t score the token at t + 1 (trap 1).
    The entropy carries gradients only if asked: they cost two more tensors of the size of the logits.
    """
    scaled = logits.float() / temperature
    log_z = torch.logsumexp(scaled, dim=-1)
    chosen = scaled.gather(-1, tokens[..., None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = log_z - (torch.softmax(scaled, dim=-1) * scaled).sum(-1)
    return chosen - log_z, entropy
