"""scripts/generate.py: the same lines on one rank and on two, transformers' greedy tokens, and what it says of mistakes before weights are read."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.distributed import World
from scripts import generate
from tests.e2e.programs import BIN, ROOT, environment, free_port
from tests.helpers import run_ranks, tiny_tokenizer, write_jsonl


def prompt_rows(count: int = 9) -> list[dict[str, Any]]:
    return [{"prompt": " ".join(f"w{4 + (7 * i + j) % 40}" for j in range(1 + 5 * i % 7)), "answer": str(i)} for i in range(count)]


def call(_: World, arguments: list[str], at_once: int) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the program on this rank."""
    generate.ROWS_AT_ONCE = at_once
    out, said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = generate.main([*arguments, "--threads", "1"])
    out.seek(0)
    return code, out.read(), said.getvalue()


def lines_of(folder: Path, prompts: Path, *options: str, ranks: int = 1, at_once: int = 8192) -> str:
    """What rank 0 writes to stdout."""
    found = run_ranks(call, ranks, ["--model", str(folder), "--prompts", str(prompts), *options], at_once)
    assert all(code == 0 for code, _, _ in found), found
    assert [out for _, out, _ in found[1:]] == [""] * (ranks - 1)
    return str(found[0][1])


def rows_of(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(*arguments, **options).splitlines()]


# ---- what is written


def test_one_rank_as_users_start_it(models: Path, tmp_path: Path) -> None:
    """Lines in the order of the prompts, with the row's columns; stdout stays free, the log is plain, nothing else is left in the folder."""
    rows = prompt_rows(5)
    rows[2] |= {"completion": "w4 \ud800", "data_source": "other", "when": {"year": 2024}}
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    arguments = ["--prompts", "prompts.jsonl", "--out", "new/out.jsonl", "--samples", "2", "--max_new_tokens", "6", "--local_rank", "0"]
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--model", str(models / "llama"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert said[0] == "prompts: 5 rows" and said[1].startswith("10/10 responses") and said[-1] == "new/out.jsonl: written"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    found = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["answer"], row["prompt_index"], row["sample"]) for row in found] == [
        (row["prompt"], row["answer"], i, sample) for i, row in enumerate(rows) for sample in range(2)
    ]
    for row in found:
        words = row["completion"].split()
        assert row["finished"] in ("eos", "length")
        assert row["tokens"] == len(words) + (row["finished"] == "eos")
        assert row["finished"] == "eos" or row["tokens"] == 6
        assert -6 < row["mean_logprob"] < 0
        assert row["source"] == ("other" if row["answer"] == "2" else "prompts")
    assert (found[4]["row_completion"], found[4]["when"]) == ("w4 \ud800", {"year": 2024})
    assert found[0]["completion"] != found[1]["completion"]


