"""The one entry: `deepspeed train_rlhf.py --config recipe.yaml [key.sub=value ...]`.

Also started by torchrun, accelerate launch, srun, or plain python (one rank).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rlhf import secrets
from rlhf.config import ROOT, Config, load_config, own_names, read_deepspeed
from rlhf.requests import Requests, resumes, tell


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RLHF in one DeepSpeed program.", epilog="docs/configuration.md lists every key.")
    parser.add_argument("--config", required=True, help="recipe, a YAML file; examples in scripts/recipes/")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="auto: the run folder's newest checkpoint, if there is one")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config, batch arithmetic and placement, then stop")
    parser.add_argument("--max_time", type=seconds, metavar="[[D-]H:]M[:S]", help="save and leave with exit code 75 before so much time is over")
    parser.add_argument("--local_rank", type=int, default=None, help="set by some launchers")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the recipe")
    return parser.parse_intermixed_args(arguments)  # overrides may stand between and after options


def seconds(text: str) -> float:
    """Of "90" (minutes), "1:30:00" or "1-12:00", as Slurm writes times. ValueError for anything else."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) > 3 or (dash and not days.isdigit()):
        raise ValueError(text)
    if days:  # hours come first then
        h, m, s = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        h, m, s = parts
    else:
        h, (m, s) = 0, [*parts, 0][:2]
    return float(((int(days or 0) * 24 + h) * 60 + m) * 60 + s)


def fit(config: Config, resume: str, asked: Requests) -> None:
    """Join the other ranks, train, leave. Heavy imports happen here, after the recipe has been checked."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from rlhf.distributed import init_world, launch_environment
    from rlhf.engine import deterministic_kernels, seed_everything
    from rlhf.preflight import check, check_data
    from rlhf.trainers.reward_model import train_reward_model
    from rlhf.trainers.rl import train_rl
    from rlhf.trainers.sft import train_sft

    on_gpu = torch.cuda.is_available()
    check(config, launch_environment()[1], on_gpu)
    check_data(config)
    deterministic = config.deterministic if config.deterministic is not None else not on_gpu
    train = {"sft": train_sft, "reward_model": train_reward_model, "rl": train_rl}[config.task]
    with deterministic_kernels(deterministic):
        world = init_world(config.threads, folder=config.run_dir, stall=60 * config.train.stall_minutes, requests=asked)
        seed_everything(config.seed, world.rank)
        with ExitStack() as cleanup:
            try:
                train(config, world, resumes(resume, config.run_dir), cleanup)
            except SystemExit:  # all ranks leave together; after any other error they do not
                world.close()
                raise
        world.close()


def refuse(error: ValueError) -> int:
    """A user's mistake as one message instead of a traceback per rank. What a library raises is no message for users: it goes on."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if not any(raised_in.is_relative_to(ROOT / part) for part in ("rlhf", "scripts")):
        raise error
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(5)  # rank 0 mostly finds the same mistake, and its exit lets the launcher end this rank
    tell(2)
    sys.stdout.flush()
    print(f"error{f' (rank {rank})' if rank else ''}: {secrets.scrub(str(error))}", file=sys.stderr, flush=True)
    return 2


class Scrubbing(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return secrets.scrub(super().format(record))


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the place of `sys.excepthook`."""
    print(secrets.scrub("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    handler = logging.StreamHandler()
    handler.setFormatter(Scrubbing("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = print_error
    threading.excepthook = lambda hook: print_error(hook.exc_type, hook.exc_value or hook.exc_type(), hook.exc_traceback)
    try:
        config = load_config(arguments.config, arguments.overrides)
        for tree in (config.model_dump(mode="json"), read_deepspeed(config.deepspeed)[0]):
            secrets.known.update(value for value in secrets.secrets_in(tree, own_names()) if isinstance(value, str))
        if arguments.dry_run:
            from rlhf.preflight import describe

            if os.environ.get("RANK", "0") == "0":
                print(describe(config))
            return 0
        with Requests(config.run_dir, arguments.max_time) as asked:
            fit(config, arguments.resume, asked)
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    if "PYTHONHASHSEED" not in os.environ:  # the order of a set of words must be the same on every rank and after a resume (data, reward functions)
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
