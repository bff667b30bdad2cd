# ruff: noqa: E402
"""The Triton kernels against plain torch. Without a GPU they run in Triton's interpreter, where Triton is installed (pip install triton)."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
if not ON_GPU:
    from triton.runtime import interpreter

    _original = interpreter._patch_lang_tensor

    def _patched(tensor: type, scope: object) -> None:
        """Triton 3.6 makes Python numbers of one-element arrays in a way that numpy 2.4 has stopped to allow: loop bounds need this."""
        _original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rlhf.rollout import kernels
from rlhf.rollout.decoder import LeanDecoder, lean_layout
from rlhf.rollout.loop import Outputs, Slots, record
from rlhf.rollout.paged import CacheShape, DecodeStep, PagedCache
from rlhf.rollout.sampler import gumbel_noise, row_keys, sample, shape_logits
from rlhf.rollout.weights import buffer_elements, views
from rlhf.types import Sampling

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
pytestmark = pytest.mark.gpu if ON_GPU else []


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(dtype: torch.dtype, add: bool) -> None:
    x, delta, weight = values(5, 96, dtype=dtype), values(5, 96, dtype=dtype, seed=1), values(96, dtype=dtype, seed=2)
    total = x + delta if add else x.clone()
    wide = total.float()
    expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    out = kernels.add_norm(x, delta if add else None, weight, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_silu_mul(dtype: torch.dtype) -> None:
    x = values(3, 2 * 1500, dtype=dtype) * 3
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(kernels.silu_mul(x, 3), torch.nn.functional.silu(gate) * up, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dim", [16, 24])
def test_rope_and_cache(norm: bool, dim: int) -> None:
    heads, kv_heads, n, page = 4, 2, 6, 4
    qkv, cos, sin = values(n, (heads + 2 * kv_heads) * dim), values(40, dim // 2, seed=1), values(40, dim // 2, seed=2)
    q_norm, k_norm = (values(dim, seed=3), values(dim, seed=4)) if norm else (None, None)
    positions, slots = torch.tensor([0, 1, 5, 7, 13, 2], device=DEVICE), torch.tensor([0, 0, 1, 2, 2, 1], device=DEVICE)
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], dtype=torch.int32, device=DEVICE)
    pool = torch.zeros(2, 13, page, kv_heads, dim, device=DEVICE)
    split = qkv.clone().view(n, -1, dim)
    q, k, v = split[:, :heads], split[:, heads:-kv_heads], split[:, -kv_heads:]

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        low, high = x.chunk(2, -1)
        c, s = cos[positions][:, None], sin[positions][:, None]
        return torch.cat((low * c - high * s, high * c + low * s), -1)

    kernels.rope_and_cache(qkv, cos, sin, positions, slots, table, pool, heads, kv_heads, q_norm, k_norm, 1e-6)
    out = qkv.view(n, -1, dim)
    torch.testing.assert_close(out[:, :heads], turned(q, q_norm), atol=1e-5, rtol=1e-5)
    expected = torch.zeros_like(pool)
    place = table[slots, positions // page].long()
    expected[0, place, positions % page], expected[1, place, positions % page] = turned(k, k_norm), v
    torch.testing.assert_close(pool, expected, atol=1e-5, rtol=1e-5)
    pool.zero_()
    kernels.write_cache(expected[0, place, positions % page], v, pool, slots, positions, table)
    torch.testing.assert_close(pool, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_rotation_rounds_as_the_training_forward(fused: bool) -> None:
    """Bit for bit what transformers' own operations give: every product rounded, then their sum. A compiler that contracts a product with the sum
    changes one element in six of the keys, and with them every logprob."""
    dim, heads, kv_heads, n, page = 64, 4, 2, 48, 64
    qkv = values(n, (heads + 2 * kv_heads) * dim, dtype=HALF)
    cos, sin = values(200, dim // 2, dtype=HALF, seed=1), values(200, dim // 2, dtype=HALF, seed=2)
    positions, slots = torch.arange(n, device=DEVICE) * 4, torch.arange(n, device=DEVICE)
    table = torch.arange(1, 4 * n + 1, dtype=torch.int32, device=DEVICE).view(n, 4)
    pool = torch.zeros(2, 4 * n + 1, page, kv_heads, dim, dtype=HALF, device=DEVICE)
    low, high = qkv.view(n, -1, dim)[:, heads:-kv_heads].chunk(2, -1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    expected = torch.cat((low * c - high * s, high * c + low * s), -1)
    if fused:
        workspace = kernels.attention_workspace([n], heads, kv_heads, dim, 256, DEVICE)
        rotation = kernels.Rotation(cos, sin, None, None, 1e-6)
        kernels.paged_attention(qkv, heads, pool, table, positions, 0.1, None, 1, workspace, rotation)
    else:
        kernels.rope_and_cache(qkv, cos, sin, positions, slots, table, pool, heads, kv_heads, None, None, 1e-6)
    assert torch.equal(pool[0][table[slots, positions // page].long(), positions % page], expected)


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "page"), [(16, 6, 2, 64), (24, 4, 1, 16), (64, 2, 2, 64)])
@pytest.mark.parametrize("window", [None, 70])
def test_paged_attention(dim: int, heads: int, kv_heads: int, page: int, window: int | None) -> None:
    """Contexts of one token, of less and more than one split, and of all splits; a window inside and across them."""
    contexts = [1, 60, 257, 700, 1025]
    cache = PagedCache(CacheShape(1, kv_heads, dim), values(1, 2, 3000 // page + 8, page, kv_heads, dim).cpu(), len(contexts), 1100)
    for slot, n in enumerate(contexts):
        pages = cache.pages_for(n)
        cache.take([slot], np.arange(1, pages + 1)[None], np.ones(pages))
    positions, q = torch.tensor(contexts) - 1, values(len(contexts), heads, dim, seed=1)
    expected = DecodeStep(cache, torch.arange(len(contexts)), positions).attend(0, q.cpu(), 0.3, window)
    for batch_splits in (1, 3, 8):
        workspace = kernels.AttentionWorkspace(
            torch.empty(len(contexts) * batch_splits * heads, dim, device=DEVICE),
            torch.empty(len(contexts) * batch_splits * heads, 2, device=DEVICE),
            torch.zeros(len(contexts) * kv_heads, dtype=torch.int32, device=DEVICE),
        )
        for _ in range(2):  # the counters are zero again after the first
            out = kernels.paged_attention(
                q.flatten(1), heads, cache.pool[0].to(DEVICE), cache.table.to(DEVICE), positions.to(DEVICE), 0.3, window, batch_splits, workspace
            )  # fmt: skip
            torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_that_rotates_and_writes(norm: bool, window: int | None) -> None:
    """The fused decode step against rotation, cache write and attention one after the other."""
    dim, heads, kv_heads, page, contexts = 32, 6, 2, 16, [1, 17, 256, 257, 600]
    batch = len(contexts)
    cache = PagedCache(CacheShape(1, kv_heads, dim), values(1, 2, 90, page, kv_heads, dim).cpu(), batch, 700)
    for slot, n in enumerate(contexts):
        pages = cache.pages_for(n)
        cache.take([slot], np.arange(1, pages + 1)[None], np.ones(pages))
    positions, slots = (torch.tensor(contexts) - 1).to(DEVICE), torch.arange(batch, device=DEVICE)
    qkv, cos, sin = values(batch, (heads + 2 * kv_heads) * dim), values(700, dim // 2, seed=1), values(700, dim // 2, seed=2)
    q_norm, k_norm = (values(dim, seed=3), values(dim, seed=4)) if norm else (None, None)
    table, pool, fused = cache.table.to(DEVICE), cache.pool[0].to(DEVICE).clone(), cache.pool[0].to(DEVICE).clone()
    workspace = kernels.attention_workspace([batch], heads, kv_heads, dim, 700, DEVICE)
    splits = kernels.attention_splits(batch, kv_heads, 700)
    turned = qkv.clone()
    kernels.rope_and_cache(turned, cos, sin, positions, slots, table, pool, heads, kv_heads, q_norm, k_norm, 1e-6)
    q = turned[:, : heads * dim].contiguous()
    expected = kernels.paged_attention(q, heads, pool, table, positions, 0.2, window, splits, workspace)
    rotation = kernels.Rotation(cos, sin, q_norm, k_norm, 1e-6)
    out = kernels.paged_attention(qkv, heads, fused, table, positions, 0.2, window, splits, workspace, rotation)
    torch.testing.assert_close(fused, pool, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_decode_with_kernels_is_decode_without(family: str, padded: bool) -> None:
    """The whole decoder, fused step against plain torch; `padded`: products with more rows than the batch, whose contents must not matter."""
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
    more: dict[str, object] = {"qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 6}}.get(family, {})
    config = kinds[family](
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, **more
    )  # fmt: skip
    layout = lean_layout(config)
    weights = views(values(buffer_elements(layout)) * 0.2, layout)
    decoder = LeanDecoder(config, weights, 64)
    if padded:
        decoder._rows = {3: {"qkv": 8, "o": 4, "gate_up": 5, "down": 16, "head": 4}}
    shape, contexts, n = decoder.shape, [3, 9, 14], 3
    ids = torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions, slots = torch.tensor(contexts, device=DEVICE), torch.arange(n, device=DEVICE)
    before = values(2, 2, 20, 4, 2, shape.head_dim, seed=5)
    cache = PagedCache(shape, before.clone(), n, 64)
    for slot, length in enumerate(contexts):
        pages = cache.pages_for(length + 1)
        cache.take([slot], np.arange(1, pages + 1)[None], np.ones(pages))
    heads, kv_heads = decoder.heads, shape.kv_heads
    workspace = kernels.attention_workspace([n], heads, kv_heads, shape.head_dim, 64, DEVICE)
    with_kernels = decoder._on_gpu(ids, DecodeStep(cache, slots, positions, 2, workspace), slots)
    cpu = torch.device("cpu")
    plain = LeanDecoder(config, views(values(buffer_elements(layout)).cpu() * 0.2, layout), 64)
    other = PagedCache(shape, before.cpu(), n, 64)
    other.table.copy_(cache.table)
    assert plain.device == other.device == cpu
    without = plain.forward(ids.cpu(), positions.cpu(), DecodeStep(other, slots.cpu(), positions.cpu()), slots.cpu())
    tolerance = 1e-4
    torch.testing.assert_close(with_kernels.cpu(), without, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache.pool.cpu(), other.pool, atol=tolerance, rtol=tolerance)


def test_grow_pages() -> None:
    cache = PagedCache(CacheShape(1, 1, 16), torch.zeros(1, 2, 20, 4, 1, 16), 6, 40)
    for slot, n in enumerate([4, 7, 8, 3, 8, 4]):
        pages = cache.pages_for(n)
        cache.take([slot], np.arange(1, pages + 1)[None], np.ones(pages))
    lengths, live = torch.tensor([4, 7, 8, 3, 8, 4]), torch.tensor([True, True, True, True, False, True])
    names = ("table", "held", "references", "free", "free_count")
    copies = {name: getattr(cache, name).clone().to(DEVICE) for name in names}
    cache.grow(lengths, live)
    kernels.grow_pages(
        lengths.to(DEVICE), live.to(DEVICE), copies["table"], copies["held"], copies["references"], copies["free"], copies["free_count"], 4
    )  # fmt: skip
    for name in names:
        assert torch.equal(copies[name].cpu(), getattr(cache, name)), name


@pytest.mark.parametrize("vocabulary", [97, 5000])
@pytest.mark.parametrize(("temperature", "noise"), [(1.0, True), (0.7, True), (1.0, False)])
def test_sample(vocabulary: int, temperature: float, noise: bool) -> None:
    """trap 25: the noise of the kernel is the noise of the CPU."""
    batch = 40
    logits = values(batch, vocabulary) * 3
    keys, positions = row_keys(3, 0, torch.arange(batch), torch.arange(batch) % 4), torch.arange(batch) * 7
    expected, logprobs = sample(logits.cpu(), temperature, noise, keys, positions)
    token, logprob, _ = kernels.sample(logits, temperature, noise, keys.to(DEVICE), positions.to(DEVICE))
    assert torch.equal(token.cpu(), expected)
    torch.testing.assert_close(logprob.cpu(), logprobs, atol=1e-5, rtol=1e-5)
    source = torch.arange(batch) // 3
    mapped, _, _ = kernels.sample(logits, temperature, noise, keys.to(DEVICE), positions.to(DEVICE), source.to(DEVICE))
    assert torch.equal(mapped.cpu(), sample(logits.cpu()[source], temperature, noise, keys, positions)[0])
    assert gumbel_noise(keys, positions, torch.arange(8)).isfinite().all()


FILTERS = [
    Sampling(1, 0.7, top_k=50),
    Sampling(1, 1.3, top_p=0.9),
    Sampling(1, 1.0, top_k=40, top_p=0.8, min_p=0.05),
    Sampling(1, 0.8, repetition_penalty=1.3, min_new_tokens=60, bad_token_ids=(7, 300)),
    Sampling(1, 0.0, repetition_penalty=1.2, min_new_tokens=3),
    Sampling(1, 1.0, top_p=0.9, repetition_penalty=1.1, bad_token_ids=(0,)),
]


@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_filters_in_one_pass(sampling: Sampling, dtype: torch.dtype) -> None:
    """Tokens, logprobs and entropies of `shape_logits` on CPU. With 16 bits many logits are equal, also at the thresholds."""
    batch, vocabulary = 24, 5000
    logits, eos = (values(batch, vocabulary) * 3).to(dtype), torch.tensor([3, 17])
    if dtype == HALF:
        logits = (logits * 4).round() / 4
    keys, numbers = row_keys(3, 0, torch.arange(batch), torch.arange(batch) % 4), torch.arange(batch) * 5
    seen = torch.rand(2 * batch, vocabulary, generator=torch.Generator().manual_seed(1)) < 0.3
    rows, source = torch.arange(batch) * 2, torch.arange(batch) // 2
    least = torch.full((batch,), sampling.min_new_tokens)
    penalty = sampling.repetition_penalty != 1.0
    shaped = shape_logits(logits.cpu()[source], sampling, numbers < least, eos, seen[rows] if penalty else None)
    expected, logprobs = sample(shaped, 1.0, sampling.temperature > 0, keys, numbers)
    out = Outputs.empty(2 * batch, 200, vocabulary, DEVICE, False, True, True)
    out.forbid(sampling, eos.to(DEVICE), vocabulary)
    forbidden = out.forbidden.get(sampling.bad_token_ids)
    shaping = kernels.Shaping(replace(sampling, entropy=True), rows.to(DEVICE), least.to(DEVICE), forbidden, seen.to(DEVICE) if penalty else None)
    token, logprob, entropy = kernels.sample(
        logits, sampling.temperature or 1.0, sampling.temperature > 0, keys.to(DEVICE), numbers.to(DEVICE), source.to(DEVICE), shaping
    )  # fmt: skip
    assert torch.equal(token.cpu(), expected)
    torch.testing.assert_close(logprob.cpu(), logprobs, atol=1e-4, rtol=1e-4)
    logs = shaped.log_softmax(-1)
    torch.testing.assert_close(entropy.cpu(), -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_row_of_nan_stays_within_bounds() -> None:
    """Empty slots may hold anything: no token outside the vocabulary, nothing read out of bounds (5,000 is 39 blocks and a part of one)."""
    logits = values(3, 5000)
    logits[1:] = torch.nan
    keys, positions = torch.arange(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for noise in (True, False):
        token, _, _ = kernels.sample(logits, 1.0, noise, keys, positions)
        assert bool(((token >= 0) & (token < 5000)).all())


@pytest.mark.parametrize("forced", [False, True])
def test_record(forced: bool) -> None:
    cpu, batch, window = torch.device("cpu"), 9, 12
    state, out = Slots.empty(batch, cpu), Outputs.empty(batch, window, 50, cpu, forced, False, False)
    state.row.copy_(torch.randperm(batch, generator=torch.Generator().manual_seed(0)))
    state.new.copy_(torch.arange(batch) % 5)
    state.limit.fill_(5)
    state.live.copy_(torch.arange(batch) != 4)
    if forced:
        out.forced[:batch] = torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 0])
    token, logprob, eos = torch.arange(batch) % 4, torch.linspace(-2, -1, batch), torch.tensor([3, 17])
    theirs, found = Slots(**{k: v.clone().to(DEVICE) for k, v in vars(state).items()}), Outputs(**vars(out))
    for name in ("ids", "logprobs", "lengths", "finished", "forced"):
        setattr(found, name, getattr(out, name).clone().to(DEVICE))
    if not forced:
        found.forced = found.lengths
    record(token, logprob, state, out, eos)
    kernels.record(token.to(DEVICE), logprob.to(DEVICE), theirs, found, eos.to(DEVICE))
    for name, value in vars(state).items():
        assert torch.equal(getattr(theirs, name).cpu(), value), name
    for name in ("ids", "logprobs", "lengths", "finished"):
        assert torch.equal(getattr(found, name).cpu(), getattr(out, name)), name
