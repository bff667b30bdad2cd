"""What only a GPU can show; `pytest -m gpu`. Everything else runs on CPU. One process, no launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.batching import MicroBatchPlan, collate, pack
from rlhf.config import TrainedModelConfig, resolve_deepspeed
from rlhf.distributed import World, init_world
from rlhf.models.forward import response_logprobs
from rlhf.models.packing import pack_attention, packed_attention
from rlhf.rollout import kernels
from rlhf.rollout.sampler import gumbel_noise, row_keys
from rlhf.types import MicroBatch, Prompt, Rollout, Sampling
from tests.helpers import VOCABULARY, deepspeed_block, draw, rollout_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(600)]

CUDA = torch.device("cuda")
IDS = torch.randint(4, VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    world = init_world()
    yield world
    world.close()


def some_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(torch.randint(4, VOCABULARY, (1 + i % 8,), generator=generator).tolist(), "", "test") for i in range(24)]


def test_noise_and_tokens_are_those_of_the_cpu() -> None:
    """trap 25"""
    keys = row_keys(3, 0, torch.arange(256), torch.arange(256) % 4)
    positions = torch.arange(256)
    noise = gumbel_noise(keys, positions, torch.arange(5000))
    on_gpu = gumbel_noise(keys.cuda(), positions.cuda(), torch.arange(5000)).cpu()
    torch.testing.assert_close(on_gpu, noise, atol=1e-5, rtol=1e-5)
    logits = torch.randn(256, 5000, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.rand(256, 5000, generator=torch.Generator().manual_seed(1)) < 0.2
    filters = Sampling(1, min_p=0.02, repetition_penalty=1.3, min_new_tokens=100, bad_token_ids=(7, 300))
    for sampling in (Sampling(1), Sampling(1, 0.7, 50, 0.9), Sampling(1, 0.0), filters):
        tokens, logprobs = draw(logits, sampling, keys, positions, seen, [3, 17])
        gpu_tokens, gpu_logprobs = draw(logits.cuda(), sampling, keys.cuda(), positions.cuda(), seen.cuda(), [3, 17])
        assert torch.equal(gpu_tokens.cpu(), tokens)
        torch.testing.assert_close(gpu_logprobs.cpu(), logprobs, atol=1e-4, rtol=1e-4)


def rollout_and_scores(models: Path, device: str, dtype: torch.dtype) -> tuple[Rollout, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=dtype, attn_implementation="sdpa").to(device)
    rollout = rollout_engine(model, max_batch=7).generate(some_prompts(), list(range(24)), 2, Sampling(20, seed=5))
    batch = MicroBatch(rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths, rollout.response_mask, {}).to(torch.device(device))
    with torch.no_grad():
        return rollout, response_logprobs(model, batch, 1.0)[0].cpu()


def test_rollouts_in_float32_are_those_of_the_cpu(models: Path) -> None:
    """trap 25"""
    torch.backends.cuda.matmul.allow_tf32 = False
    here, _ = rollout_and_scores(models, "cuda", torch.float32)
    there, _ = rollout_and_scores(models, "cpu", torch.float32)
    assert [here.response_ids(i) for i in range(len(here))] == [there.response_ids(i) for i in range(len(there))]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
def test_rollout_logprobs_are_near_the_training_forwards(models: Path, dtype: torch.dtype, limit: float) -> None:
    """trap 9: in bfloat16 they differ by rounding, which is why they are never the old logprobs."""
    rollout, scores = rollout_and_scores(models, "cuda", dtype)
    distance = (scores - rollout.rollout_logprobs)[rollout.response_mask].abs()
    assert float(distance.mean()) < limit / 4
    assert float(distance.max()) < limit


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 14, 2), (64, 9, 3), (128, 28, 4), (128, 12, 2)])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_attention_is_the_training_forwards_bit_for_bit(dim: int, heads: int, kv_heads: int, window: int | None) -> None:
    """One element in 50,000 that differs, from another order of a sum, is enough for every logprob to differ after some layers."""
    contexts, page = [1, 2, 63, 64, 65, 127, 128, 129, 300, 449, 511, 512], 64
    assert max(contexts) == kernels.SPLIT_TOKENS
    packed, generator = pack(contexts).to(CUDA), torch.Generator(CUDA).manual_seed(dim + heads)
    total = sum(contexts)
    q, k, v = (
        torch.randn(1, n, total, dim, generator=generator, device=CUDA).mul(size).bfloat16()
        for n, size in ((heads, 3.0), (kv_heads, 1.0), (kv_heads, 1.0))  # peaked, so that the running maximum matters
    )
    module = torch.nn.Module()
    expected, _ = packed_attention(module, q, k, v, None, scaling=dim**-0.5, sliding_window=window, packed=packed)
    pages = max(contexts) // page
    table = torch.arange(1, len(contexts) * pages + 1, dtype=torch.int32, device=CUDA).view(-1, pages)
    pool = torch.zeros(2, len(contexts) * pages + 1, page, kv_heads, dim, dtype=torch.bfloat16, device=CUDA)
    where = table[packed.row, packed.positions // page].long()
    for which, tensor in enumerate((k, v)):
        pool[which, where, packed.positions % page] = tensor[0].transpose(0, 1)
    last = packed.boundaries[1:].long() - 1
    queries = q[0].transpose(0, 1)[last].flatten(1).contiguous()
    workspace = kernels.attention_workspace([len(contexts)], heads, kv_heads, dim, 2048, CUDA)
    out = kernels.paged_attention(queries, heads, pool, table, packed.positions[last], dim**-0.5, window, 4, workspace)
    assert torch.equal(out, expected[0, last])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_packed_rows_are_padded_rows(models: Path, dtype: torch.dtype, limit: float) -> None:
    """Logprobs and gradients; in bfloat16 through torch's variable-length attention, whose backward pass runs nowhere else."""
    torch.backends.cuda.matmul.allow_tf32 = False
    lengths = torch.tensor([[3, 9], [12, 4], [1, 30], [7, 7], [20, 1]])
    ids = torch.randint(4, VOCABULARY, (5, 31), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(30) < lengths[:, 1:]
    found = []
    for packing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=dtype, attn_implementation="sdpa").cuda()
        if packing:
            pack_attention(model)
        batch = collate(ids, lengths[:, 0], lengths[:, 1], mask, MicroBatchPlan([0, 1, 2, 3, 4]), packing=packing).to(torch.device("cuda"))
        logprobs, _ = response_logprobs(model, batch, 1.0)
        (logprobs * batch.mask).sum().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        found.append((logprobs.detach() * batch.mask, gradient))
    for padded, packed in zip(*found, strict=True):
        assert float((padded - packed).norm() / padded.norm()) < limit


