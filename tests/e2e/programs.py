"""What the end-to-end tests start: tiny models and data made on the spot, and the program in processes of its own, through real launchers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LETTERS = "abcdefghijklmnopqrstuvwxyz>"
EOS = 1

# --------------------------------------------------------------------------------------------------------------------------
# Models and data


def make_tokenizer() -> Any:
    """One token per character; 0 = <pad>, 1 = <eos>, 2 = a, ..."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(folder: Path, *, seed: int = 0, tied: bool = True, eos_by_prompt: bool = False) -> Path:
    """A random Llama of two layers as a model folder.

    eos_by_prompt: after `x` the next token is always the end, after any other letter it never is.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size = len(LETTERS) + 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied and not eos_by_prompt,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if eos_by_prompt:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(-10.0)
            model.model.embed_tokens.weight[2 + LETTERS.index("x")] = 10.0
            model.lm_head.weight[EOS] = 1.0  # the normalised hidden state is all +1 after x, all -1 otherwise: logit +64 or -64
            model.lm_head.weight[2 + LETTERS.index("x")] = 0.5  # so x is never sampled: -32, or +32 beside the end's +64
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0, letters: str = "abcdefgh") -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choice(letters) for _ in range(generator.randint(2, 3))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def reversal_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{w}>", "response": w[::-1], "answer": w[::-1]} for w in words(count, seed)]


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The reversed word is preferred to the copied one."""
    return [{"prompt": f"{w}>", "chosen": w[::-1], "rejected": w} for w in words(2 * count, seed) if w != w[::-1]][:count]


# --------------------------------------------------------------------------------------------------------------------------
# Running


@dataclass
class Outcome:
    code: int
    out: str  # stdout and stderr together
    seconds: float


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command(launcher: str, arguments: list[str], ranks: int = 2) -> list[str]:
    """python: one rank; the others: two ranks on CPU, or so many GPUs."""
    port = str(free_port())
    prefix = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        # accelerate's --cpu starts one process only (more through mpirun); its --multi_gpu is what starts several, GPUs or not.
        "accelerate": [
            *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port),
        ],
    }[launcher]
    return [*prefix, str(ROOT / "train_rlhf.py"), *arguments]


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_")) and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **extra}


# ds_configs/zero3.json, which keeps whole what has up to 100,000 elements: all there is of the models here.
SHARDED: dict[str, Any] = json.loads((ROOT / "ds_configs/zero3.json").read_text())
SHARDED["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False))
    return path


_LOOPBACK_ONLY = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:  # ip link set lo up
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def without_network() -> list[str]:
    """What a command is put behind to run where there is no network but loopback. Skips the test where the system does not allow that."""
    before = ["unshare", "--net" if os.getuid() == 0 else "--map-root-user", "--net", sys.executable, "-c", _LOOPBACK_ONLY]
    try:
        subprocess.run([*before, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no network namespaces here: {error}: {getattr(error, 'stderr', b'').decode()}")
    return before


class Program:
    """`train_rlhf.py` under a launcher; all its processes end with it. before: a command that runs it."""

    def __init__(
        self, recipe: Path, *arguments: str, launcher: str = "deepspeed", env: dict[str, str] | None = None, before: Sequence[str] = ()
    ) -> None:
        self.log = recipe.with_name(f"{recipe.stem}-{launcher}-{time.monotonic_ns()}.log")
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*before, *command(launcher, ["--config", str(recipe), *arguments])],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(**(env or {})),
                cwd=recipe.parent,
            )

    def kill(self) -> None:
        """SIGKILL to the launcher and everything that it started."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:  # stopped first, so that no parent starts or cleans up anything meanwhile
            _signal(member, signal.SIGSTOP)
        for member in family:
            _signal(member, signal.SIGKILL)
        self.process.wait(30)
        psutil.wait_procs(family, 30)

    def wait(self, timeout: float = 110) -> Outcome:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log.read_text()[-4000:]}") from None
        return Outcome(code, self.log.read_text(), time.monotonic() - self.started)

    def wait_for(self, path: Path, timeout: float = 110) -> None:
        """Until `path` exists."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None and time.monotonic() < end, f"{path} never appeared:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.002)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def run(recipe: Path, *arguments: str, timeout: float = 110, **options: Any) -> Outcome:
    return Program(recipe, *arguments, **options).wait(timeout)


def succeed(recipe: Path, *arguments: str, **options: Any) -> Outcome:
    outcome = run(recipe, *arguments, **options)
    assert outcome.code == 0, outcome.out[-6000:]
    return outcome


# --------------------------------------------------------------------------------------------------------------------------
# Reading what a run left


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in metrics(run_dir)]


def samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples" / f"training-{step:06d}.jsonl").read_text().splitlines()]


def sample_files(run_dir: Path, after: int = 0) -> dict[str, bytes]:
    """Training samples of all steps beyond `after`, byte for byte."""
    files = sorted((run_dir / "samples").glob("training-*.jsonl"))
    return {f.name: f.read_bytes() for f in files if int(f.stem.split("-")[1]) > after}


def checkpoints(run_dir: Path) -> list[int]:
    names = [re.fullmatch(r"checkpoint-(\d+)", p.name) for p in (run_dir / "checkpoints").iterdir()]
    return sorted(int(m[1]) for m in names if m)


def weight_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every exported tensor file (hf, adapter)."""
    files = sorted(checkpoint.glob("*/*.safetensors"))
    return {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.parent.name in ("hf", "adapter")}


def engine_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file with master weights, moments and step counts, of all trained models and ranks."""
    files = sorted(checkpoint.glob("*/rank-*-*.safetensors"))
    assert files, checkpoint
    return {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
