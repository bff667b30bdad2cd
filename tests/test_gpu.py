"""What only a GPU can show; `pytest -m gpu`. Everything else runs on CPU. One process, no launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
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
from tests.one_update import UPDATES, Update, differences

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


ON_GPUS = UPDATES | {
    "compiled layers": (Update("grpo", "packed", compile=True), 0.15),
    "two ranks gather": (Update("ppo", "packed", ranks=2), 0.5),
    "two ranks, LoRA": (Update("dr_grpo", "tokens", lora=4, ranks=2), 0.3),
}


@pytest.mark.parametrize("name", ON_GPUS)
def test_an_update_is_the_cpus(models: Path, tmp_path: Path, name: str) -> None:
    """All of three optimizer steps, several forwards with a factor for every token, against float32 on the CPU, where no kernel of ours runs."""
    wanted, limit = ON_GPUS[name]
    if torch.cuda.device_count() < wanted.ranks:
        pytest.skip(f"needs {wanted.ranks} GPUs")
    found, _ = differences(models, tmp_path / "three", wanted)
    assert max(found.values()) < limit, sorted(found.items(), key=lambda item: -item[1])[:5]
    _, together = differences(models, tmp_path / "one", replace(wanted, minibatches=1))
    assert max(together.values()) < (1e-3 if wanted.dtype == "float32" else 0.1), together


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


def test_offloaded_states_are_gone_and_train_the_same_bits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five clipped AdamW steps of 8.4 million parameters in parts of a million: copies in, steps and copies back on three streams."""
    from rlhf import offload
    from rlhf.engine import TrainEngine, loading_context

    monkeypatch.setattr(offload, "PART", (1 << 20) - 8)
    found = []
    for offloads in (False, True):
        before = torch.cuda.memory_allocated()
        config = TrainedModelConfig(dtype="bfloat16", learning_rate=1e-3, weight_decay=0.1, offload=offloads)
        block = deepspeed_block(3, sgd=False)
        settings = resolve_deepspeed(block, dtype="bfloat16", trained=True, micro_batch=1, world_size=1, max_grad_norm=0.5, on_gpu=True)
        module = loading_context(settings, world).construct(lambda: torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8))))
        generator = torch.Generator(world.device).manual_seed(3)
        for parameter in module.parameters():
            parameter.ds_tensor.normal_(0.0, 0.03, generator=generator)
        engine = TrainEngine(module, config, settings, world, 10, 0, "actor")
        x = torch.randn(64, 1024, device=world.device, generator=generator).bfloat16()
        norms = []
        for _ in range(5):
            engine.backward(engine(x).float().pow(2).sum(), 1.0)
            norms.append(engine.step().grad_norm)
        torch.cuda.synchronize()
        between = torch.cuda.memory_allocated() - before
        with engine._states_at_hand():
            zero = engine._engine.optimizer
            masters = [m.detach().cpu() for m in zero.fp32_partitioned_groups_flat]
            moments = [v.cpu() for m in zero.fp32_partitioned_groups_flat for v in zero.optimizer.state[m].values()]
        weights = [p.ds_tensor.cpu() for p in module.parameters()]
        found.append((between, norms, masters + moments + weights))
        if engine._offloaded:
            assert all(kept is not None and kept.is_pinned() for kept in engine._offloaded._kept)
    (held, norms, states), (left, their_norms, theirs) = found
    assert held - left >= 0.9 * 12 * 8 * (1024 * 1024 + 1024)
    assert their_norms == norms and min(norms) > 0.5
    assert all(torch.equal(a, b) for a, b in zip(states, theirs, strict=True))


def test_parked_weights_are_gone_between_phases(world: World) -> None:
    from rlhf.offload import Parked

    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=generator).to(world.device) for n in (3, 1 << 20, 1 << 22)]
    expected, held = [t.cpu() for t in tensors], torch.cuda.memory_allocated()
    parked = Parked(tensors, world.device)
    for _ in range(2):
        assert held - torch.cuda.memory_allocated() >= 4 * ((1 << 20) + (1 << 22))
        parked.fetch()
        parked.wait()
        assert all(torch.equal(t.cpu(), e) for t, e in zip(tensors, expected, strict=True))
        parked.release()


