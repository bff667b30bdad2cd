"""Tiny models, hand-made rollouts, and ranks forked out of the test process."""

from __future__ import annotations

import copy
import faulthandler
import functools
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf.config import Config, parse_config
from rlhf.distributed import World, init_world
from rlhf.engine import TrainEngine
from rlhf.files import write_tensors
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.rollout.loop import Outputs, draw_tokens
from rlhf.types import Prompt, Rollout, Sampling, Scores

VOCABULARY = 50
CPU_Accelerator.device_count = functools.cache(CPU_Accelerator.device_count)  # without its launcher: a process that counts, at every reduction
SGD: dict[str, Any] = {"optimizer": {"type": "SGD", "params": {}}, "zero_allow_untested_optimizer": True}  # at the rate of the recipe

# --------------------------------------------------------------------------------------------------------------------------
# Models

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "eos_token_id": 3, "bos_token_id": 1}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama_untied": LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=3,
        attn_pdrop=0.1,  # as the published gpt2 has it (trap 2)
        embd_pdrop=0.1,
        resid_pdrop=0.1,
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: "w7" is 7; id 3 is the end, and the padding too (trap 3)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    words["<unk>"], words["<end>"] = words.pop("w0"), words.pop("w3")
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def build_models(folder: Path) -> None:
    """One folder per architecture, `reference` (llama, other weights) and `scalar` (llama body with a random scalar head)."""
    for number, (name, architecture) in enumerate([*ARCHITECTURES.items(), ("reference", ARCHITECTURES["llama"])]):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(architecture))
        with torch.no_grad():  # biases and norms that start at 0 and 1 would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    torch.manual_seed(99)
    scalar_config = copy.deepcopy(ARCHITECTURES["llama"])
    scalar_config.num_labels, scalar_config.pad_token_id = 1, 3
    scalar = AutoModelForSequenceClassification.from_config(scalar_config)
    scalar.save_pretrained(folder / "scalar")
    tiny_tokenizer().save_pretrained(folder / "scalar")


# --------------------------------------------------------------------------------------------------------------------------
# Configs and data


def deepspeed_block(stage: int, sgd: bool = True, whole: int = 0) -> dict[str, Any]:
    """Settings under which even the smallest parameter is sharded at stage 3, or what has more than so many elements."""
    zero: dict[str, Any] = {"stage": stage} | ({"stage3_param_persistence_threshold": whole} if stage == 3 else {})
    return {"zero_optimization": zero, **(copy.deepcopy(SGD) if sgd else {})}


def rl_config(models: Path, stage: int = 0, sgd: bool = True, **sections: Any) -> Config:
    """A PPO recipe over the tiny models (SGD with learning rate 1, no clip); `sections` are merged in."""
    tree: dict[str, Any] = {
        "task": "rl",
        "run_dir": models.parent / "run",
        "threads": 1,
        "deepspeed": deepspeed_block(stage, sgd),
        "actor": {"path": models / "llama", "dtype": "float32", "learning_rate": 1.0, "max_grad_norm": 0},
        "critic": {"dtype": "float32", "learning_rate": 1.0, "max_grad_norm": 0},
        "reference": {"dtype": "float32"},
        "reward": {"components": [{"function": "exact_match"}]},
        "data": {"train": [{"path": "none.jsonl"}]},
        "train": {"steps": 1, "micro_batch": 8},
        "tracking": {"console": "plain"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(tree)


def make_rollout(prompt_lengths: list[int], response_lengths: list[int], window: int, group_size: int = 1, cut: tuple[int, ...] = ()) -> Rollout:
    """Random token ids; rows ended by an EOS (3) except those in `cut`. Row i belongs to draw i // group_size, as its prompt's length must."""
    generator = torch.Generator().manual_seed(5)
    p, n = torch.tensor(prompt_lengths), torch.tensor(response_lengths)
    ids = torch.full((len(p), int((p + n).max())), 3)
    prompts: list[Prompt] = []
    for row, (a, b) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        ids[row, : a + b] = torch.randint(4, VOCABULARY, (a + b,), generator=generator)
        if row % group_size:
            ids[row, :a] = ids[row - row % group_size, :a]
        if row not in cut:
            ids[row, a + b - 1] = 3
        prompts.append(Prompt(ids[row, :a].tolist(), "", "test"))
    rows = torch.arange(len(p))
    finished = torch.tensor([row not in cut for row in range(len(p))])
    return Rollout(prompts, rows // group_size, rows % group_size, ids, p, n, finished, torch.zeros(len(p), window))


def make_scores(total: list[float], invalid: tuple[int, ...] = ()) -> Scores:
    valid = torch.tensor([row not in invalid for row in range(len(total))])
    return Scores(torch.where(valid, torch.tensor(total), torch.zeros(len(total))), valid, {}, {})


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def single_world() -> World:
    """A world of one rank, without a process group."""
    return World(0, 1, 0, 1, torch.device("cpu"))


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[n].double() - b[n].double()).flatten() for n in b])
    return float(difference.norm() / torch.cat([t.double().flatten() for t in b.values()]).norm())


