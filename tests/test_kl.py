"""KL estimators: values by hand, and expectations and gradients over a distribution small enough to enumerate."""

import math

import pytest
import torch
from torch import Tensor

from grpo_hf.algorithm.kl import KL_ESTIMATORS, bias_corrected

LN2 = math.log(2)

POLICY = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=torch.float64)
REFERENCE = torch.tensor([1 / 4, 1 / 4, 1 / 2], dtype=torch.float64)
SAMPLER = torch.tensor([1 / 4, 1 / 2, 1 / 4], dtype=torch.float64)

KL = LN2 / 4
"""1/2 log 2 + 1/4 log 1 + 1/4 log 1/2."""
REVERSE_GRADIENT = [0.375 * LN2, -0.0625 * LN2, -0.3125 * LN2]
"""By logits: π_j (log π_j / ref_j - KL), with log ratios ln 2, 0 and -ln 2."""
FORWARD_GRADIENT = [0.25, 0.0, -0.25]
"""Of KL(ref || π) by logits: π - ref."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # At d = log(π_ref / π) = ln 2, 0 and -ln 2.
        ("k1", [-0.6931472, 0.0, 0.6931472]),
        ("k2", [0.2402265, 0.0, 0.2402265]),  # 0.6931472² / 2
        ("k3", [0.3068528, 0.0, 0.1931472]),  # 2 - 0.693 - 1, and 0.5 + 0.693 - 1
    ],
)
def test_values(name: str, expected: list[float]) -> None:
    log_ratio = torch.tensor([LN2, 0.0, -LN2])
    assert KL_ESTIMATORS[name](log_ratio).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", KL), ("k3", KL), ("k2", 0.375 * LN2**2)],  # k2: (1/2 + 1/4) LN2² / 2, near KL but not KL
)
def test_expectation(name: str, expected: float) -> None:
    estimates = KL_ESTIMATORS[name](REFERENCE.log() - POLICY.log())
    assert (POLICY * estimates).sum().item() == pytest.approx(expected)


def expected_value_and_gradient(name: str, sampled_from: Tensor, *, corrected: bool) -> tuple[float, list[float]]:
    """Mean over samples of the estimator, and of its gradient by the policy's logits."""
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    estimates = KL_ESTIMATORS[name](REFERENCE.log() - logprobs)
    if corrected:
        estimates = bias_corrected(estimates, logprobs - sampled_from.log())
    value = (sampled_from * estimates).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient.tolist()


@pytest.mark.parametrize("name", ["k1", "k3"])
@pytest.mark.parametrize("sampled_from", [POLICY, SAMPLER], ids=["on-policy", "off-policy"])
def test_bias_corrected_has_the_reverse_kls_value_and_gradient(name: str, sampled_from: Tensor) -> None:
    value, gradient = expected_value_and_gradient(name, sampled_from, corrected=True)
    assert value == pytest.approx(KL)
    assert gradient == pytest.approx(REVERSE_GRADIENT)


def test_the_correction_leaves_on_policy_values_alone() -> None:
    estimates = torch.tensor([0.3, -0.2])
    assert torch.equal(bias_corrected(estimates, torch.zeros(2)), estimates)
    assert bias_corrected(estimates, torch.tensor([LN2, -LN2])).tolist() == pytest.approx([0.6, -0.1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", [0.0, 0.0, 0.0]), ("k2", REVERSE_GRADIENT), ("k3", FORWARD_GRADIENT)],
)
def test_what_the_plain_estimators_follow_on_policy(name: str, expected: list[float]) -> None:
    gradient = expected_value_and_gradient(name, POLICY, corrected=False)[1]
    assert gradient == pytest.approx(expected, abs=1e-12)
