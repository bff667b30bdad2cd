"""The head that answers with logprobs: against the logits' own, in values, gradients and in what it never makes."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlhf.batching import MicroBatchPlan, collate
from rlhf.models.forward import response_logprobs
from rlhf.models.loading import without_dropout
from rlhf.models.packing import check_packing, pack_attention
from rlhf.models.scoring_head import FAMILIES, fuse_head
from rlhf.ops import head
from rlhf.ops.head import _chunks, _gradient, _statistics, score_tokens
from rlhf.ops.logprobs import token_logprobs
from tests.interpreter import interpreted

N, H, V = 13, 8, 37
in_kernels = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.timeout(120)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_scores_and_gradients_are_those_of_the_logits(chunk: int, entropy_gradient: bool, frozen: bool) -> None:
    hidden, weight, tokens = random(N, H), random(V, H, seed=1) * 0.3, torch.arange(N) * 5 % V
    a, b = random(N, seed=2), random(N, seed=3)
    found = []
    for whole in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        if whole:
            logprobs, entropy = token_logprobs(x @ w.T, tokens, 0.7, entropy_gradient)
        else:
            logprobs, entropy = score_tokens(x, w, tokens, 0.7, entropy_gradient, chunk_bytes=chunk * V * 4)
        assert entropy.requires_grad == entropy_gradient
        (logprobs @ a + (entropy @ b if entropy_gradient else 0)).backward()
        found.append((logprobs.detach(), entropy.detach(), x.grad, *([] if frozen else [w.grad])))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("trained", "chunk", "products"), [(False, N, 2), (False, 5, 6), (True, N, 3), (True, 5, 11)])
def test_logits_are_made_no_more_often_than_they_must(trained: bool, chunk: int, products: int) -> None:
    """Twice for each chunk but the last, once where the weight is frozen; beside them the gradients of hidden states and weight."""
    x, w = random(N, H).requires_grad_(), random(V, H, seed=1).requires_grad_(trained)
    with _Products() as counted:
        total = score_tokens(x, w, torch.zeros(N, dtype=torch.int64), chunk_bytes=chunk * V * 4)[0].sum()
        total.backward(retain_graph=True)
    assert counted.count == products and x.grad is not None
    once = x.grad.clone()
    total.backward()  # what was kept is gone: made again
    torch.testing.assert_close(x.grad, 2 * once)


def test_the_last_chunk_is_a_whole_one() -> None:
    """It is the one that need not be made again."""
    assert _chunks(10, 4) == [slice(0, 2), slice(2, 6), slice(6, 10)] and _chunks(3, 4) == [slice(0, 3)]


class _Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_gradient_is_made_that_nobody_wants(frozen: str) -> None:
    x, w = random(N, H).requires_grad_(frozen != "hidden"), random(V, H, seed=1).requires_grad_(frozen != "weight")
    score_tokens(x, w, torch.zeros(N, dtype=torch.int64))[0].sum().backward()
    assert (x.grad is None) == (frozen == "hidden") and (w.grad is None) == (frozen == "weight")


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_all_tokens_and_the_whole_vocabulary() -> None:
    x, w = random(200, H).requires_grad_(), random(V, H, seed=1).requires_grad_()
    with _Largest() as largest:
        score_tokens(x, w, torch.zeros(200, dtype=torch.int64), chunk_bytes=50 * V * 4)[0].sum().backward()
    assert largest.elements == 50 * V


CONFIGS = {
    "llama": LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": Qwen3Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    ),
}


def as_kernels_read(tensor: Any) -> Any:
    """The numbers that lie one behind the other from the tensor's first on."""
    return tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride()) if isinstance(tensor, Tensor) else tensor


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("way", ["plain", "as kernels read", pytest.param("kernels", marks=in_kernels)])
def test_response_logprobs_through_the_head(family: str, packing: bool, entropy_gradient: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's gradient by its own factor, in the loss of a model whose head answers: what a kernel is given there lies otherwise than alone."""
    device = torch.device("cuda" if way == "kernels" and torch.cuda.is_available() else "cpu")
    if way == "kernels":
        interpreted()
        monkeypatch.setattr(head, "_in_kernels", lambda logits: True)
    elif way == "as kernels read":
        for function in (_gradient, _statistics):
            monkeypatch.setattr(head, function.__name__, lambda *given, function=function: function(*map(as_kernels_read, given)))
    ids = torch.randint(1, V, (3, 12), generator=torch.Generator().manual_seed(0))
    p, n = torch.tensor([3, 5, 2]), torch.tensor([7, 4, 10])
    mask = torch.arange(10)[None] < n[:, None]
    batch = collate(ids, p, n, mask, MicroBatchPlan([0, 1, 2]), packing=packing).to(device)
    factors, others = (random(3, 10, seed=seed).to(device) * batch.mask for seed in (5, 6))
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32).to(device)
        if packing:
            pack_attention(model)
        if fused:
            assert fuse_head(model)
        logprobs, entropy = response_logprobs(model, batch, 0.9, entropy_gradient=entropy_gradient)
        (logprobs * factors + (entropy * others if entropy_gradient else 0.0)).sum().backward()
        found.append((logprobs.detach()[batch.mask], entropy.detach()[batch.mask], *(q.grad for q in model.parameters())))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_all_families_answer_as_their_logits(family: str) -> None:
    """Values and gradients, from rows side by side in one forward; and that it is the head which answers."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Some families call them otherwise, and keep their own.
    more = {"vocab_size": 97, "num_key_value_heads": 4, "head_dim": 12, "max_position_embeddings": 64, "intermediate_size": 80, "ffn_dim": 80}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "word_embed_proj_dim": 48, "use_cache": False}
    part = {"partial_rotary_factor": 0.5} if family == "stablelm" else {}
    config = CONFIG_MAPPING[family](**sizes, **more, **ends, **part)
    without_dropout(config)
    check_packing(config, "actor")
    batch = collate(
        torch.randint(3, 97, (2, 9)), torch.tensor([4, 2]), torch.tensor([3, 5]), torch.ones(2, 5) > 0, MicroBatchPlan([0, 1]), packing=True
    )
    found, asked = [], []
    for fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        pack_attention(model)
        if fused:
            assert fuse_head(model)
            model.get_output_embeddings().register_forward_hook(lambda module, given, out: asked.append(out.shape[-1]))
        logprobs, entropy = response_logprobs(model, batch, 0.9, entropy_gradient=True)
        (logprobs * batch.mask).sum().add((entropy * batch.mask).sum()).backward()
        found.append((logprobs.detach()[batch.mask], entropy.detach()[batch.mask], *(q.grad for q in model.parameters() if q.grad is not None)))
    assert asked == [2]  # logprob and entropy, no logits
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


def test_a_forward_without_tokens_has_gradients_of_zero() -> None:
    x, w = torch.zeros(0, H, requires_grad=True), random(V, H, seed=1).requires_grad_()
    score_tokens(x, w, torch.zeros(0, dtype=torch.int64))[0].sum().backward()
    assert w.grad is not None and not w.grad.any() and x.grad is not None


def test_kernels_are_given_what_lies_dense() -> None:
    with pytest.raises(RuntimeError, match="a kernel of the head was given tensors with strides"):
        head._check_dense(random(4), random(4, 2)[:, 0])


def test_who_does_not_ask_gets_logits() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    assert fuse_head(model) and torch.equal(model(input_ids=ids).logits, before)


def test_heads_that_are_more_than_a_product_stay() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    model.config.model_type = "cohere"  # scales its logits
    assert not fuse_head(model)
    model.config.model_type = "llama"
    model.config.final_logit_softcapping = 30.0
    assert not fuse_head(model)
    model.config.final_logit_softcapping = None
    model.lm_head = torch.nn.Linear(16, V, bias=True)
    assert not fuse_head(model)


# ---- the kernels: on a GPU, or in Triton's interpreter where Triton is installed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_gpu(dtype: torch.dtype) -> None:
    hidden, weight = random(300, 64).cuda().to(dtype), (random(9001, 64, seed=1) * 0.3).cuda().to(dtype)
    tokens = torch.arange(300, device="cuda") * 29
    g, e = random(300, seed=2).cuda(), random(300, seed=3).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for size in (0, 300, 70):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if size:
            logprobs, entropy = score_tokens(x, w, tokens, 0.8, True, chunk_bytes=size * 9001 * hidden.element_size())
        else:
            logprobs, entropy = token_logprobs(x @ w.T, tokens, 0.8, True)
        (logprobs @ g + entropy @ e).backward()
        found.append((logprobs.detach(), entropy.detach(), x.grad, w.grad))
    for got in found[1:]:
        for expected, mine in zip(found[0], got, strict=True):
            assert float((expected.float() - mine.float()).norm() / expected.float().norm()) < (1e-5 if dtype == torch.float32 else 0.01)


def test_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a GPU they run as they are")
    interpreted()
    logits, tokens = random(3, 5000) * 3, torch.tensor([0, 4999, 4096])
    log_z, mean, chosen = torch.empty(3), torch.empty(3), torch.empty(3)
    head._statistics_kernel[(3,)](logits, tokens, log_z, mean, chosen, 5000, 0.7, 4096)
    expected = [torch.empty(3) for _ in range(3)]
    _statistics(logits, tokens, 0.7, *expected)
    for want, got in zip(expected, (log_z, mean, chosen), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    g, e = random(3, seed=1), random(3, seed=2)
    for entropy in (None, e):
        want, got = logits.clone(), logits.clone()
        _gradient(want, tokens, 0.7, log_z, mean, g, entropy)
        head._gradient_kernel[(3, 2)](got, tokens, log_z, mean, g, e, 5000, 0.7, 4096, entropy is not None)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
