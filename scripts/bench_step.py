"""Times whole training steps with random weights in bf16: rollout, scoring, update, hand-over, through the functions of the program.

    deepspeed --num_gpus 1 scripts/bench_step.py --shape 0.5B --algorithm grpo --workload A
    deepspeed --num_gpus 1 scripts/bench_step.py --shape 0.5B --algorithm ppo --workload V
    deepspeed --num_gpus 1 scripts/bench_step.py --shape 7B --workload A --lora 64 --only update

Responses are forced to the workload's lengths (scripts/workloads.py), one optimizer step per rollout unless --minibatches are given. JSON lines from
rank 0: figures of the bars, and a line for each phase and the whole step with the median seconds, tokens/s, MFU (model operations / seconds / 989e12;
recomputation never counts, LoRA counts two passes), share of the bound, and with --profile the share of the time that the device was busy. Memory
of the whole (`peak_gb`) is the most that cudaMemGetInfo says is taken; of a phase `peak_gb` is what tensors and all but torch's allocator had at
most, and `device_gb` what cudaMemGetInfo says at its end: torch's allocator keeps what earlier phases were given.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.autograd.profiler_util import DeviceType
from transformers import AutoModel, AutoModelForCausalLM

import rlhf.engine
from rlhf.config import ROOT, Config, ModelConfig, RewardComponentConfig, TrainedModelConfig, parse_config, role_settings
from rlhf.distributed import World, init_world
from rlhf.engine import FrozenEngine, TrainEngine, loading_context
from rlhf.experience import gather_rollout, scored_together
from rlhf.memory import MemoryMeter, lends_weights
from rlhf.metrics import PhaseTimer, model_shape, rollout_flops
from rlhf.models.checkpointing import recompute
from rlhf.models.compiling import compile_layers
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.lora import adapters_off, add_adapters, weight_layout
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import fuse_head
from rlhf.rewards.compose import EarlyScorer
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.pool import Pool
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.trainers.rl import Models, learn, memory_to_come
from rlhf.types import Prompt, Rollout, Sampling, Scores
from scripts.workloads import CHIPS, SHAPES, WORKLOADS, rollout_bound, scoring_flops, step_lengths

PIECES = ("packing", "head", "kernels", "layers", "together")
PHASE = "phase "  # before its name, in a profile
PEAK = 989e12  # dense bf16 FLOP/s of the H100's and the H200's datasheet


class NoText:
    """In place of a tokenizer: random ids have no text."""

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return [""] * len(ids)


def recipe(args: argparse.Namespace) -> Config:
    checkpointing = {"false": False, "true": True}.get(args.checkpointing, args.checkpointing)
    role = {"compile": args.compile, "offload": args.offload}
    trained: dict[str, Any] = {"path": "random", "gradient_checkpointing": checkpointing} | role
    settings: dict[str, Any] = json.loads((ROOT / f"ds_configs/zero{args.zero}.json").read_text())
    settings["zero_optimization"] |= {key: json.loads(value) for key, value in (entry.split("=", 1) for entry in args.zero_set)}
    packing, longest = "packing" not in args.without, WORKLOADS[args.workload][2] + WORKLOADS[args.workload][4]
    tree: dict[str, Any] = {
        "task": "rl",
        "run_dir": "unused",
        "deepspeed": settings,
        "actor": trained | ({"lora": {"r": args.lora, "target_modules": "all-linear"}} if args.lora else {}),
        "critic": {"gradient_checkpointing": checkpointing} | role,
        "reference": role,
        "reward": {"components": [{"function": "exact_match"}]},
        "data": {"train": [{"path": "none.jsonl"}]},
        "rollout": {"prompts": WORKLOADS[args.workload][0], "group_size": WORKLOADS[args.workload][1]},
        "algorithm": {"name": args.algorithm, "kl": {"coef": 0.0 if args.no_reference else 0.001, "place": "loss", "estimator": "k3_corrected"}},
        "train": {"steps": 100} | ({"micro_batch_tokens": args.tokens} if packing else {"packing": False, "micro_batch": args.tokens // longest}),
    }
    tree["algorithm"] |= {"epochs": 1, "minibatches": args.minibatches}
    return parse_config(tree)


def build(args: argparse.Namespace, config: Config, world: World) -> Models:
    shape = SHAPES[args.shape]
    on_gpu = world.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    architecture = shape.config()

    def model(role: ModelConfig, scalar: bool = False) -> tuple[torch.nn.Module, dict[str, Any]]:
        settings = role_settings(config, role, world_size=world.size, on_gpu=on_gpu)

        def make() -> torch.nn.Module:
            if scalar:
                return ScalarModel(AutoModel.from_config(architecture, dtype=dtype, attn_implementation="sdpa"), shape.hidden)
            made: torch.nn.Module = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
            return made

        module = loading_context(settings, world).construct(make)
        generator = torch.Generator(world.device).manual_seed(world.rank)
        for name, parameter in module.named_parameters():
            local = getattr(parameter, "ds_tensor", parameter.data)
            local.fill_(1.0) if "norm" in name else local.normal_(0.0, 0.02, generator=generator)
        if "kernels" not in args.without and not role.compile:
            fuse(module)
        if config.train.packing:
            pack_attention(module)
        if "head" not in args.without:
            fuse_head(module)
        return module, settings

    def trained(role: TrainedModelConfig, name: str) -> TrainEngine:
        module, settings = model(role, scalar=name == "critic")
        if role.lora:
            module = add_adapters(module, role.lora, 0)
        if role.compile:
            compile_layers(module)
        recompute(module, role.recomputed, name)
        return TrainEngine(module, role, settings, world, 100, 0, name)

    actor = trained(config.actor, "actor")
    critic = trained(config.critic, "critic") if config.algorithm.needs_critic else None
    reference: Any = None
    if config.uses_reference and args.lora:

        def reference(**inputs: Any) -> Any:
            with adapters_off(actor.module):
                return actor.score(**inputs)

    elif config.uses_reference:
        module, settings = model(config.reference.model_copy(update={"path": config.actor.path}))
        if config.reference.compile:
            compile_layers(module)
        reference = FrozenEngine(module, settings, world, config.reference.offloaded)
    sizes = EngineSettings(max_batch=args.max_batch, cache_tokens=args.cache_tokens)
    engines, frozen = [model for model in (actor, critic) if model], [reference] if isinstance(reference, FrozenEngine) else []
    rollout = HybridEngine(architecture, [0], 0, sizes, world.device, dtype, to_come=lambda: memory_to_come(engines, frozen))
    rewards: Any = None  # drawn at random instead
    together = 1 if {"together", "head"} & set(args.without) else scored_together(config, lean=rollout.lean, on_gpu=on_gpu)
    return Models(actor, critic, reference, rewards, rollout, together)


def main(args: argparse.Namespace) -> None:
    world = init_world()
    by_layer = rlhf.engine.fetch_by_layer
    turns: dict[str | None, list[list[str]]] = {
        None: [args.without],
        "off": [[], *([piece] for piece in PIECES)],
        "on": [list(PIECES[i:]) for i in range(len(PIECES) + 1)],
    }
    for without in turns[args.in_turn]:
        rlhf.engine.fetch_by_layer = by_layer if "layers" not in without else lambda module: None
        run(argparse.Namespace(**vars(args) | {"without": without}), world)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.close()


def run(args: argparse.Namespace, world: World) -> None:
    on_gpu = world.device.type == "cuda"
    shape, config = SHAPES[args.shape], recipe(args)
    models = build(args, config, world)
    layout, lend = weight_layout(models.actor.module), "lending" not in args.without and lends_weights(config, world.size, on_gpu)
    prompts_, samples, before, lengths = step_lengths(args.workload, args.times)
    random = np.random.default_rng(1)
    prompts = [Prompt(random.integers(10, shape.vocabulary - 1, before).tolist(), "", "bench") for _ in range(prompts_)]
    sampling = Sampling(int(lengths.max()))
    mine = list(range(world.rank, prompts_, world.size))
    forced = [int(n) for i in mine for n in lengths[i * samples : (i + 1) * samples]]
    tokenizer: Any = NoText()
    reward = RewardComponentConfig(function="scripts.workloads:waiting", arguments={"seconds": args.reward_ms / 1000})
    waiting = FunctionReward(reward)
    pool = Pool([waiting.path] if args.reward_ms else [], args.workers)
    meter, open_phase = MemoryMeter(on_gpu), ExitStack()

    def on_phase(name: str) -> None:
        open_phase.enter_context(torch.profiler.record_function(PHASE + name))
        meter.begin()

    def on_end(name: str) -> None:
        meter.end(name)
        open_phase.close()

    timer = PhaseTimer(torch.cuda.synchronize if on_gpu else None, on_phase, on_end)
    records: list[dict[str, float]] = []
    peak = 0.0

    def note_memory() -> None:
        nonlocal peak
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            peak = max(peak, (total - free) / 1e9)

    def drawn() -> Rollout:
        """Rows as a rollout gives them, without one."""
        local = np.full((len(forced), before + int(lengths.max())), 0)
        for row, n in enumerate(forced):
            local[row, :before] = prompts[mine[row // samples]].input_ids
            local[row, before : before + n] = random.integers(10, shape.vocabulary - 1, n)
        ids, n = torch.from_numpy(local), torch.tensor(forced)
        draw = torch.tensor(mine).repeat_interleave(samples)
        logprobs = torch.zeros(len(forced), int(lengths.max()))
        of_rows = [prompts[int(d)] for d in draw]
        return Rollout(
            of_rows, draw, torch.arange(samples).repeat(len(mine)), ids, torch.full_like(n, before), n, torch.ones_like(n).bool(), logprobs
        )

    def step(number: int) -> None:
        early: EarlyScorer | None = None
        timer.start_step()
        started = time.perf_counter()
        with timer.phase("gen"):
            if args.only:
                local = drawn()
            else:
                early = EarlyScorer({"reward": waiting}, tokenizer, pool) if args.reward_ms else None

                def ended(row: int, ids: list[int], early: EarlyScorer | None = early) -> None:
                    if early is not None:
                        early.submit(prompts[mine[row // samples]], mine[row // samples], row % samples, ids)

                local = models.hybrid_engine.generate(
                    [prompts[i] for i in mine], mine, samples, sampling, forced=forced, on_finished=ended if early else None
                )
                world.wait_for_all("rollout")
                note_memory()
                models.hybrid_engine.release()
                if early is not None:
                    early.close()
            rollout = gather_rollout(local, dict(enumerate(prompts)), world)
        models.fetch()
        generated = time.perf_counter()

        def scored() -> Scores:
            with timer.phase("reward"):
                if early is not None:
                    early.finish()
            generator = torch.Generator().manual_seed(number)
            return Scores(torch.randn(len(rollout), generator=generator), torch.ones(len(rollout), dtype=torch.bool), {}, {})

        learn(models, config, timer, rollout, scored, number, config.algorithm.kl.coef, world)
        note_memory()
        with timer.phase("hand_over"):
            if lend or not args.only:
                models.actor.hand_over(layout, models.hybrid_engine, lend)
        now = time.perf_counter()
        record = {name.removeprefix("timing_s/"): value for name, value in timer.metrics().items() if name.startswith("timing_s/")}
        records.append(record | {"step": now - started, "after_gen": now - generated})

    if lend or not args.only:
        models.actor.hand_over(layout, models.hybrid_engine, lend)
    for number in range(1, args.warmup + args.steps + 1):
        step(number)
        if world.is_main:
            print(
                json.dumps(
                    {
                        "warm-up" if number <= args.warmup else "step": number,
                        **{k: round(v, 3) for k, v in records[-1].items() if k != "step"},
                        "whole": round(records[-1]["step"], 3),
                        "peak_gb": round(peak, 1),
                    }
                ),
                flush=True,
            )
    busy: dict[str, float] = {}
    if args.profile and on_gpu:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU])
    else:
        profiler = nullcontext()  # type: ignore[assignment]
    if args.profile:
        with profiler as found:
            step(args.warmup + args.steps + 1)
        profiled = records.pop()
        if on_gpu:
            busy = report_profile(found, profiled["step"], args.profile, world)
    pool.close()
    kept = records[args.warmup :]
    seconds = {name: statistics.median(r.get(name, 0.0) for r in kept) for name in kept[0]}
    if world.is_main:
        report(args, world, seconds, lengths, before, prompts, peak, meter, busy)


def report_profile(found: Any, step: float, rows: int, world: World) -> dict[str, float]:
    """Prints the kernels that take longest. Of each phase, and of the step of so many seconds: in which share of it the device ran one."""
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    # Annotations are shown on the device too.
    kernels = [e for e in events if not (getattr(e, "is_user_annotation", False) or e.name.startswith(("Optimizer", PHASE, "nccl:")))]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)

    def busy(first: float, last: float) -> float:
        """Microseconds of that time in which a kernel ran."""
        total, end = 0.0, first
        for start, stop in spans:
            stop = min(stop, last)
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total

    phases = [e for e in found.events() if e.device_type == DeviceType.CPU and e.name.startswith(PHASE)]
    shares: dict[str, list[float]] = {}
    for e in phases:
        sums = shares.setdefault(e.name.removeprefix(PHASE), [0.0, 0.0])
        sums[0] += busy(e.time_range.start, e.time_range.end)
        sums[1] += e.time_range.end - e.time_range.start
    if world.is_main:
        totals: dict[str, list[float]] = {}
        for e in kernels:
            entry = totals.setdefault(e.name, [0.0, 0])
            entry[0] += e.time_range.end - e.time_range.start
            entry[1] += 1
        for name, (micros, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:rows]:
            print(f"{micros / 1e3:10.1f} ms {count:7d}  {name[:130]}", flush=True)
    return {name: running / whole for name, (running, whole) in shares.items()} | {"step": busy(0.0, math.inf) / 1e6 / step}


def report(
    args: argparse.Namespace,
    world: World,
    seconds: dict[str, float],
    lengths: np.ndarray,
    before: int,
    prompts: list[Prompt],
    peak: float,
    meter: MemoryMeter,
    busy: dict[str, float],
) -> None:
    shape, ranks = SHAPES[args.shape], world.size
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    chip = "H200" if "H200" in name else "H100"
    tokens, flops = int((lengths + before).sum()), scoring_flops(shape, lengths + before, lengths)
    factor = 2 if args.lora else 3
    case = f"{args.workload}-{args.shape}" + (f"-lora{args.lora}-all" if args.lora else "") + (f"-z{args.zero}x{ranks}" if ranks > 1 else "")
    case += f"-minibatches{args.minibatches}" * (args.minibatches > 1)
    case += "-offload" * args.offload + "-compiled" * args.compile + "".join(f"-without-{piece}" for piece in args.without)
    case = args.case or case
    common = {"case": case, "machine": f"{ranks}x {name}", "algorithm": args.algorithm, "steps": args.steps, "tokens_per_forward": args.tokens}
    lines: list[dict[str, Any]] = []
    if seconds.get("update_actor"):
        spent = seconds["update_actor"]
        mfu = factor * flops / spent / ranks / PEAK
        lines.append({"bench": "update", "metric": "mfu", "value": mfu, "seconds": spent, "tok_s_gpu": tokens / spent / ranks})
    if seconds.get("ref"):
        lines.append({"bench": "scoring", "metric": "mfu", "value": flops / seconds["ref"] / ranks / PEAK, "seconds": seconds["ref"]})
    lines.append({"bench": "memory", "metric": "peak_gb", "value": peak})
    if args.reward_ms:
        whole = len(lengths) / ranks * args.reward_ms / 1000 / args.workers  # seconds, if the workers never had to wait
        lines.append({"bench": "tail", "metric": "share", "value": seconds["reward"] / whole, "reward_ms": args.reward_ms, "workers": args.workers})
    scalar = scoring_flops(shape, lengths + before, 0 * lengths)
    sampled = rollout_flops(
        model_shape(shape.config()), np.arange(len(prompts)).repeat(len(lengths) // len(prompts)), np.full_like(lengths, before), lengths
    )
    work = {"gen": sampled, "ref": flops, "old_log_prob": flops, "values": scalar, "update_actor": factor * flops, "update_critic": factor * scalar}
    bounds = {name: operations / CHIPS[chip][1] / ranks for name, operations in work.items() if seconds.get(name)}
    if not args.only:
        bounds["gen"] = rollout_bound(shape, [p.input_ids for p in prompts], lengths.tolist(), chip) / ranks
        bound = sum(value for name, value in bounds.items() if name != "old_log_prob")  # which one update of all rows would not need
        lines.append({"bench": "step", "metric": "share_of_bound", "value": bound / seconds["step"], "bound": bound})
        lines.append({"bench": "step", "metric": "seconds", "value": seconds["step"]})
        lines.append({"bench": "step", "metric": "tok_s_gpu", "value": tokens / seconds["step"] / ranks})
    for name, spent in seconds.items():
        if name == "after_gen" or (name == "gen" and args.only):
            continue
        line = {"bench": "phase", "phase": name, "seconds": spent, "peak_gb": peak if name == "step" else meter.peaks.get(name, 0.0) / 1e9}
        if name in meter.taken:
            line["device_gb"] = meter.taken[name] / 1e9
        if name in bounds:
            line |= {"tok_s_gpu": tokens / spent / ranks, "mfu": work[name] / spent / ranks / PEAK, "share_of_bound": bounds[name] / spent}
        elif name == "step" and not args.only:
            operations = sum(work[phase] for phase in bounds)
            line |= {"tok_s_gpu": tokens / spent / ranks, "mfu": operations / spent / ranks / PEAK, "share_of_bound": bound / spent}
        lines.append(line | ({"busy_share": busy[name]} if name in busy else {}))
    for line in lines:
        print(json.dumps({k: short(v) if isinstance(v, float) else v for k, v in (line | common).items()}), flush=True)


def short(value: float) -> float:
    return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--algorithm", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--workload", choices=WORKLOADS, default="A")
    parser.add_argument("--times", type=float, default=1, help="so many times the workload's prompts")
    parser.add_argument("--reward_ms", type=float, default=0, help="a reward that waits so long for each sample, while decoding")
    parser.add_argument("--workers", type=int, default=8, help="of that reward")
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps per rollout; with more than one old logprobs are needed")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--zero_set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of zero_optimization")
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapters, on all linear layers")
    parser.add_argument("--no_reference", action="store_true")
    parser.add_argument("--checkpointing", nargs="?", const="true", default="false", choices=("false", "true", "mlp"), help="gradient checkpointing")
    parser.add_argument("--offload", action="store_true", help="master weights, moments and the reference on the host while unused")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=(*PIECES, "lending"),
        help="what each brings: rows without padding, logits in chunks, fused kernels, ZeRO-3 gathering by layers, forwards scored together; and on "
        "several ranks the actor computing on the rollout's weights",
    )
    parser.add_argument(
        "--in_turn", choices=("on", "off"), help="several runs: with none of these, each added to those before; or with all, each left out"
    )
    parser.add_argument("--compile", action="store_true", help="compile=true of every role: compiled layers instead of fused kernels")
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens of a forward")
    parser.add_argument("--max_batch", type=int, default=2048, help="of the rollout")
    parser.add_argument("--cache_tokens", type=int, default=0)
    parser.add_argument("--only", choices=("update",), help="no rollout: random tokens of the workload's lengths")
    parser.add_argument("--case", help="name in the lines that are printed; default: workload, shape and what is out of the ordinary")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="one more step under the profiler; its longest kernels")
    parser.add_argument("--local_rank", type=int, default=0, help="given by launchers")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
