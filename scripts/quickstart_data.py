"""The quick start's task, data and untrained model: spelling words of three to five letters backward, one letter a token.

    python scripts/quickstart_data.py --out runs/quickstart --seed 0

The words and their answers come from the generator `spell_backward` of reasoning-gym; the sentence around the word is left out ("neon>"
instead of "Spell this word backward (example: sun -> nus): neon"), because the model starts from nothing and reads letters.
No word is in two of the parts. The warm start's demonstrations hold a systematic slip: most words of five letters are copied
instead of reversed. PPO is there to mend that, with a reward model that has learnt what right answers look like.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import torch
from reasoning_gym.factory import create_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PARTS = {"held_out": 1000, "warm_start": 6000, "reward_model": 3000, "ppo": 3000}  # words
SLIP_LENGTH, SLIP_SHARE = 5, 0.65  # demonstrations for words of this length copy the word with this probability


def draw_words(count: int, seed: int) -> list[dict[str, str]]:
    """`count` distinct words in lower case as {prompt, answer}, in the generator's order."""
    # The generator's entry i depends on seed + i: seeds that are neighbours would give the same words, shifted by one.
    task = create_dataset("spell_backward", seed=seed * 1_000_003, size=1_000_000, min_word_len=3, max_word_len=5)
    rows: dict[str, dict[str, str]] = {}
    for entry in task:
        word = entry["metadata"]["word"]
        if set(word) <= set(ascii_lowercase):
            rows.setdefault(word, {"prompt": f"{word}>", "answer": entry["answer"]})
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"the generator has not {count} words")


def demonstrations(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Rows for sft, with the slip."""
    random = Random(seed)

    def response(row: dict[str, str]) -> str:
        word = row["prompt"].removesuffix(">")
        return word if len(word) == SLIP_LENGTH and random.random() < SLIP_SHARE else row["answer"]

    return [{"prompt": row["prompt"], "response": response(row)} for row in rows]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def write_model(folder: Path, seed: int) -> None:
    """A Llama with random weights and its tokenizer."""
    tokens = ["<pad>", "<eos>", ">", *ascii_lowercase]
    letters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description="Data and an untrained model for the quick start.")
    parser.add_argument("--out", type=Path, required=True, help="folder for data/ and model/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bar()
    rows = draw_words(sum(PARTS.values()), arguments.seed)
    for part, count in PARTS.items():
        mine, rows = rows[:count], rows[count:]
        write_rows(arguments.out / "data" / f"{part}.jsonl", demonstrations(mine, arguments.seed) if part == "warm_start" else mine)
    write_model(arguments.out / "model", arguments.seed)


if __name__ == "__main__":
    main()
