"""How evenly a rollout keeps the ranks busy when half of the responses are long.

    deepspeed --num_gpus 2 scripts/bench_balance.py
    torchrun --nproc_per_node 2 scripts/bench_balance.py --shape tiny --prompts 64 --longest 64

Random weights; every second prompt's responses are `--longest` tokens, the others' 32. Planned: rank r gets every n-th prompt, so one rank of two
gets all the long ones. Queue: ranks pull prompts from the process group's store, as training does. Beside it the worst case: all responses of rank 0
end at their first token, those of the last rank at the longest. One JSON line each: every rank's busy seconds, and the quickest over the slowest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from rlhf.distributed import init_world
from rlhf.types import Prompt, Sampling
from scripts.bench_rollout import build

SHORT = 32


def main(args: argparse.Namespace) -> None:
    world = init_world()
    engine = build(args.shape, args.max_batch, 0)
    engine.beat = world.beat
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, engine.config.vocab_size - 1, (args.prompts, 128), generator=generator).tolist()
    prompts, draws = [Prompt(row, "", "bench") for row in ids], list(range(args.prompts))
    lengths = [n for i in draws for n in [SHORT if i % 2 else args.longest] * args.samples]
    sampling = Sampling(args.longest)

    def planned(forced: list[int]) -> Any:
        mine = draws[world.rank :: world.size]
        own = [n for i in mine for n in forced[i * args.samples : (i + 1) * args.samples]]
        return engine.generate([prompts[i] for i in mine], mine, args.samples, sampling, forced=own)

    def queue(forced: list[int]) -> Any:
        return engine.generate(prompts, draws, args.samples, sampling, **world.fair_queue(args.prompts, args.samples), forced=forced)

    uneven = [1 if i % world.size == 0 else args.longest for i in draws for _ in range(args.samples)]
    ways = {"plan": (planned, lengths), "queue": (queue, lengths), "one token against the longest": (planned, uneven)}
    for name, (way, forced) in ways.items():
        if args.only not in (None, name):
            continue
        busy = []
        for _ in range(args.runs + 1):
            world.barrier()
            started = time.perf_counter()
            rows = len(way(forced))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            busy.append(world.gather_objects((time.perf_counter() - started, rows)))
            world.wait_for_all(name)
        if world.is_main:
            middle = sorted(busy[1:], key=lambda ranks: max(seconds for seconds, _ in ranks))[args.runs // 2]  # the first run warms up
            seconds = [s for s, _ in middle]
            line = {"bench": "balance", "case": f"{args.shape}, {name}", "metric": "quickest_over_slowest"}
            line |= {"value": round(min(seconds) / max(seconds), 3)}
            print(json.dumps(line | {"seconds": [round(s, 3) for s in seconds], "rows": [n for _, n in middle]}), flush=True)
    world.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5B")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--max_batch", type=int, default=512)
    parser.add_argument("--only", choices=("plan", "queue"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--local_rank", type=int, default=0, help="given by launchers")
    main(parser.parse_args())