# --------------------------------------------------------------------------------------------------------------------------
# Rollouts


def rollout_engine(
    model: Any,
    eos: Sequence[int] = (3, 17),
    beat: Callable[[], None] = lambda: None,
    decode_text: Callable[[list[int]], str] | None = None,
    **settings: Any,
) -> HybridEngine:
    """A rollout engine that holds `model`'s weights, in their type and on their device."""
    engine = HybridEngine(model.config, list(eos), 3, EngineSettings(**settings), model.device, model.dtype, beat=beat, decode_text=decode_text)
    engine.load_weights(model.named_parameters())
    return engine


def draw(
    logits: Tensor, sampling: Sampling, keys: Tensor, numbers: Tensor, seen: Tensor | None = None, eos: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(token [B], logprob [B]) from logits [B, V], as the decode loop draws response token `numbers` [B]. seen: [B, V] bool, under the penalty."""
    sampling = replace(sampling, entropy=False)
    out = Outputs.empty(len(keys), 1, logits.shape[-1], logits.device, False, False, sampling.repetition_penalty != 1.0)
    if out.seen is not None and seen is not None:
        out.seen[: len(keys)] = seen
    least = torch.full_like(numbers, sampling.min_new_tokens)
    ends = torch.tensor(eos, dtype=torch.int64, device=logits.device)
    out.forbid(sampling, ends, logits.shape[-1])
    return draw_tokens(logits, sampling, torch.arange(len(keys), device=logits.device), keys, numbers, least, ends, out)


# --------------------------------------------------------------------------------------------------------------------------
# Ranks


def _rank_main(rank: int, size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.setpgid(0, 0)
    code = 0
    faulthandler.enable(open(f"{folder}/crash-{rank}", "w"))  # noqa: SIM115  as long as the process lives
    try:
        world = init_world(1, init_method=f"file://{folder}/store")
        torch.save(fn(world, *args), f"{folder}/result-{rank}")
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(traceback.format_exc())
        code = 1
    # Without the interpreter's goodbyes: a rank whose peer has died would wait in them.
    os._exit(code)


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 90) -> list[Any]:
    """`fn(world, *args)` on `size` forked ranks; the results in rank order. One rank, too, runs in a process of its own, so that
    DeepSpeed leaves nothing behind in this one.

    Raises AssertionError with the traceback of every rank that failed. All ranks are killed when one has failed and the others have
    not ended within two seconds (they wait for it in a collective), or when the time is up.
    """
    import rlhf.trainers.rl  # noqa: F401  imported once, before the fork

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank_main, args=(rank, size, folder, fn, args), daemon=True) for rank in range(size)]
        for process in ranks:
            process.start()
        deadline, failed_at = time.monotonic() + timeout, 0.0
        while any(p.is_alive() for p in ranks):
            now = time.monotonic()
            if not failed_at and any(p.exitcode for p in ranks):
                failed_at = now
            if now > deadline or (failed_at and now > failed_at + 2):
                break
            time.sleep(0.01)
        late = [rank for rank, p in enumerate(ranks) if p.is_alive()]
        for rank in late:
            pid = ranks[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        reports = [f"rank {path.name.split('-')[1]}:\n{path.read_text()}" for path in sorted(Path(folder).glob("failure-*"))]
        crashed = [r for r, p in enumerate(ranks) if p.exitcode not in (0, 1) and r not in late]
        reports += [f"rank {r} ended with {ranks[r].exitcode}:\n{Path(folder, f'crash-{r}').read_text()}" for r in crashed]
        if late and not failed_at:
            reports.append(f"ranks {late} had not ended after {timeout:.0f} s")
        if reports or late:
            raise AssertionError("\n\n".join(reports) or f"ranks {late} were killed")
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(size)]


def save_state(engine: TrainEngine, folder: Path) -> None:
    """What a checkpoint keeps of an engine, of this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in engine.state_files():
        write_tensors(folder / file.name, file.tensors, file.metadata)


def saved_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """(every tensor of every trained parameter, "KIND/NAME", put together from what all ranks wrote; the scalars beside them) of one engine."""
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            found_here = json.loads(file.metadata()["state"])
            ranges, scalars = found_here["parts"], scalars | found_here["scalars"]
            for key in file.keys():  # noqa: SIM118
                start, count, shapes[key] = ranges[key.split("/", 1)[1]]
                found.setdefault(key, torch.full((math.prod(shapes[key]),), math.nan))[start : start + count] = file.get_tensor(key)
    return {key: tensor.view(shapes[key]) for key, tensor in found.items()}, scalars
