"""How far the rollout's logprobs are from the training forward's, and how many samples stay the same when they are decoded otherwise.

    python scripts/bench_parity.py --model models/smollm2-135m-instruct

Samples from a real model at temperature 1, scores every response with the trainer's scoring forward (transformers, packed rows) in the same dtype.
Two sets of prompts: small sums after a worked example (peaked distributions), and free text. JSON lines: mean, 99.9th percentile and largest
|difference|; the share of samples whose tokens are the same with another batch limit and another order of prompts. --padded: scores padded rows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM

from rlhf.batching import MicroBatchPlan, collate
from rlhf.models.forward import response_logprobs
from rlhf.models.fused import fuse
from rlhf.models.loading import load_tokenizer
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import fuse_head
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Rollout, Sampling

SAMPLES = 4


def prompts_of(tokenizer: Any, kind: str, count: int) -> list[Prompt]:
    draw = random.Random(0)
    if kind == "sums":
        example = [{"role": "user", "content": "Calculate 451 + 233."}, {"role": "assistant", "content": "451 + 233 = 684"}]
        asked = [f"Calculate {draw.randint(10, 999)} + {draw.randint(10, 999)}." for _ in range(count)]
    else:
        example = []
        topics = ["rain", "a theorem", "bread", "a river", "an engine", "music", "a vaccine", "gravity"]
        asked = [f"Explain in a few sentences what {topics[i % 8]} is and give {2 + i // 8} examples." for i in range(count)]
    chats = [[*example, {"role": "user", "content": text}] for text in asked]
    return [Prompt(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False), c[-1]["content"], kind) for c in chats]


def differences(model: Any, rollout: Rollout, device: torch.device, packing: bool) -> torch.Tensor:
    """[response tokens] training logprob - rollout logprob."""
    found = []
    with torch.no_grad():
        for start in range(0, len(rollout), 16):
            rows = MicroBatchPlan(list(range(start, min(start + 16, len(rollout)))))
            r, mask = rollout, rollout.response_mask
            batch = collate(r.input_ids, r.prompt_lengths, r.response_lengths, mask, rows, {"rollout": r.rollout_logprobs}, packing).to(device)
            scores, _ = response_logprobs(model, batch, 1.0)
            found.append((scores - batch.columns["rollout"])[batch.mask].cpu())
    return torch.cat(found)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa", use_safetensors=True).to(device).eval()
    fuse(model)
    fuse_head(model)
    if not args.padded:
        pack_attention(model)
    for kind, window in (("sums", 24), ("text", args.window)):
        prompts = prompts_of(tokenizer, kind, args.prompts)
        sampling, draws = Sampling(window, seed=3), list(range(args.prompts))
        engine = HybridEngine.from_folder(args.model, EngineSettings(max_batch=256), device, dtype, tokenizer)
        rollout = engine.generate(prompts, draws, SAMPLES, sampling)
        d = differences(model, rollout, device, not args.padded)
        a = d.abs()
        report(
            bench="parity", case=f"SmolLM2-135M, {kind}, {args.dtype}", tokens=len(a), mean=float(a.mean()), p999=float(a.quantile(0.999)),
            worst=float(a.max()), bias=float(d.mean()), logprob=float(rollout.rollout_logprobs[rollout.response_mask].mean()),
        )  # fmt: skip
        order = torch.randperm(args.prompts, generator=torch.Generator().manual_seed(0)).tolist()
        other = HybridEngine.from_folder(args.model, EngineSettings(max_batch=24), device, dtype, tokenizer)
        again = other.generate([prompts[i] for i in order], order, SAMPLES, sampling)
        place = {(int(p), int(s)): i for i, (p, s) in enumerate(zip(again.draw, again.sample, strict=True))}
        same = [rollout.response_ids(i) == again.response_ids(place[int(rollout.draw[i]), int(rollout.sample[i])]) for i in range(len(rollout))]
        report(bench="identical_samples", case=f"SmolLM2-135M, {kind}, {args.dtype}", metric="share", value=sum(same) / len(same), samples=len(same))


def report(**fields: Any) -> None:
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    main(parser.parse_args())