def test_two_ranks_write_what_one_does(models: Path, tmp_path: Path) -> None:
    """Byte for byte, also in several calls of the engine, with few slots and with a small cache."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows())
    options = ["--samples", "3", "--max_new_tokens", "12", "--top_k", "20", "--repetition_penalty", "1.1", "--min_new_tokens", "2", "--seed", "4"]
    one = lines_of(models / "llama", prompts, *options)
    assert len(one.splitlines()) == 27
    assert lines_of(models / "llama", prompts, *options, ranks=2) == one
    assert lines_of(models / "llama", prompts, *options, "--max_batch", "4", "--cache_tokens", "320", ranks=2, at_once=7) == one
    assert lines_of(models / "llama", prompts, *options[:-1], "5") != one


def test_a_rank_without_prompts(models: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(1))
    options = ["--max_new_tokens", "8"]
    assert lines_of(models / "llama", prompts, *options, ranks=2) == lines_of(models / "llama", prompts, *options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_is_transformers_greedy(models: Path, tmp_path: Path, name: str) -> None:
    """From a text file, one prompt a line."""
    texts = [row["prompt"] for row in prompt_rows(4)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\r\n".join(texts))
    found = rows_of(models / name, prompts, "--temperature", "0", "--max_new_tokens", "10")
    assert [(row["prompt"], row["source"]) for row in found] == [(text, "prompts") for text in texts]
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(models / name).eval()
    for row in found:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        output = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=3, pad_token_id=3)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        assert row["tokens"] == len(output)
        logits = model(torch.cat([ids[0], output])[None]).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, output[:, None]).mean()
        assert row["mean_logprob"] == pytest.approx(expected.item(), abs=2e-4)


def test_stop_texts(models: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows())
    options = ["--max_new_tokens", "12", "--seed", "1"]
    free = rows_of(models / "llama", prompts, *options)
    stop = [" ".join(free[0]["completion"].split()[2:4]), free[1]["completion"].split()[5]]
    ended = rows_of(models / "llama", prompts, *options, "--stop", *stop, ranks=2)
    assert [row["finished"] for row in ended[:2]] == ["stop", "stop"]
    for before, after in zip(free, ended, strict=True):
        words, cut = before["completion"].split(), after["completion"].split()
        first = next((n for n in range(1, len(words) + 1) if any(text in " ".join(words[:n]) for text in stop)), None)
        assert cut == words[:first]
        if first is None:
            assert after == before
        else:
            assert after["finished"] == "stop" and after["tokens"] >= first  # <unk> is a token too, but not shown


def test_an_end_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "{}"
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    with pytest.raises(KeyboardInterrupt):
        generate.write(broken(), out)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.jsonl", "old\n")]


def test_the_bar_counts_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: responses that have ended here and elsewhere, and their rate."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    store = torch.distributed.HashStore()
    here, there = (World(rank, 2, rank, 2, torch.device("cpu"), store) for rank in range(2))
    other = generate.Progress(there, 5)
    for row in range(3):
        other.on_finished(row, [7] * 4)
    other._tell()
    progress = generate.Progress(here, 5)
    progress.on_finished(3, [7] * 6)
    assert progress._everywhere() == (4, 18)
    progress._show(4, 18)
    progress._bar.refresh()
    other.close(20)
    progress.close(20)
    assert "4/5 responses" in screen.getvalue() and "5/5 responses" in screen.getvalue() and "tokens/s" in screen.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers(models: Path, tmp_path: Path, launcher: str) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows())
    ranks = {"deepspeed": ["--num_accelerators", "2", "--master_port"], "torchrun": ["--nproc_per_node", "2", "--master_port"]}[launcher]
    command = [str(BIN / launcher), *ranks, str(free_port()), str(ROOT / "scripts" / "generate.py")]
    arguments = ["--model", str(models / "llama"), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--max_new_tokens", "8"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_text() == lines_of(models / "llama", prompts, "--max_new_tokens", "8")


# ---- what is refused, before weights are read: those of this folder cannot be


@pytest.fixture(scope="module")
def unreadable(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unreadable") / "model"
    shutil.copytree(models / "llama", folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    return folder


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--model": "absent"}, ["--model=", "absent: no such model folder"]),
        ({"--prompts": "absent.jsonl"}, ["--prompts=", "absent.jsonl: no such file"]),
        ({"--prompts": "good.jsonll"}, ["good.jsonll: no such file; did you mean", "good.jsonl?"]),
        (
            {"--prompts": "bad.jsonl"},
            ["3 bad rows", "--on_bad_row skip", "bad.jsonl:2: not valid JSON", "bad.jsonl:3: `prompt` is missing", "--prompt_key"],
        ),
        ({"--prompts": "bad.txt"}, ["2 bad rows", "bad.txt:2: `prompt` is empty", "bad.txt:3: `prompt` holds bytes"]),
        ({"--prompts": "bad.jsonl", "--on_bad_row": "skip"}, ["prompt 2 ('w5 w5", "has 140 tokens", "--max_new_tokens 8", "128 positions"]),
        ({"--max_new_tokens": "200"}, ["has 1 tokens; with --max_new_tokens 200 that is more than the model's 128 positions"]),
        ({"--max_new_tokens": "0"}, ["--max_new_tokens 0: must be 1 or more"]),
        ({"--min_new_tokens": "9"}, ["--min_new_tokens 9: must be from 0 to --max_new_tokens (8)"]),
        ({"--temperature": "-1"}, ["--temperature -1.0: must be 0 (greedy) or more"]),
        ({"--temperature": "nan"}, ["--temperature nan: "]),
        ({"--top_p": "0"}, ["--top_p 0.0: must be more than 0"]),
        ({"--stop": ""}, ["--stop", "must be texts that are not empty"]),
        ({"--samples": "0"}, ["--samples 0: must be 1 or more"]),
        ({"--system": "Be brief."}, ["--system needs conversations", "set --chat to wrap"]),
        ({"--out": "."}, ["--out", "is a folder"]),
    ],
)
def test_mistakes(
    unreadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict[str, str], parts: list[str]
) -> None:
    """Exit code 2 and one message, in words of this program."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"prompt": "w5"}\n')
    Path("bad.jsonl").write_text(f'{{"prompt": "w5"}}\nw5\n{{"text": "w5"}}\n\n{json.dumps({"prompt": "w5 " * 140})}\n')
    Path("bad.txt").write_bytes(b"w5\n\nw5\xff\n")
    given = {"--model": str(unreadable), "--prompts": "good.jsonl", "--max_new_tokens": "8", "--out": "out.jsonl"} | change
    assert generate.main([part for pair in given.items() for part in pair]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("error: ") == 1
    for part in parts:
        assert part in said
    assert "data." not in said and not Path("out.jsonl").exists()
