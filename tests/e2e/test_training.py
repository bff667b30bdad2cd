"""Through the real launcher on two CPU ranks under ZeRO-3: each task learns, and what it leaves behind is what it trained."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import export
from tests.e2e.conftest import Finished
from tests.e2e.programs import checkpoints, metrics, reversal_rows, samples, steps
from tests.e2e.rows import MALFORMED
from tests.helpers import saved_state

pytestmark = pytest.mark.timeout(600)


def rewards(run_dir: Path, numbers: range) -> np.ndarray:
    return np.array([row["reward"] for step in numbers for row in samples(run_dir, step)])


def rise(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(difference of the means, its standard error)."""
    return float(after.mean() - before.mean()), math.sqrt(before.var() / len(before) + after.var() / len(after))


def test_sft_loss_falls(sft: Finished) -> None:
    lines = metrics(sft.run_dir)
    losses = [line["train/loss"] for line in lines]
    held_out = {line["step"]: line["val-core/loss"] for line in lines if "val-core/loss" in line}
    assert steps(sft.run_dir) == list(range(1, 25))
    assert losses[0] > 3.0  # 29 tokens: ln 29 = 3.37 is knowing nothing
    assert max(losses[-3:]) < 0.7 * min(losses[:3])
    assert held_out[8] > held_out[16] > held_out[24]


def test_reward_model_tells_pairs_apart(reward_model: Finished) -> None:
    validations = [line for line in metrics(reward_model.run_dir) if "val-core/pair_accuracy/mean" in line]
    first, last = validations[0], validations[-1]
    for line in validations:
        assert line["val-core/pair_accuracy/low"] <= line["val-core/pair_accuracy/mean"] <= line["val-core/pair_accuracy/high"]
        assert line["val-core/pair_accuracy/n"] == 200
    assert last["step"] == 30
    assert last["val-core/pair_accuracy/low"] > max(0.6, first["val-core/pair_accuracy/high"])


def test_ppo_with_four_models_raises_the_reward(ppo: Finished) -> None:
    difference, error = rise(rewards(ppo.run_dir, range(1, 4)), rewards(ppo.run_dir, range(10, 13)))
    assert difference > max(0.1, 6 * error), (difference, error)
    first = metrics(ppo.run_dir)[1]
    assert first["step"] == 1 and first["actor/kl"] == pytest.approx(0, abs=1e-6)  # the reference is the policy that starts
    assert metrics(ppo.run_dir)[-1]["actor/kl_per_response"] > 0.1
    assert {"reward/letter_a/mean", "reward/reward_model/mean", "critic/vf_loss", "timing_s/ref", "timing_s/values"} <= first.keys()


def test_grpo_with_lora_raises_the_reward(grpo: Finished) -> None:
    difference, error = rise(rewards(grpo.run_dir, range(1, 3)), rewards(grpo.run_dir, range(7, 9)))
    assert difference > max(0.05, 6 * error), (difference, error)


# --------------------------------------------------------------------------------------------------------------------------
# Bad rows and trackers, on the same runs


def test_bad_rows_are_skipped_and_counted(sft: Finished) -> None:
    (summary,) = re.findall(r"^malformed: .*$", sft.outcome.out, re.MULTILINE)
    assert summary.startswith("malformed: 200 rows, ")
    assert sum(map(int, re.findall(r"(\d+) dropped", summary))) == len(MALFORMED)


def test_wandb_offline_writes_its_folder(sft: Finished) -> None:
    (folder,) = (sft.run_dir / "wandb").glob("offline-run-*")
    assert any(f.stat().st_size > 1000 for f in folder.glob("*.wandb"))


def test_unreachable_wandb_does_not_stop_training(reward_model: Finished) -> None:
    assert reward_model.outcome.code == 0
    assert steps(reward_model.run_dir) == list(range(1, 31))
    assert reward_model.outcome.seconds < 90
    assert "0" * 40 not in reward_model.outcome.out


# --------------------------------------------------------------------------------------------------------------------------
# What is left behind


def trained_weights(checkpoint: Path, role: str) -> dict[str, torch.Tensor]:
    """The fp32 master weights, put together from the parts of all ranks."""
    return {key.removeprefix("weight/"): t for key, t in saved_state(checkpoint / role)[0].items() if key.startswith("weight/")}


def test_exported_folder_is_the_trained_model(sft: Finished) -> None:
    """trap 33: from_pretrained gives the weights in DeepSpeed's shards, tied ones included, and the held-out loss that the run reported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = sft.run_dir / "checkpoints" / "checkpoint-24"
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "hf")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    trained = trained_weights(checkpoint, "actor")
    exported = model.state_dict()
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor), name
    assert set(exported) - set(trained) <= {"lm_head.weight"}

    total, tokens = 0.0, 0
    for row in reversal_rows(100, seed=1):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        total -= float(logprobs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).sum())
        tokens += len(ids) - len(prompt)
    assert metrics(sft.run_dir)[-1]["val-core/loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_keep_last_and_the_best_stay(sft: Finished) -> None:
    """By the metric asked for (the largest perplexity) the first checkpoint is the best."""
    assert checkpoints(sft.run_dir) == [8, 24]
    folder = sft.run_dir / "checkpoints"
    assert (folder / "best").resolve().name == "checkpoint-8" and (folder / "latest").resolve().name == "checkpoint-24"
    assert not list(folder.glob(".writing-*"))


def test_adapter_on_the_base_is_the_merged_folder(grpo: Finished, sft: Finished) -> None:
    """trap 14, 33: base + adapter through peft, and the merged folder, give the same logits, and other ones than the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = grpo.run_dir / "checkpoints" / "checkpoint-8"
    ids = torch.randint(2, 28, (4, 12), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model.eval()(ids).logits
        return result

    base = logits(AutoModelForCausalLM.from_pretrained(sft.hf))
    merged = logits(AutoModelForCausalLM.from_pretrained(checkpoint / "hf"))
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sft.hf), checkpoint / "adapter"))
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    assert float((merged - base).abs().max()) > 0.1


def test_reward_model_folder_scores_as_in_ppo(reward_model: Finished, ppo: Finished) -> None:
    """transformers reads the reward model's folder; its scores, centred and scaled by the folder's statistics, are those that PPO got."""
    import json

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model.hf).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model.hf)
    statistics = json.loads((reward_model.hf / "score_statistics.json").read_text())
    compared = 0
    for row in samples(ppo.run_dir, 1):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] * (row["stop_reason"] == "eos")
        if len(ids) != len(row["prompt"]) + row["length"]:
            continue  # a sampled <pad> is not in the text
        with torch.no_grad():
            raw = float(model(torch.tensor([ids])).logits[0, 0])
        expected = max(-2.0, min(2.0, (raw - statistics["mean"]) / statistics["std"]))
        assert row["components"]["reward_model"] == pytest.approx(expected, abs=1e-4)
        compared += 1
    assert compared > 40
    assert statistics["std"] > 0.01


def test_any_checkpoint_can_be_exported(sft: Finished, reward_model: Finished, grpo: Finished, tmp_path: Path) -> None:
    """Bit for bit what the run has written beside it, files that are no tensors included."""
    for finished, written, arguments in [
        (sft, "hf", []),
        (reward_model, "hf", []),
        (grpo, "hf", []),
        (grpo, "adapter", ["--adapter"]),
    ]:
        out = tmp_path / f"{finished.run_dir.name}-{written}"
        assert export.main([str(finished.run_dir / "checkpoints" / "latest"), str(out), *arguments]) == 0
        kept = finished.hf.parent / written
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in kept.iterdir())
        for file in kept.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes(), file
