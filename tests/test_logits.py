"""Log-probs and entropy of a distribution that one can hold in the head."""

import math

import pytest
import torch

from grpo_hf.algorithm.logits import entropy, token_logprobs

LN2 = math.log(2)
LOGITS = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log() + 7.0  # a constant changes nothing


def test_token_logprobs() -> None:
    assert token_logprobs(LOGITS.expand(3, 3), torch.tensor([0, 1, 2])).tolist() == pytest.approx(
        [-LN2, -2 * LN2, -2 * LN2], abs=1e-6
    )


def test_temperature_divides_the_logits() -> None:
    # T = 2 takes square roots: 0.7071, 0.5, 0.5 over 1.7071 is 0.4142, 0.2929, 0.2929.
    logprobs = token_logprobs(LOGITS.expand(2, 3), torch.tensor([0, 1]), 2.0)
    assert logprobs.tolist() == pytest.approx([-0.8813736, -1.2279472], abs=1e-6)
    # 0.4142136 x 0.8813736 + 2 x 0.2928932 x 1.2279472.
    assert entropy(LOGITS, 2.0).item() == pytest.approx(1.0843922, abs=1e-6)


def test_entropy() -> None:
    assert entropy(LOGITS).item() == pytest.approx(1.5 * LN2, abs=1e-6)  # 1/2 ln 2 + 2 x 1/4 x 2 ln 2
    assert entropy(torch.zeros(8)).item() == pytest.approx(3 * LN2, abs=1e-6)
    assert entropy(torch.tensor([1e4, 0.0, 0.0])).item() == 0.0


def test_batch_axes_are_kept() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(24).reshape(2, 3, 4) % 5
    logprobs = token_logprobs(logits, ids)
    assert logprobs.shape == entropy(logits).shape == (2, 3, 4)
    row = logits[1, 2, 3].double().exp()
    assert logprobs[1, 2, 3].item() == pytest.approx(math.log(row[23 % 5] / row.sum()), abs=1e-5)


def test_large_logits_do_not_overflow() -> None:
    assert token_logprobs(torch.tensor([1e4, 0.0]), torch.tensor(1)).item() == -1e4


def test_a_masked_entry_has_no_share_of_the_entropy() -> None:
    logits = torch.tensor([1.0, 1.0, -torch.inf], requires_grad=True)
    value = entropy(logits)
    assert value.item() == pytest.approx(LN2)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_gradient_of_a_logprob_is_one_less_its_probability() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(token_logprobs(logits, torch.tensor(1), 2.0), logits)
    # (onehot - p) / T with p of the temperature test.
    assert gradient.tolist() == pytest.approx([-0.2071068, 0.3535534, -0.1464466], abs=1e-6)
