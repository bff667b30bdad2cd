"""Times the hybrid engine on one GPU with random weights in bf16: whole rollouts, or one decode step.

    python scripts/bench_rollout.py --shape 1.5B
    python scripts/bench_rollout.py --shape 8B --step 1 64 --context 512
    python scripts/bench_rollout.py --shape 1.5B --profile 192

Whole rollouts: 128 prompts x 4 samples with response lengths drawn once (scripts/workloads.py). The engine is told only the longest length for
every request; a table on the device makes each response end at its own length, where the engine finds it out as it does a real end token. Logprobs
are kept, temperature 1. One JSON line per run, the first is the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Sampling
from scripts.workloads import SHAPES, decode_step_bound, rollout_bound, rollout_requests

EOS = 151643


def build(shape: str, max_batch: int, max_context: int) -> HybridEngine:
    config = SHAPES[shape].config()
    eos = min(EOS, config.vocab_size - 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = HybridEngine(config, [eos], eos, EngineSettings(max_batch=max_batch, max_context=max_context), device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in engine.own_weights().items():
        if tensor.ndim == 1 and "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
    return engine


def chip() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return "H200" if "H200" in name else "H100"


def whole(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    engine = build(args.shape, args.max_batch, 0)
    built = time.perf_counter() - started
    ids, lengths = rollout_requests(args.prompts, args.samples, longest=args.longest)
    ids = [[i % (engine.config.vocab_size - 1) for i in row] for row in ids]
    prompts, draws = [Prompt(row, "", "bench") for row in ids], list(range(len(ids)))
    sampling = Sampling(args.longest)
    started = time.perf_counter()
    engine.prepare(max(map(len, ids)) + args.longest, len(lengths), args.longest, sampling, forced=True)
    torch.cuda.synchronize()
    start_up = time.perf_counter() - started
    bound = rollout_bound(SHAPES[args.shape], ids, lengths, chip())
    rates = []
    for run in range(args.runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        rollout = engine.generate(prompts, draws, args.samples, sampling, forced=lengths)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        assert rollout.response_lengths.tolist() == lengths and bool(rollout.finished.all())
        tokens = sum(lengths)
        if run:
            rates.append(tokens / seconds)
        free, total = torch.cuda.mem_get_info()
        report(
            bench="rollout", case=args.shape, run=run, prompts=len(ids), samples=args.samples, tokens=tokens, seconds=round(seconds, 4),
            tok_s=round(tokens / seconds), share_of_bound=round(bound / seconds, 4), peak_gib=round((total - free) / 2**30, 2),
            build_s=round(built, 2), start_up_s=round(start_up, 2), machine=torch.cuda.get_device_name(),
        )  # fmt: skip
    report(bench="rollout", case=args.shape, metric="tok_s", value=round(statistics.median(rates)), runs=args.runs)


def at_context(engine: HybridEngine, batch: int, context: int) -> Any:
    """A replay of one decode step in which every row has `context` tokens; no row is live, so that it can be repeated."""
    sampling = Sampling(8)
    engine.prepare(context + 64, batch, 8, sampling)
    loop = engine._loop
    assert loop is not None and engine._outputs is not None
    cache, state, out = loop.cache, loop.state, engine._outputs
    cache.reset()
    generator = torch.Generator(engine.device).manual_seed(0)
    cache.table[:batch] = torch.randint(1, cache.pages, cache.table[:batch].shape, generator=generator, device=engine.device, dtype=torch.int32)
    state.length[:batch] = context - 1
    state.token[:batch] = torch.randint(0, loop.decoder.vocabulary, (batch,), generator=generator, device=engine.device)
    size = loop.batch_for(batch)
    return lambda: loop.step(size, sampling, out)


def steps(args: argparse.Namespace) -> None:
    engine = build(args.shape, max(args.step), args.context + 64)
    for batch in args.step:
        replay = at_context(engine, batch, args.context)
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 20)
        bound = decode_step_bound(SHAPES[args.shape], batch, args.context, chip()) * 1000
        report(
            bench="decode_step", case=f"{args.shape}-b{batch}", metric="ms", value=round(statistics.median(times[1:]), 4), context=args.context,
            bound_ms=round(bound, 3), machine=torch.cuda.get_device_name(),
        )  # fmt: skip


def profile(args: argparse.Namespace) -> None:
    """Where one decode step spends its time, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    engine = build(args.shape, max(args.profile), args.context + 64)
    for batch in args.profile:
        replay = at_context(engine, batch, args.context)
        for _ in range(3):
            replay()
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                replay()
            torch.cuda.synchronize()
        spent: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spent[event.name[:90]] += event.device_time / 3
                count[event.name[:90]] += 1
        report(profile=args.shape, batch=batch, context=args.context, kernels=sum(count.values()) // 3, busy_us=round(sum(spent.values())))
        for name, time_us in spent.most_common(args.rows):
            print(f"{time_us:9.1f} us {count[name] // 3:4d} x {name}", flush=True)


def report(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--max_batch", type=int, default=512)
    parser.add_argument("--step", type=int, nargs="*", help="time one decode step at these batch sizes")
    parser.add_argument("--profile", type=int, nargs="*", help="kernels of one decode step at these batch sizes")
    parser.add_argument("--context", type=int, default=450)
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    (profile if arguments.profile else steps if arguments.step else whole)(arguments)