def test_bf16_training_under_zero_3(models: Path, world: World, tmp_path: Path) -> None:
    """Loss falls, norms are finite, a master weight exists, the hand-over gives the replica what the engine holds (trap 21)."""
    from rlhf.engine import TrainEngine, loading_context
    from rlhf.models.loading import load_causal_lm
    from rlhf.models.lora import weight_layout

    config = TrainedModelConfig(path=models / "llama", dtype="bfloat16", learning_rate=3e-3)
    settings = resolve_deepspeed(
        deepspeed_block(3, sgd=False), dtype="bfloat16", trained=True, micro_batch=6, world_size=1, max_grad_norm=1.0, on_gpu=True
    )
    module = load_causal_lm(config, "actor", loading_context(settings, world), world, torch.bfloat16)
    engine = TrainEngine(module, config, settings, world, 10, 0, "actor")
    ids = IDS.to(world.device)
    losses = []
    for _ in range(10):
        logits = engine(input_ids=ids, position_ids=torch.arange(7, device=ids.device).expand_as(ids), use_cache=False).logits
        loss = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
        losses.append(float(loss.detach()) / 36)
        engine.backward(loss, 36)
        assert 0 < engine.step().grad_norm < 1000
    assert losses[-1] < 0.7 * losses[0]
    replica = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.bfloat16).to(world.device)
    hybrid = rollout_engine(replica, max_batch=7)
    hybrid.load_weights(engine.full_tensors(weight_layout(engine.module)))
    with torch.no_grad():
        for name, parameter in replica.named_parameters():
            parameter.copy_(hybrid.weights[name])
        theirs = replica(input_ids=ids, position_ids=torch.arange(7, device=ids.device).expand_as(ids)).logits
    ours = engine.score(input_ids=ids, position_ids=torch.arange(7, device=ids.device).expand_as(ids), use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
