"""Times the pieces of the training forward and backward beside what else there is: torch's own operations, Liger's kernels where they are installed
(`pip install liger-kernel`), and for the head the bare matrix products.

    python scripts/bench_kernels.py --shape 0.5B [--tokens 16384] [--pieces head norm activation rotary]

bfloat16 on a GPU, float32 else. JSON lines: milliseconds of a forward, and of a forward and backward, median of the rounds; for the head also over
those of the products (three with a trained weight, two with a frozen one).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rlhf.ops.fused import rms_norm, rotate, silu_mul_pair
from rlhf.ops.head import score_tokens
from rlhf.ops.logprobs import token_logprobs
from scripts.workloads import SHAPES, Shape

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)

Contender = tuple[Callable[..., Any], list[Tensor]]  # a function and its inputs, those that take gradients first


def values(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)


def liger(module: str, name: str) -> Any:
    """Of Liger's operations; None where it is not installed."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name) if importlib.util.find_spec("liger_kernel") else None


def norm(shape: Shape, tokens: int) -> dict[str, Contender]:
    x, weight = values(1, tokens, shape.hidden), values(shape.hidden)
    module = LlamaRMSNorm(shape.hidden, 1e-6).to(DEVICE, DTYPE)
    found: dict[str, Contender] = {
        "own": (lambda x, w: rms_norm(x, w, 1e-6), [x, weight]),
        "torch": (lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,)), [x, weight]),
    }
    if function := liger("rms_norm", "LigerRMSNormFunction"):
        found["liger"] = (lambda x, w: function.apply(x, w, 1e-6, 0.0, "llama", False), [x, weight])
    return found


def activation(shape: Shape, tokens: int) -> dict[str, Contender]:
    pair = [values(1, tokens, shape.intermediate) for _ in range(2)]
    found: dict[str, Contender] = {"own": (silu_mul_pair, pair), "torch": (lambda gate, up: F.silu(gate) * up, pair)}
    if function := liger("swiglu", "LigerSiLUMulFunction"):
        found["liger"] = (function.apply, pair)
    return found


def rotary(shape: Shape, tokens: int) -> dict[str, Contender]:
    q, k = (values(1, tokens, n, shape.head_dim).transpose(1, 2) for n in (shape.heads, shape.kv_heads))
    cos, sin = (values(1, tokens, shape.head_dim // 2).repeat(1, 1, 2) for _ in range(2))
    found: dict[str, Contender] = {
        "own": (lambda q, k: rotate(q, k, cos, sin), [q, k]),
        "torch": (lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), [q, k]),
    }
    if function := liger("rope", "LigerRopeFunction"):
        found["liger"] = (lambda q, k: function.apply(q.clone(), k.clone(), cos, sin), [q, k])  # it works in place
    return found


class _Products(torch.autograd.Function):
    """The head's matrix products and nothing else, in one piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        ctx.save_for_backward(hidden, weight, logits)
        return logits[:, 0].float()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden if ctx.needs_input_grad[1] else None


def head(shape: Shape, tokens: int, frozen: bool = False) -> dict[str, Contender]:
    hidden, weight = values(tokens, shape.hidden), values(shape.vocabulary, shape.hidden, scale=0.02)
    ids = torch.randint(shape.vocabulary, (tokens,), device=DEVICE)
    inputs = [hidden] if frozen else [hidden, weight]
    found: dict[str, Contender] = {
        "products": (lambda x, w=weight: _Products.apply(x, w), inputs),
        "own": (lambda x, w=weight: score_tokens(x, w, ids)[0], inputs),
        "torch": (lambda x, w=weight: token_logprobs(F.linear(x, w), ids)[0], inputs),
    }
    if function := liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):
        found["liger"] = (lambda x, w=weight: -function.apply(x, w, ids, None, None, -100, 0.0, 0.0, "sum")[0], inputs)
    return found


PIECES = {"head": head, "frozen head": functools.partial(head, frozen=True), "norm": norm, "activation": activation, "rotary": rotary}


def milliseconds(function: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for round_ in range(rounds + 2):  # two to warm up
        if ON_GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if ON_GPU:
            torch.cuda.synchronize()
        if round_ >= 2:
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def timed(contender: Contender, calls: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a forward, and of a forward and backward; `calls` behind each other, so that what the host takes between them is hidden."""
    function, inputs = contender
    with torch.no_grad():
        forward = milliseconds(lambda: [function(*inputs) for _ in range(calls)], rounds) / calls
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = [torch.randn_like(t) for t in outs]

    def both() -> None:
        for _ in range(calls):
            found = function(*inputs)
            torch.autograd.grad(found if isinstance(found, tuple) else (found,), inputs, gradients)

    return forward, milliseconds(both, rounds) / calls


def main(args: argparse.Namespace) -> None:
    machine = torch.cuda.get_device_name() if ON_GPU else "CPU"
    for piece in args.pieces:
        products = 0.0
        for name, contender in PIECES[piece](SHAPES[args.shape], args.tokens).items():
            line: dict[str, Any] = {"bench": "kernels", "case": f"{piece} {args.shape}, {name}", "tokens": args.tokens, "machine": machine}
            try:
                forward, both = timed(contender, 1 if "head" in piece else 20, args.rounds)
            except Exception as error:  # somebody else's kernels, in whatever version is installed
                if name == "own":
                    raise
                print(json.dumps(line | {"error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
                continue
            products = both if name == "products" else products
            line |= {"metric": "ms", "forward": round(forward, 4), "value": round(both, 4)}
            print(json.dumps(line | ({"over_products": round(both / products, 3)} if products else {})), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
