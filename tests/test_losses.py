"""Policy losses, their gradients and the ratios they take, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from grpo_hf.algorithm.losses import LEVELS, LOSSES, clip_masks, clipped

RATIOS = [1.5, 0.5, 1.5, 0.5]
ADVANTAGES = [1.0, 1.0, -1.0, -1.0]


def run(loss: str, ratios: list[float], advantages: list[float], **options: float) -> tuple[list[float], list[float]]:
    """Losses and their gradient by log π_θ, where every sampled token has log π_θ = -1."""
    logprobs = torch.full((len(ratios),), -1.0, dtype=torch.float64, requires_grad=True)
    old_logprobs = -1.0 - torch.tensor(ratios, dtype=torch.float64).log()
    sequence = torch.arange(len(ratios))
    log_ratio = LEVELS["token"](logprobs, old_logprobs, sequence, len(ratios))
    losses = LOSSES[loss](logprobs, log_ratio, torch.tensor(advantages, dtype=torch.float64), **options)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.tolist(), gradient.tolist()


def test_naive() -> None:
    losses, gradient = run("naive", [1.5, 0.5], [2.0, -3.0])
    assert losses == pytest.approx([2.0, -3.0])  # -A x -1, whatever the ratio
    assert gradient == pytest.approx([-2.0, 3.0])


def test_unclipped() -> None:
    losses, gradient = run("unclipped", RATIOS, ADVANTAGES)
    assert losses == pytest.approx([-1.5, -0.5, 1.5, 0.5])
    assert gradient == pytest.approx([-1.5, -0.5, 1.5, 0.5])  # d exp(x) = exp(x)


def test_clipped_takes_the_worse_of_ratio_and_clip() -> None:
    losses, gradient = run("clipped", RATIOS, ADVANTAGES, epsilon=0.2)
    # min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8), each times -1.
    assert losses == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert gradient == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_clipped_with_its_own_upper_epsilon() -> None:
    losses, gradient = run("clipped", [1.5, 1.3, 0.5], [1.0, 1.0, -1.0], epsilon=0.2, epsilon_high=0.4)
    assert losses == pytest.approx([-1.4, -1.3, 0.8])
    assert gradient == pytest.approx([0.0, -1.3, 0.0])


def test_delta_bounds_the_ratio_where_the_clip_does_not() -> None:
    losses, gradient = run("clipped", [10.0, 3.5, 10.0, 0.5], [-1.0, -1.0, 1.0, 1.0], epsilon=0.2, delta=4.0)
    # Without it the first would be 10; the second is inside; the others are the clip's business.
    assert losses == pytest.approx([4.0, 3.5, -1.2, -0.5])
    assert gradient == pytest.approx([0.0, 3.5, 0.0, -0.5])


def test_cispo_clips_the_weight_and_never_the_gradient() -> None:
    losses, gradient = run("cispo", RATIOS, ADVANTAGES, epsilon_high=1.2)
    # Weights 1.2, 0.5, 1.2, 0.5; log π_θ = -1.
    assert losses == pytest.approx([1.2, 0.5, -1.2, -0.5])
    assert gradient == pytest.approx([-1.2, -0.5, 1.2, 0.5])


def test_cispo_without_a_bound_weighs_by_the_ratio() -> None:
    assert run("cispo", [9.0], [1.0])[1] == pytest.approx([-9.0])


def test_sapo_is_a_sigmoid_gate() -> None:
    # At τ (r - 1) = ln 3 the sigmoid is 3/4: L = -A 3/4 4/τ; dL/dlog r = -A 4 (3/4)(1/4) r.
    positive, negative = 1 + math.log(3), 1 + math.log(3) / 2
    losses, gradient = run("sapo", [positive, negative], [1.0, -1.0], sapo_temperature_pos=1.0, sapo_temperature_neg=2.0)
    assert losses == pytest.approx([-3.0, 1.5])
    assert gradient == pytest.approx([-0.75 * positive, 0.75 * negative])


def test_sapo_gate_closes_far_from_1() -> None:
    assert abs(run("sapo", [30.0], [1.0])[1][0]) < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_every_loss_has_reinforces_gradient(loss: str) -> None:
    assert run(loss, [1.0, 1.0, 1.0], [2.0, -3.0, 0.0])[1] == pytest.approx([-2.0, 3.0, 0.0])


@pytest.mark.parametrize("loss", LOSSES)
def test_no_advantage_no_gradient(loss: str) -> None:
    assert run(loss, [0.1, 1.0, 7.0], [0.0, 0.0, 0.0])[1] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"naive", "cispo"}))  # these two are not functions of the ratio
def test_gradient_is_the_finite_difference(loss: str) -> None:
    ratios, advantages = [0.5, 0.9, 1.1, 1.7] * 2, [1.3] * 4 + [-0.7] * 4
    step = 1e-6
    up = run(loss, [ratio * math.exp(step) for ratio in ratios], advantages)[0]
    down = run(loss, [ratio * math.exp(-step) for ratio in ratios], advantages)[0]
    slope = [(high - low) / (2 * step) for high, low in zip(up, down, strict=True)]
    assert run(loss, ratios, advantages)[1] == pytest.approx(slope, abs=1e-6)


def test_a_ratio_is_exp_of_the_difference() -> None:
    def ratio(level: str) -> float:
        return LEVELS[level](torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([0]), 1).exp().item()

    # The quotient of the log-probs would be 2.
    assert ratio("token") == pytest.approx(0.3678794)
    assert ratio("sequence") == pytest.approx(0.3678794)


@pytest.mark.parametrize("level", LEVELS)
def test_old_logprobs_are_constants(level: str) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    log_ratio = LEVELS[level](logprobs, logprobs, torch.tensor([0, 1]), 2)  # the very same tensor, not detached
    assert log_ratio.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(log_ratio.exp().sum(), logprobs)
    assert gradient.tolist() == [1.0, 1.0]


def interleaved() -> tuple[Tensor, Tensor, Tensor]:
    """Completion 0 has the first and the third token, completion 1 the second; log-prob differences 0.2, -0.1, 0.4."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    return logprobs, logprobs.detach() - torch.tensor([0.2, -0.1, 0.4]), torch.tensor([0, 1, 0])


