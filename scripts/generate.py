"""Completions of a file of prompts, by the rollout engine of the trainer: one rank or several, CPU or GPU.

    python scripts/generate.py --model models/smollm2-135m-instruct --prompts prompts.jsonl --chat --out completions.jsonl
    deepspeed scripts/generate.py --model DIR --prompts test.parquet --samples 8 --temperature 0.7 --out completions.jsonl

Prompts are rows as the trainer reads them (jsonl, json, csv, parquet: text or a list of {role, content}), or a .txt file with one prompt a line.
One JSON line per response, in the order of the prompts: prompt, completion, source, prompt_index, sample, tokens, finished (eos, stop, length),
mean_logprob (of its tokens, under the distribution that was sampled from), then the row's other columns; a column that has one of these names is
written as row_NAME. The same seed gives the same responses on any number of ranks. The file appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.config import ROOT, DataConfig, ModelConfig, SourceConfig

if TYPE_CHECKING:
    from rlhf.distributed import World
    from rlhf.types import Prompt, Rollout

ROWS_AT_ONCE = 8192  # responses in one call of the engine, over all ranks: their tokens, and with a penalty their words, lie on the device
LOG_EVERY = 10.0  # seconds between lines where there is no terminal
# What the loaders and the engine call it, and what it is called here.
NAMES = {
    "data.on_bad_row=skip": "--on_bad_row skip",
    "data.chat=true": "--chat",
    "data.chat=false": "--no-chat",
    "data.chat is false; remove data.chat": "--no-chat is given; remove it",
    "data.system_prompt and data.examples need": "--system needs",
    "set prompt_key to": "set --prompt_key to",
    "rollout.cache_tokens": "--cache_tokens",
    "rollout.max_new_tokens or data.max_prompt_tokens": "--max_new_tokens",
    "model.path": "--model",
    "data source path": "--prompts",
    ".txt.jsonl:": ".txt:",
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder (config.json, *.safetensors, tokenizer)")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="jsonl, json, csv, parquet (each as in data.train), or txt")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model folder brings along")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON lines go; default: stdout")
    rows = parser.add_argument_group("prompts")
    rows.add_argument("--prompt_key", default="prompt", help="column of the prompt")
    rows.add_argument("--size", type=int, help="take the first so many rows")
    rows.add_argument("--on_bad_row", choices=["error", "skip"], default="error")
    rows.add_argument("--chat", action=argparse.BooleanOptionalAction, help="wrap plain text in the chat template; default: only conversations are")
    rows.add_argument("--system", metavar="TEXT", help="system message before every conversation")
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    drawing.add_argument("--max_new_tokens", type=int, default=256)
    drawing.add_argument("--min_new_tokens", type=int, default=0)
    drawing.add_argument("--temperature", type=float, default=1.0, help="0 = greedy")
    drawing.add_argument("--top_k", type=int, default=0, help="0 = off")
    drawing.add_argument("--top_p", type=float, default=1.0, help="1 = off")
    drawing.add_argument("--min_p", type=float, default=0.0, help="0 = off")
    drawing.add_argument("--repetition_penalty", type=float, default=1.0, help="over prompt and response; 1 = off")
    drawing.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="a response ends with the token that completes one of these")
    drawing.add_argument("--seed", type=int, default=0)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max_batch", type=int, default=128, help="most responses decoded together on a rank")
    engine.add_argument("--cache_tokens", type=int, default=0, help="tokens that the KV cache of a rank holds; 0 = what max_batch responses need")
    engine.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU, float32 on CPU")
    engine.add_argument("--threads", type=int, help="threads of a rank on CPU; default: an equal share of the cores")
    engine.add_argument("--local_rank", type=int, default=None, help="set by some launchers")
    return parser.parse_args(arguments)


def check_arguments(a: argparse.Namespace) -> None:
    """ValueError that names the argument and what it may be."""
    ranges: list[tuple[str, bool, str]] = [
        ("size", a.size is None or a.size >= 1, "1 or more"),
        ("samples", a.samples >= 1, "1 or more"),
        ("max_new_tokens", a.max_new_tokens >= 1, "1 or more"),
        ("min_new_tokens", 0 <= a.min_new_tokens <= a.max_new_tokens, f"from 0 to --max_new_tokens ({a.max_new_tokens})"),
        ("temperature", a.temperature >= 0 and math.isfinite(a.temperature), "0 (greedy) or more"),
        ("top_k", a.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < a.top_p <= 1, "more than 0 and at most 1 (off)"),
        ("min_p", 0 <= a.min_p <= 1, "from 0 (off) to 1"),
        ("repetition_penalty", a.repetition_penalty > 0 and math.isfinite(a.repetition_penalty), "more than 0; 1 is off"),
        ("stop", all(a.stop), "texts that are not empty"),
        ("max_batch", a.max_batch >= 1, "1 or more"),
        ("cache_tokens", a.cache_tokens >= 0, "0 (as many as are needed) or more"),
        ("threads", a.threads is None or a.threads >= 1, "1 or more"),
    ]
    for name, fine, allowed in ranges:
        if not fine:
            raise ValueError(f"--{name} {getattr(a, name)}: must be {allowed}")
    if a.out is not None and a.out.is_dir():
        raise ValueError(f"--out {a.out}: is a folder; name a file in it")


def read_prompts(a: argparse.Namespace, tokenizer: Any) -> tuple[list[Prompt], str]:
    """(prompts in file order, what to say of the rows). ValueError for bad rows, with file and line."""
    from rlhf.data import load_prompts

    with tempfile.TemporaryDirectory() as scratch:
        path: Path = a.prompts
        if path.suffix.lower() == ".txt" and path.is_file():
            path = Path(scratch) / f"{path.name}.jsonl"
            with path.open("w") as file:  # surrogates stand for bytes that are not UTF-8: the checks blame their line
                file.writelines(json.dumps({"prompt": line}) + "\n" for line in text_lines(a.prompts))
        source = SourceConfig(path=path, prompt_key=a.prompt_key, size=a.size, name=a.prompts.stem if path != a.prompts else None)
        # Nothing is dropped for its length: what does not fit the model is an error here.
        data = DataConfig(train=[source], chat=a.chat, system_prompt=a.system, on_bad_row=a.on_bad_row, max_prompt_tokens=1 << 40)
        prompts, report = load_prompts([source], data, tokenizer)
    return prompts, report.summary()


def text_lines(path: Path) -> list[str]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def check_lengths(prompts: list[Prompt], max_new_tokens: int, positions: int | None) -> int:
    """The most tokens of any prompt with its response. ValueError if they would not fit the model."""
    number, longest = max(enumerate(prompts, 1), key=lambda found: len(found[1].input_ids))
    most = len(longest.input_ids) + max_new_tokens
    if positions and most > positions:
        raise ValueError(
            f"--prompts: prompt {number} ({longest.text[:40]!r}) has {len(longest.input_ids)} tokens; with --max_new_tokens {max_new_tokens} "
            f"that is more than the model's {positions} positions (max_position_embeddings): shorten it, or lower --max_new_tokens"
        )
    return most


class Progress:
    """Responses that have ended on all ranks: a bar on a terminal, else a line now and then, both on stderr of rank 0.

    A thread shows them: `on_finished` only counts, and the bar goes on while rank 0 waits for the others. Ranks tell through the store.
    """

    def __init__(self, world: World, total: int):
        self.world, self.total = world, total
        self.ended = self.tokens = 0
        self._started = self._printed = time.monotonic()
        self._over = threading.Event()
        self._bar: Any = None
        if world.is_main:
            self._bar = self._make_bar()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _make_bar(self) -> Any:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal or console.is_dumb_terminal:
            return None
        columns = ("{task.completed}/{task.total} responses", progress.BarColumn(), "{task.fields[rate]} tokens/s", progress.TimeRemainingColumn())
        bar = progress.Progress(*columns, console=console)
        bar.add_task("", total=self.total, rate="-")
        bar.start()
        return bar

    def on_finished(self, row: int, ids: list[int]) -> None:
        self.tokens += len(ids)
        self.ended += 1

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            if self.world.is_main:
                self._show(*self._everywhere())
            else:
                self._tell()

    def _tell(self) -> None:
        if self.world.store is not None:
            self.world.store.set(f"progress/{self.world.rank}", f"{self.ended} {self.tokens}")

    def _everywhere(self) -> tuple[int, int]:
        ended, tokens, store = self.ended, self.tokens, self.world.store
        for rank in range(1, self.world.size):
            if store is not None and store.check([f"progress/{rank}"]):
                more = store.get(f"progress/{rank}").split()
                ended, tokens = ended + int(more[0]), tokens + int(more[1])
        return ended, tokens

    def _show(self, ended: int, tokens: int) -> None:
        now = time.monotonic()
        rate = f"{tokens / max(now - self._started, 1e-9):,.0f}"
        if self._bar is not None:
            self._bar.update(0, completed=ended, rate=rate)
        elif now - self._printed >= LOG_EVERY or self._over.is_set():
            self._printed = now
            say(f"{ended}/{self.total} responses  {tokens:,} tokens  {rate} tokens/s  {now - self._started:.1f} s")

    def close(self, tokens: int | None = None) -> None:
        """tokens: of all responses, once every rank has ended its own; None where the run has failed."""
        self._over.set()
        self._thread.join()
        if self.world.is_main and tokens is not None:
            self._show(self.total, tokens)
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def generate(a: argparse.Namespace) -> None:
    """Check everything, then join the other ranks, generate, and write on rank 0. Heavy imports happen here: the arguments have been checked."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from rlhf.distributed import init_world
    from rlhf.experience import gather_rollout
    from rlhf.models.loading import load_tokenizer, model_dtype, read_architecture
    from rlhf.rollout import EngineSettings, HybridEngine
    from rlhf.types import Sampling

    model = ModelConfig(path=a.model, dtype=a.dtype, trust_remote_code=a.trust_remote_code)
    architecture = read_architecture(model, "model")
    tokenizer = load_tokenizer(a.model, a.trust_remote_code)
    prompts, summary = read_prompts(a, tokenizer)
    context = check_lengths(prompts, a.max_new_tokens, getattr(architecture.get_text_config(), "max_position_embeddings", None))
    total = len(prompts) * a.samples

    world = init_world(a.threads)
    if world.is_main:
        say(summary)
    settings = EngineSettings(max_batch=min(a.max_batch, total), max_context=context, cache_tokens=a.cache_tokens)
    dtype = model_dtype(model, world.device)
    engine = HybridEngine.from_folder(a.model, settings, world.device, dtype, tokenizer, world.beat, a.trust_remote_code)
    ends = set(engine.eos.tolist())
    sampling = Sampling(
        a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty, a.min_new_tokens, stop=tuple(a.stop), seed=a.seed
    )
    lines: list[str] = []
    tokens = 0
    progress = Progress(world, total)
    try:
        for numbers in batched(len(prompts), max(1, ROWS_AT_ONCE // a.samples)):
            asked = [prompts[i] for i in numbers]
            queue = world.fair_queue(len(asked), a.samples) if world.size > 1 else {}
            local = engine.generate(asked, list(numbers), a.samples, sampling, **queue, on_finished=progress.on_finished)
            world.wait_for_all("generate")
            rollout = gather_rollout(local, dict(zip(numbers, asked, strict=True)), world)  # (collective)
            tokens += int(rollout.response_lengths.sum())
            if world.is_main:
                lines += (json.dumps(row, ensure_ascii=False, default=str) for row in result_rows(rollout, tokenizer, ends))
    except BaseException:
        progress.close()
        raise
    progress.close(tokens)
    if world.is_main:
        write(lines, a.out)
    world.close()


def batched(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(count, start + size))


def result_rows(rollout: Rollout, tokenizer: Any, ends: set[int]) -> Iterator[dict[str, Any]]:
    for i, prompt in enumerate(rollout.prompts):
        ids = rollout.response_ids(i)
        row = {
            "prompt": prompt.text,
            "completion": tokenizer.decode(ids, skip_special_tokens=True),
            "source": prompt.source,
            "prompt_index": int(rollout.draw[i]),
            "sample": int(rollout.sample[i]),
            "tokens": len(ids),
            "finished": "length" if not rollout.finished[i] else "eos" if ids[-1] in ends else "stop",
            # Sums of float32 depend a little on what else is in the batch: no more digits than are the same everywhere.
            "mean_logprob": round(float(rollout.rollout_logprobs[i, : len(ids)].double().mean()), 4),
        }
        yield row | {f"row_{name}" if name in row else name: value for name, value in prompt.columns.items()}


def write(lines: Iterable[str], path: Path | None) -> None:
    """A reader sees the whole file or none (or the old one)."""
    if path is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.stdout.writelines(line + "\n" for line in lines)
        sys.stdout.flush()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # What UTF-8 cannot hold (a lone surrogate in a column) becomes \udXXX, which is how JSON writes it.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    say(f"{path}: written")


def refuse(error: ValueError) -> int:
    """A user's mistake as one message instead of a traceback per rank. What a library raises is no message for users: it goes on."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if raised_in != Path(__file__).resolve() and not raised_in.is_relative_to(ROOT / "rlhf"):
        raise error
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(5)  # rank 0 mostly finds the same mistake, and its exit lets the launcher end this rank
    text = str(error)
    for theirs, ours in NAMES.items():
        text = text.replace(theirs, ours)
    say(f"error{f' (rank {rank})' if rank else ''}: {text}")
    return 2


def main(arguments: list[str] | None = None) -> int:
    a = parse_arguments(arguments)
    if a.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(a.local_rank))
    try:
        check_arguments(a)
        generate(a)
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
