"""KL estimators: values and gradients on a softmax small enough to sum over (trap 19), and the coefficient's controller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.config import KLConfig
from rlhf.ops.kl import KLController, k1, k2, k3, kl_loss

# The policy is nearly even, the reference wants the last token: where a run stands that has something to lose.
POLICY = torch.tensor([0.25, 0.25, 0.2, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.15, 0.15, 0.1, 0.4], dtype=torch.float64)


def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the policy's logits; `objective` maps logprobs to a scalar."""
    logits = POLICY.log().requires_grad_(True)
    (found,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
    return found


TRUE = gradient(lambda logprobs: (logprobs.exp() * (logprobs - REFERENCE.log())).sum())


def in_reward(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Expected gradient when the estimate, as a number, is a cost: E[estimate * grad log p]."""
    return gradient(lambda logprobs: (POLICY * estimator(POLICY.log(), REFERENCE.log()) * logprobs).sum())


def in_loss(estimator: str) -> Tensor:
    """Expected gradient when the estimate is differentiated, on policy."""
    if estimator == "k1":
        return gradient(lambda logprobs: (POLICY * k1(logprobs, REFERENCE.log())).sum())
    return gradient(lambda logprobs: (POLICY * kl_loss(estimator, logprobs, POLICY.log(), REFERENCE.log())).sum())


def cosine(a: Tensor) -> float:
    return float(torch.cosine_similarity(a, TRUE, dim=0))


def length(a: Tensor) -> float:
    return float(a.norm() / TRUE.norm())


def test_trap_19_estimators_that_follow_the_gradient_of_the_kl() -> None:
    """trap 19"""
    for found in (in_reward(k1), in_loss("k2"), in_loss("k3_corrected")):
        torch.testing.assert_close(found, TRUE)


def test_trap_19_plain_k3_in_the_loss_has_the_direction_but_not_the_length() -> None:
    """trap 19"""
    assert 0.9 < cosine(in_loss("k3")) < 0.99
    assert length(in_loss("k3")) > 1.5


def test_trap_19_estimators_that_do_not() -> None:
    """trap 19: k1 in the loss pulls nowhere, k2 and k3 in the reward pull away."""
    assert length(in_loss("k1")) < 1e-12
    assert -0.75 < cosine(in_reward(k2)) < -0.6
    assert -0.9 < cosine(in_reward(k3)) < -0.75


def test_trap_19_only_k3_corrected_is_right_off_policy() -> None:
    """trap 19: samples of an older policy, weighted as the update does."""
    old = torch.tensor([0.4, 0.1, 0.3, 0.05, 0.15], dtype=torch.float64)

    def expected(estimator: str) -> Tensor:
        return gradient(lambda logprobs: (old * kl_loss(estimator, logprobs, old.log(), REFERENCE.log())).sum())

    torch.testing.assert_close(expected("k3_corrected"), TRUE)
    assert cosine(expected("k2")) < 0.9
    assert cosine(expected("k3")) < 0.9


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_corrected"])
def test_trap_19_config_refuses_them_in_the_reward(estimator: str) -> None:
    """trap 19"""
    with pytest.raises(ValueError, match=r"trap 19.*use k1 there"):
        KLConfig(place="reward", estimator=estimator)  # type: ignore[arg-type]
    KLConfig(place="loss", estimator=estimator)  # type: ignore[arg-type]


def test_trap_19_config_refuses_k1_in_the_loss() -> None:
    """trap 19"""
    with pytest.raises(ValueError, match=r"estimator k1 in the loss .*use k2 or k3 or k3_corrected there"):
        KLConfig(place="loss", estimator="k1")
    KLConfig(place="reward", estimator="k1")


def test_values() -> None:
    # One token: log p = -1, log q = -1.5, so q / p = exp(-0.5) = 0.60653.
    p, q = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert k1(p, q).item() == 0.5
    assert k2(p, q).item() == 0.125
    assert k3(p, q).item() == pytest.approx(0.60653 - 1 + 0.5, abs=1e-5)
    # Old policy at -1.2: ratio exp(0.2) = 1.2214.
    assert kl_loss("k3_corrected", p, torch.tensor([-1.2]), q).item() == pytest.approx(1.2214 * 0.10653, abs=1e-5)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    kl = (POLICY * (POLICY / REFERENCE).log()).sum()
    means = {f.__name__: float((POLICY * f(POLICY.log(), REFERENCE.log())).sum() / kl) for f in (k1, k2, k3)}
    assert means["k1"] == pytest.approx(1)
    assert means["k3"] == pytest.approx(1)
    assert abs(means["k2"] - 1) > 0.05


def test_k3_keeps_small_distances() -> None:
    # exp(x) - 1 - x = x^2 / 2 for small x; computed naively in float32 it would be 0 or negative.
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0 + 1e-3])).item() == pytest.approx(5e-7, rel=0.1)


def test_controller_fixed() -> None:
    controller = KLController(0.1)
    controller.update(100.0, 64)
    assert controller.coef == 0.1


def test_controller_adaptive_by_hand() -> None:
    # KL 9 against a target of 6: error 0.5, clipped to 0.2; 64 responses of a horizon of 1,000: factor 1.0128.
    controller = KLController(0.1, True, 6.0, 1000)
    controller.update(9.0, 64)
    assert controller.coef == pytest.approx(0.1 * 1.0128)
    # KL 5.7: error -0.05: factor 0.9968.
    controller.update(5.7, 64)
    assert controller.coef == pytest.approx(0.1 * 1.0128 * 0.9968)
    restored = KLController(0.5, True, 6.0, 1000)
    restored.load_state_dict(controller.state_dict())
    assert restored.coef == controller.coef
