"""Times the hybrid engine against transformers' own `generate` on CPU, in one process, with the same weights, requests and threads.

    python scripts/bench_rollout_cpu.py --model models/smollm2-135m-instruct --longest 256
    python scripts/bench_rollout_cpu.py --model models/smollm2-135m-instruct --longest 256 --profile

32 prompts with one response each, prompts and response lengths as in scripts/workloads.py, fp32, temperature 1. transformers gets one left-padded
batch with its attention mask (sdpa) and hears of each row's end as of an end token: the row is padded from there on, and decoding lasts until the
longest row is done. The engine is told only the longest length for every request and keeps logprobs besides, which transformers is spared.
One JSON line per run; the last one has the ratio of the medians. Run it on idle cores: OpenMP's threads wait for each other by spinning, so that a
second program on the same cores makes two threads several times slower than one. `busy` is CPU seconds per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rlhf.models.loading import load_tokenizer
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Sampling
from scripts.workloads import rollout_requests

FIRST_WORD = 10  # ids below are special tokens


class EndsAt(StoppingCriteria):
    """Row i is done after `lengths[i]` new tokens. The attribute makes `generate` pad rows that are done, as it does after an end token."""

    def __init__(self, prompt: int, lengths: list[int], pad: int):
        self.prompt, self.lengths, self.eos_token_id = prompt, torch.tensor(lengths), torch.tensor([pad])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt >= self.lengths


def with_transformers(folder: Path, ids: list[list[int]], pad: int) -> Callable[[list[int]], list[int]]:
    """lengths -> tokens that each row got."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True).eval()
    width = max(map(len, ids))
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])

    def run(lengths: list[int]) -> list[int]:
        # None for the end token: a row ends where its length says, as in the engine.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), pad_token_id=pad, eos_token_id=None
        )
        with torch.no_grad():
            found = model.generate(inputs, attention_mask=mask, stopping_criteria=StoppingCriteriaList([EndsAt(width, lengths, pad)]))
        assert found.shape == (len(ids), width + max(lengths))
        for row, length in zip(found, lengths, strict=True):  # whatever comes after a row's end is padding
            assert bool((row[width + length :] == pad).all())
        return lengths

    return run


def with_engine(folder: Path, ids: list[list[int]], settings: EngineSettings, longest: int) -> Callable[[list[int]], list[int]]:
    """lengths -> tokens that each row got."""
    engine = HybridEngine.from_folder(folder, settings, torch.device("cpu"), torch.float32, load_tokenizer(folder))
    sampling, prompts = Sampling(longest), [Prompt(row, "", "bench") for row in ids]
    engine.prepare(max(map(len, ids)) + longest, len(ids), longest, sampling, forced=True)

    def run(lengths: list[int]) -> list[int]:
        rollout = engine.generate(prompts, list(range(len(ids))), 1, sampling, forced=lengths)
        assert bool(rollout.finished.all())
        return rollout.response_lengths.tolist()

    return run


def profiled(run: Callable[[list[int]], list[int]], lengths: list[int], rows: int) -> None:
    """Where the engine's time goes: operators of torch by their own time, then functions of Python by theirs."""
    import cProfile
    import pstats

    from torch.profiler import ProfilerActivity, profile

    short = [min(n, 64) for n in lengths]
    with profile(activities=[ProfilerActivity.CPU]) as operators:
        run(short)
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50), flush=True)
    functions = cProfile.Profile()
    functions.runcall(run, lengths)
    pstats.Stats(functions).sort_stats("tottime").print_stats(rows)


def report(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, e.g. what scripts/smollm2.py makes")
    parser.add_argument("--longest", type=int, default=1024, help="longest response")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1, help="timed runs of each, after a short one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["transformers", "engine"])
    parser.add_argument("--profile", action="store_true", help="profile the engine instead of timing both")
    parser.add_argument("--rows", type=int, default=25, help="rows of the profile")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"--model {arguments.model}: no such model folder; scripts/smollm2.py makes one")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    tokenizer = load_tokenizer(arguments.model)
    words = len(tokenizer) - FIRST_WORD
    ids, lengths = rollout_requests(arguments.requests, 1, longest=arguments.longest)
    ids = [[FIRST_WORD + token % words for token in row] for row in ids]
    programs: dict[str, Callable[[list[int]], list[int]]] = {}
    if arguments.only != "engine" and not arguments.profile:
        programs["transformers"] = with_transformers(arguments.model, ids, int(tokenizer.pad_token_id))
    if arguments.only != "transformers":
        programs["engine"] = with_engine(arguments.model, ids, EngineSettings(max_batch=arguments.requests), arguments.longest)
    if arguments.profile:
        profiled(programs["engine"], lengths, arguments.rows)
        return

    rates: dict[str, list[float]] = {name: [] for name in programs}
    for run in range(arguments.runs + 1):
        for name, program in programs.items():
            wanted = lengths if run else [2] * len(lengths)
            started, worked = time.perf_counter(), time.process_time()
            assert program(wanted) == wanted
            seconds, cpu, tokens = time.perf_counter() - started, time.process_time() - worked, sum(wanted)
            if run:
                rates[name].append(tokens / seconds)
                report(
                    bench="rollout_cpu", case=name, run=run, requests=len(ids), longest=max(lengths), prompt_tokens=sum(map(len, ids)), tokens=tokens,
                    seconds=round(seconds, 2), tok_s=round(tokens / seconds, 1), threads=arguments.threads, busy=round(cpu / seconds, 2),
                )  # fmt: skip
    if len(programs) == 2:
        ratio = statistics.median(rates["engine"]) / statistics.median(rates["transformers"])
        report(bench="rollout_cpu", metric="ratio", value=round(ratio, 3), runs=arguments.runs, longest=max(lengths), threads=arguments.threads)


if __name__ == "__main__":
    main()