def test_a_background_save_holds_what_was_there_when_training_went_on(world: World, tmp_path: Path) -> None:
    """1.6 GB of state, whose copying is held up, and an optimizer step that follows at once."""
    from rlhf.checkpoint import Checkpoints, Mark
    from rlhf.engine import TrainEngine, loading_context

    config = TrainedModelConfig(dtype="bfloat16", learning_rate=1e-3)
    settings = resolve_deepspeed(
        deepspeed_block(3, sgd=False), dtype="bfloat16", trained=True, micro_batch=1, world_size=1, max_grad_norm=1.0, on_gpu=True
    )
    module = loading_context(settings, world).construct(lambda: torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(8))))
    generator = torch.Generator(world.device).manual_seed(3)
    for parameter in module.parameters():  # a step must change something
        parameter.ds_tensor.normal_(0.0, 0.01, generator=generator)
    engine = TrainEngine(module, config, settings, world, 10, 0, "actor")
    x = torch.randn(8, 4096, device=world.device, generator=generator).bfloat16()
    behind = Checkpoints(tmp_path / "behind", world, keep_last=9, background=True)
    behind.prepare({"actor": engine}, 0)

    def files_of(folder: str, step: int) -> dict[str, str]:
        manifest = json.loads((tmp_path / folder / "checkpoints" / f"checkpoint-{step}" / "manifest.json").read_text())
        return {name: entry["sha256"] for name, entry in manifest.items() if name.startswith("actor/")}

    found = []
    for step in (1, 2):
        engine.backward(engine(x).float().pow(2).sum(), 1.0)
        engine.step()
        assert Checkpoints(tmp_path / "at once", world, keep_last=9).save(Mark(step), {"actor": engine}, {}) is None
        engine.backward(engine(x).float().pow(2).sum(), 1.0)
        torch.cuda.synchronize()
        assert behind.pinned is not None
        with torch.cuda.stream(behind.pinned._stream):
            torch.cuda._sleep(2_000_000_000)  # about a second: copies begin when a step that did not wait would long be over
        assert behind.save(Mark(step), {"actor": engine}, {}) is None
        engine.step()
        assert behind.finish() is None
        assert len(behind.pinned._arenas) == 1, "all of it was locked ahead"
        found.append(files_of("behind", step))
        assert found[-1] == files_of("at once", step) and len(found[-1]) > 1
    assert not set(found[0].values()) & set(found[1].values())


def test_packed_attention_with_values_of_another_size() -> None:
    """Latent attention: 96 numbers of a key, 64 of a value. Flash attention takes no such heads."""
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (torch.randn(1, 4, 300, size, device=CUDA, generator=generator) for size in (96, 96, 64))
    packed = pack([200, 37, 63]).to(CUDA)
    expected = packed_attention(torch.nn.Module(), q, k, v, None, packed=packed)[0]
    found = packed_attention(torch.nn.Module(), q.bfloat16(), k.bfloat16(), v.bfloat16(), None, packed=packed)[0]
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_deterministic_mode_adds_attention_gradients_in_one_order() -> None:
    """Flash attention's backward pass, which adds up in any order where it is only warned."""
    from rlhf.engine import deterministic_kernels

    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (torch.randn(1, heads, 8192, 64, device=CUDA, generator=generator).bfloat16().requires_grad_() for heads in (14, 2, 2))
    packed = pack([4096, 3000, 1096]).to(CUDA)
    with deterministic_kernels(True):
        found = []
        for _ in range(8):
            out, _ = packed_attention(torch.nn.Module(), q, k, v, None, packed=packed)
            found.append(torch.autograd.grad(out.float().pow(2).sum(), (q, k, v)))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0], strict=True))
