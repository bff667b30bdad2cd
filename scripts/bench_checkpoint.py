"""Times saving and resuming a trained model of random weights, under ZeRO-3, with its optimizer states.

    deepspeed --num_gpus 2 scripts/bench_checkpoint.py --shape 7B --folder /scratch

JSON lines from rank 0. save: seconds until everything is on disk (fsynced) with its digests. resume: seconds to check every digest and to load.
background, with what rank 0 exports: seconds until training goes on, seconds until all is on disk, and the share of these that steps (rollout,
update, hand-over) alone would not have taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from rlhf.checkpoint import Checkpoints, Export, Mark
from rlhf.distributed import World, init_world
from rlhf.experience import gather_rollout
from rlhf.files import Written
from rlhf.metrics import PhaseTimer
from rlhf.models.export import on_host, write_shards
from rlhf.models.lora import weight_layout
from rlhf.state import Copy
from rlhf.trainers.rl import Models, learn
from rlhf.types import Prompt, Sampling, Scores
from scripts import bench_step
from scripts.workloads import SHAPES, step_lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--times", type=float, default=0.06, help="so many times the prompts of workload A in a step")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is to be measured; emptied")
    parser.add_argument("--only", choices=("save", "background"))
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    args = bench_step.arguments().parse_args(["--shape", arguments.shape, "--no_reference", "--tokens", "8192"])
    world = init_world()
    config = bench_step.recipe(args)
    models = bench_step.build(args, config, world)
    timer = PhaseTimer(torch.cuda.synchronize if world.device.type == "cuda" else None)
    prompts_, samples, before, lengths = step_lengths("A", arguments.times)
    random = np.random.default_rng(1)
    prompts = [Prompt(random.integers(10, SHAPES[arguments.shape].vocabulary - 1, before).tolist(), "", "bench") for _ in range(prompts_)]
    mine = list(range(world.rank, prompts_, world.size))
    forced = [int(n) for i in mine for n in lengths[i * samples : (i + 1) * samples]]
    layout = weight_layout(models.actor.module)
    models.actor.hand_over(layout, models.hybrid_engine)
    folder = arguments.folder / "bench_checkpoint"
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()

    def step(number: int) -> float:
        world.barrier()
        started = time.perf_counter()
        local = models.hybrid_engine.generate([prompts[i] for i in mine], mine, samples, Sampling(int(lengths.max())), forced=forced)
        world.wait_for_all("rollout")
        models.hybrid_engine.release()
        rollout = gather_rollout(local, dict(enumerate(prompts)), world)
        scores = Scores(torch.randn(len(rollout), generator=torch.Generator().manual_seed(number)), torch.ones(len(rollout)).bool(), {}, {})
        learn(models, config, timer, rollout, lambda: scores, number, 0.0, world)
        models.actor.hand_over(layout, models.hybrid_engine)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    behind = Checkpoints(folder, world, keep_last=1, background=arguments.only != "save")
    started = time.perf_counter()
    remark = behind.prepare(models.engines, sum(2 * getattr(p, "ds_numel", p.numel()) for p in models.actor.module.parameters()))
    beside = [step(1)]  # which also captures graphs
    while world.most(int(behind.pinned is not None and behind.pinned.preparing)):
        beside.append(step(100 + len(beside)))
    locked = time.perf_counter() - started
    report(world, "locking host memory", locked, arguments.shape, steps=len(beside), slowest_step=round(max(beside), 3), remark=remark)
    usual = sorted(step(number) for number in range(2, 5))[1]
    report(world, "step", usual, arguments.shape)
    if arguments.only != "background":
        measure_save(world, models, folder, arguments.shape)
    if arguments.only != "save":
        measure_background(world, models, folder, behind, arguments.shape, step, usual)
    world.close()


def measure_save(world: World, models: Models, folder: Path, shape: str) -> None:
    plain = Checkpoints(folder, world, keep_last=1)
    started = time.perf_counter()
    problem = plain.save(Mark(1), models.engines, {})
    seconds = time.perf_counter() - started
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e9
    report(world, "save", seconds, shape, gb=round(size, 2), problem=problem)

    started = time.perf_counter()
    found, _ = plain.find("auto")
    checked = time.perf_counter() - started
    assert found is not None
    plain.load(found, models.engines)
    report(world, "resume", time.perf_counter() - started, shape, checked=round(checked, 3))

    if world.is_main:
        shutil.rmtree(folder)  # room for the next one
    world.barrier()


def measure_background(
    world: World, models: Models, folder: Path, behind: Checkpoints, shape: str, step: Callable[[int], float], usual: float
) -> None:
    layout = weight_layout(models.actor.module)

    def exporter(copy: Copy) -> Export | None:
        weights = on_host(models.actor.full_tensors(layout), world.is_main, copy)
        return (lambda folder: write(folder, weights)) if world.is_main else None

    def write(folder: Path, weights: dict[str, Tensor]) -> dict[Path, Written]:
        (folder / "hf").mkdir()
        return write_shards(folder / "hf", weights)

    for attempt in ("first", "second"):
        started = time.perf_counter()
        problem = behind.save(Mark(2), models.engines, {}, exporter=exporter)
        gone_on = time.perf_counter() - started
        steps = 0
        while world.most(int(behind.writing)):
            step(10 + steps)
            steps += 1
        whole = time.perf_counter() - started
        problem = problem or behind.finish()
        stalled = round((whole - steps * usual) / whole, 4)
        report(world, f"background, {attempt}", gone_on, shape, until_on_disk=round(whole, 2), steps=steps, stalled=stalled, problem=problem)
        if world.is_main:
            shutil.rmtree(folder)
        world.barrier()


def report(world: World, case: str, seconds: float, shape: str, **more: object) -> None:
    if world.is_main:
        line = {"bench": "checkpoint", "case": f"{shape} on {world.size}, {case}", "metric": "seconds", "value": round(seconds, 3), **more}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
