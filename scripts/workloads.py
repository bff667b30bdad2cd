"""Shapes, lengths and lower bounds that every benchmark of this project uses.

decode step  t >= max((weight_bytes + sum(context) * kv_bytes) / bandwidth, rows * 2 * params / flops)
prefill      2 * block_params * unique prompt tokens / flops
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

CHIPS = {"H100": (3.0e12, 798e12), "H200": (4.3e12, 788e12)}  # measured device copy in B/s, measured dense bf16 FLOP/s


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    family: str = "qwen2"

    @property
    def block_parameters(self) -> int:
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def config(self) -> Any:
        """A transformers config of this shape."""
        from transformers import LlamaConfig, Qwen2Config

        kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[self.family]
        return kind(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, max_position_embeddings=32768, rope_theta=1e6,
            tie_word_embeddings=self.tied,
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 16, 512, True),  # to try the scripts out
    "0.5B": Shape(24, 896, 4864, 14, 2, 64, 151936, True),
    "1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, True),
    "7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, False),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, False, "llama"),
}


def rollout_requests(prompts: int = 128, samples: int = 4, seed: int = 0, longest: int = 1024) -> tuple[list[list[int]], list[int]]:
    """(prompts as token ids, response length of each sample): prompts uniform in [64, 256], responses lognormal (median 320, sigma 0.8) in
    [32, longest]."""
    random = np.random.default_rng(seed)
    ids, lengths = [], []
    for _ in range(prompts):
        ids.append(random.integers(10, 150000, random.integers(64, 257)).tolist())
        for _ in range(samples):
            lengths.append(int(np.clip(random.lognormal(np.log(320), 0.8), 32, longest)))
    return ids, lengths


def rollout_bound(shape: Shape, prompts: list[list[int]], lengths: list[int], chip: str) -> float:
    """Seconds that no engine can undercut on this chip, all rows decoded together."""
    bandwidth, flops = CHIPS[chip]
    parameters = shape.block_parameters + shape.head_parameters
    samples = len(lengths) // len(prompts)
    prompt = np.repeat([len(ids) for ids in prompts], samples)
    response = np.array(lengths)
    total = 2 * shape.block_parameters * sum(len(ids) for ids in prompts) / flops
    for t in range(int(response.max())):
        alive = response > t
        total += max((2 * parameters + (prompt[alive] + t).sum() * shape.kv_bytes) / bandwidth, alive.sum() * 2 * parameters / flops)
    return float(total)


def decode_step_bound(shape: Shape, batch: int, context: int, chip: str) -> float:
    """Seconds of one decode step."""
    bandwidth, flops = CHIPS[chip]
    parameters = shape.block_parameters + shape.head_parameters
    return max((2 * parameters + batch * context * shape.kv_bytes) / bandwidth, batch * 2 * parameters / flops)


WORKLOADS = {  # prompts, samples of each, prompt tokens, mean and most response tokens
    "A": (256, 8, 128, 256, 512),
    "B": (128, 8, 256, 1024, 4096),
    "V": (256, 1, 104, 278, 512),
    "T": (32, 8, 128, 512, 512),
    "32k": (2, 2, 256, 32_512, 32_512),
    "tiny": (8, 4, 12, 12, 24),  # to try the scripts out
}


def step_lengths(workload: str, times: float = 1, seed: int = 0) -> tuple[int, int, int, np.ndarray]:
    """(prompts, samples, prompt tokens, [prompts * samples] response tokens): lognormal (sigma 0.8), cut at the most, with the mean asked for."""
    prompts, samples, before, mean, most = WORKLOADS[workload]
    prompts = max(1, int(prompts * times))
    count = prompts * samples
    if mean == most:
        return prompts, samples, before, np.full(count, most)
    z = np.random.default_rng(seed).standard_normal(count)
    low, high = 1.0, 20.0  # of the median's logarithm
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(np.exp(middle + 0.8 * z), 1, most).mean() < mean else (low, middle)
    return prompts, samples, before, np.clip(np.exp(low + 0.8 * z), 1, most).astype(int)


def scoring_flops(shape: Shape, lengths: np.ndarray, responses: np.ndarray) -> float:
    """Of one forward over sequences of `lengths`, with the head on `responses` tokens of each; an update is three, with LoRA two."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * (lengths.astype(float) ** 2 / 2).sum()
    return float(2 * shape.block_parameters * lengths.sum() + 2 * shape.head_parameters * responses.sum() + attention)


def waiting(completions: list[str], seconds: float, **columns: Any) -> list[float]:
    """A reward that takes `seconds` for each sample, as a server does."""
    time.sleep(seconds * len(completions))
    return [0.0] * len(completions)