def test_sequence_level_is_the_mean_difference_of_the_completion() -> None:
    logprobs, old_logprobs, sequence = interleaved()
    log_ratio = LEVELS["sequence"](logprobs, old_logprobs, sequence, 2)
    assert log_ratio.tolist() == pytest.approx([0.3, -0.1, 0.3])
    # Each token of completion 0 moves the first token's ratio by a half.
    (gradient,) = torch.autograd.grad(log_ratio[0], logprobs)
    assert gradient.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_gspo_clips_whole_completions() -> None:
    logprobs, old_logprobs, sequence = interleaved()
    log_ratio = LEVELS["sequence"](logprobs, old_logprobs, sequence, 2)
    losses = clipped(logprobs, log_ratio, torch.ones(3, dtype=torch.float64), epsilon=0.2)
    # exp(0.3) = 1.35 is clipped at 1.2, on the token whose own ratio is exp(0.2) = 1.22 too; exp(-0.1) = 0.9048.
    assert losses.tolist() == pytest.approx([-1.2, -0.9048374, -1.2])
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0.0, -0.9048374, 0.0])


def test_clip_masks() -> None:
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 1.3]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    low, high = clip_masks(log_ratio, advantages, epsilon=0.2, epsilon_high=0.4)
    assert low.tolist() == [False, False, False, True, False, False]
    assert high.tolist() == [True, False, False, False, False, False]
    assert clip_masks(log_ratio, advantages, epsilon=0.2)[1].tolist() == [True, False, False, False, False, True]


def test_clip_masks_say_where_the_gradient_is_0() -> None:
    ratios = [0.3, 0.7, 0.95, 1.0, 1.1, 1.25, 1.6] * 2
    advantages = [1.0] * 7 + [-2.0] * 7
    gradient = run("clipped", ratios, advantages, epsilon=0.2)[1]
    low, high = clip_masks(torch.tensor(ratios).log(), torch.tensor(advantages), epsilon=0.2)
    assert (low | high).tolist() == [value == 0 for value in gradient]
