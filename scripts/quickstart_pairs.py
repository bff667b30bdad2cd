"""Preference pairs for the quick start's reward model: the right answer against what the warm-started model gets wrong.

    python scripts/quickstart_pairs.py --model MODEL --words words.jsonl --train pairs.jsonl --held_out held_out.jsonl --seed 0

The rejected side is a wrong sample of the model, or the right answer with one slip of the pen: the samples alone would teach the
reward model only those mistakes that the model makes now, and PPO would find others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from string import ascii_lowercase

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.models.loading import load_tokenizer
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Sampling

SAMPLES = 6  # of the model, per word
CORRUPTIONS = 4  # of the right answer, per word
MAX_NEW_TOKENS = 8
HELD_OUT = 500  # words; one pair of each, so that the pairs of the reported accuracy are independent


def sample(folder: Path, rows: list[dict[str, str]], seed: int) -> list[list[str]]:
    """`SAMPLES` responses of the model to each row, those that never end left out."""
    tokenizer = load_tokenizer(folder)
    engine = HybridEngine.from_folder(folder, EngineSettings(max_batch=512, page_size=16), torch.device("cpu"), torch.float32, tokenizer)
    prompts = [Prompt(tokenizer(row["prompt"])["input_ids"], row["prompt"], "words") for row in rows]
    rollout = engine.generate(prompts, list(range(len(prompts))), SAMPLES, Sampling(MAX_NEW_TOKENS, seed=seed))
    texts = tokenizer.batch_decode([rollout.response_ids(i) for i in range(len(rollout))], skip_special_tokens=True)
    ended = [text if finished else None for text, finished in zip(texts, rollout.finished.tolist(), strict=True)]
    return [[text for text in ended[i : i + SAMPLES] if text] for i in range(0, len(ended), SAMPLES)]


def corrupt(word: str, random: Random) -> str:
    """Two neighbours swapped, a letter replaced, dropped or written twice."""
    i = random.randrange(len(word) - 1)
    swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    i = random.randrange(len(word))
    replaced = word[:i] + random.choice(ascii_lowercase) + word[i + 1 :]
    return random.choice([swapped, replaced, word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]])


def pairs_of(row: dict[str, str], samples: list[str], random: Random) -> list[dict[str, str]]:
    """One pair for every different wrong answer."""
    right = row["answer"]
    wrong = dict.fromkeys([*samples, *(corrupt(right, random) for _ in range(CORRUPTIONS))])
    return [{"prompt": row["prompt"], "chosen": right, "rejected": text} for text in wrong if text != right]


def main() -> None:
    parser = argparse.ArgumentParser(description="Preference pairs for the quick start.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the warm-started model")
    parser.add_argument("--words", type=Path, required=True, help="jsonl with prompt and answer")
    parser.add_argument("--train", type=Path, required=True, help="pairs to write")
    parser.add_argument("--held_out", type=Path, required=True, help=f"pairs to write, one for each of the last {HELD_OUT} words")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bar()
    rows = [json.loads(line) for line in arguments.words.read_text().splitlines()]
    random = Random(arguments.seed)
    pairs = [pairs_of(row, samples, random) for row, samples in zip(rows, sample(arguments.model, rows, arguments.seed), strict=True)]
    train = [pair for group in pairs[:-HELD_OUT] for pair in group]
    held_out = [random.choice(group) for group in pairs[-HELD_OUT:] if group]
    for path, chosen in ((arguments.train, train), (arguments.held_out, held_out)):
        path.write_text("".join(json.dumps(pair) + "\n" for pair in chosen))
        print(f"{path}: {len(chosen)} pairs")


if __name__ == "__main__":
    main()
