"""Times the hand-over of weights: from the end of an optimizer step until the rollout's buffer is ready for the first decode launch.

    deepspeed --num_gpus 1 scripts/bench_handover.py --shape 1.5B
    deepspeed --num_gpus 2 scripts/bench_handover.py --shape 7B [--lora 64]

Random weights in bf16, a real optimizer step on a small batch before every hand-over. One JSON line from rank 0 with the median of the runs, of each
the slowest rank's. --compare: beside it the same through DeepSpeed's GatheredParameters, group by group. --switches N: enters and leaves the rollout
phase N times with the memory of weights and KV cache given back in between, a decode step in each, and reports what that takes and what it leaks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM

from rlhf.config import LoraConfig, TrainedModelConfig, resolve_deepspeed
from rlhf.distributed import init_world
from rlhf.engine import TrainEngine, loading_context
from rlhf.models.lora import add_adapters, weight_layout
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Sampling
from scripts.workloads import SHAPES


def main(args: argparse.Namespace) -> None:
    world = init_world()
    on_gpu = world.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    settings = resolve_deepspeed(
        f"ds_configs/zero{args.zero}.json", dtype=str(dtype).removeprefix("torch."), trained=True, micro_batch=1, world_size=world.size,
        max_grad_norm=1.0, on_gpu=on_gpu,
    )  # fmt: skip
    architecture = SHAPES[args.shape].config()
    placement = loading_context(settings, world)

    def build() -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        return model

    module = placement.construct(build)
    generator = torch.Generator(world.device).manual_seed(world.rank)
    for parameter in module.parameters():
        getattr(parameter, "ds_tensor", parameter.data).normal_(0.0, 0.02, generator=generator)
    role = TrainedModelConfig(path=Path("random"), learning_rate=1e-6, lora=LoraConfig(r=args.lora) if args.lora else None)
    if role.lora:
        module = add_adapters(module, role.lora, 0)
    actor = TrainEngine(module, role, settings, world, 100, 0, "actor")
    sizes = EngineSettings(max_batch=args.max_batch, max_context=1280) if args.switches else EngineSettings(max_batch=1, max_context=64)
    rollout = HybridEngine(architecture, [0], 0, sizes, world.device, dtype)
    layout = weight_layout(actor.module)
    ids = torch.randint(0, architecture.vocab_size, (1, 16), device=world.device)
    case = args.shape + ("" if (args.zero, world.size) == (3, 1) else f"-z{args.zero}x{world.size}") + ("-lora" if args.lora else "")

    def step() -> None:
        logits = actor(input_ids=ids, use_cache=False).logits
        actor.backward(-logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum(), 15 * world.size)
        actor.step()

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        world.barrier()

    def timed(name: str, hand_over: Any) -> None:
        times = []
        for run in range(args.runs + 2):
            step()
            synchronize()
            started = time.perf_counter()
            hand_over()
            if on_gpu:
                torch.cuda.synchronize()
            slowest = max(world.gather_objects((time.perf_counter() - started) * 1000))
            if run >= 2:  # the first ones set up communicators and compile kernels
                times.append(slowest)
        assert rollout._wrong is None or int(rollout._wrong) == 0
        if world.is_main:
            machine = f"{world.size}x {torch.cuda.get_device_name()}" if on_gpu else "CPU"
            report = {"bench": name, "case": case, "metric": "ms", "value": round(statistics.median(times), 2), "all": [round(t, 2) for t in times]}
            print(json.dumps(report | {"gib": round(rollout.parameters * dtype.itemsize / 2**30, 2), "machine": machine}), flush=True)

    def switches() -> None:
        prompt, sampling = [Prompt([1], "", "bench")], Sampling(2)  # the first token comes from the prefill, the second from a decode step
        spent: dict[str, list[float]] = {"enter": [], "leave": []}
        used = []
        for _ in range(args.switches):
            step()
            for way in spent:
                synchronize()
                started = time.perf_counter()
                if way == "enter":
                    actor.hand_over(layout, rollout)
                    rollout.prepare(1280, args.max_batch, 1024, Sampling(1024))
                    if on_gpu:
                        torch.cuda.synchronize()
                else:
                    rollout.release()
                spent[way].append(max(world.gather_objects((time.perf_counter() - started) * 1000)))
                if way == "enter":
                    rollout.generate(prompt, [0], 1, sampling)
            if on_gpu:  # what the allocator keeps for its next use is no leak
                free, total = torch.cuda.mem_get_info()
                used.append(total - free - torch.cuda.memory_reserved() + torch.cuda.memory_allocated())
            else:
                used.append(0)
        if world.is_main:
            middle = {way: round(statistics.median(times[2:]), 2) for way, times in spent.items()}
            line = {"bench": "switch", "case": case, "metric": "ms", "value": round(sum(middle.values()), 2), **middle, "first": spent["enter"][0]}
            line |= {"switches": args.switches, "leaked_mib": (used[-1] - used[2]) / 2**20, "gib_between": used[-1] / 2**30}
            print(json.dumps(line), flush=True)

    timed("handover", lambda: actor.hand_over(layout, rollout))
    if args.compare:
        timed("handover_gathered_parameters", lambda: rollout.load_weights(actor.full_tensors(layout)))
    if args.switches:
        switches()
    world.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapters")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--switches", type=int, default=0)
    parser.add_argument("--max_batch", type=int, default=512, help="of the rollout, with --switches")
    parser.add_argument("--local_rank", type=int, default=0, help="given by launchers")
    arguments = parser.parse_args()
    if 0 < arguments.switches < 3:
        parser.error("--switches: at least 3, as the first two warm up")
    main(arguments)
