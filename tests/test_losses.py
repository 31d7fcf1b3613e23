"""Policy losses, their gradients and the ratios they take, against numbers worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from grpo_hf.algorithm.losses import (
    LEVELS,
    LOSSES,
    cispo,
    clip_cov,
    clipped,
    dppo_kl,
    dppo_tv,
    gmpo,
    kl_cov,
    reinforce,
    sapo,
    unclipped,
    vespo,
)
from grpo_hf.algorithm.selection import covariance_band, highest_covariance, selections_of, top_entropy
from grpo_hf.types import TokenBatch
from tests.batches import token_batch

RATIOS = [1.5, 0.5, 1.5, 0.5]
ADVANTAGES = [1.0, 1.0, -1.0, -1.0]
FUNCTIONS = {function.__name__: function for function, _ in LOSSES.values()}
ALL = {**FUNCTIONS, "cispo": partial(cispo, epsilon_high=5.0)}


def run(
    loss: Callable[..., Any], ratios: list[float], advantages: list[float], **options: Any
) -> tuple[list[float], list[float]]:
    """Losses and their gradient by log π_θ, where every sampled token has log π_θ = -1."""
    batch = token_batch(ratios, advantages)
    batch = replace(batch, selected={name: select(batch) for name, select in selections_of(loss).items()})
    losses, _ = loss(batch, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    return losses.tolist(), gradient.tolist()


def test_reinforce() -> None:
    losses, gradient = run(reinforce, [1.5, 0.5], [2.0, -3.0])
    assert losses == pytest.approx([2.0, -3.0])  # -A x -1, whatever the ratio
    assert gradient == pytest.approx([-2.0, 3.0])


def test_unclipped() -> None:
    losses, gradient = run(unclipped, RATIOS, ADVANTAGES)
    assert losses == pytest.approx([-1.5, -0.5, 1.5, 0.5])
    assert gradient == pytest.approx([-1.5, -0.5, 1.5, 0.5])  # d exp(x) = exp(x)


def test_clipped_takes_the_worse_of_ratio_and_clip() -> None:
    losses, gradient = run(clipped, RATIOS, ADVANTAGES, epsilon=0.2)
    # min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8), each times -1.
    assert losses == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert gradient == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_clipped_with_its_own_upper_epsilon() -> None:
    losses, gradient = run(clipped, [1.5, 1.3, 0.5], [1.0, 1.0, -1.0], epsilon=0.2, epsilon_high=0.4)
    assert losses == pytest.approx([-1.4, -1.3, 0.8])
    assert gradient == pytest.approx([0.0, -1.3, 0.0])


def test_delta_bounds_the_ratio_where_the_clip_does_not() -> None:
    losses, gradient = run(clipped, [10.0, 3.5, 10.0, 0.5], [-1.0, -1.0, 1.0, 1.0], epsilon=0.2, delta=4.0)
    # Without it the first would be 10; the second is inside; the others are the clip's business.
    assert losses == pytest.approx([4.0, 3.5, -1.2, -0.5])
    assert gradient == pytest.approx([0.0, 3.5, 0.0, -0.5])


def test_cispo_clips_the_weight_and_never_the_gradient() -> None:
    losses, gradient = run(cispo, RATIOS, ADVANTAGES, epsilon_high=1.2)
    # Weights 1.2, 0.5, 1.2, 0.5; log π_θ = -1.
    assert losses == pytest.approx([1.2, 0.5, -1.2, -0.5])
    assert gradient == pytest.approx([-1.2, -0.5, 1.2, 0.5])


def test_cispo_without_a_bound_weighs_by_the_ratio() -> None:
    assert run(cispo, [9.0], [1.0], epsilon_high=math.inf)[1] == pytest.approx([-9.0])


def test_sapo_is_a_sigmoid_gate() -> None:
    # At τ (r - 1) = ln 3 the sigmoid is 3/4: L = -A 3/4 4/τ; dL/dlog r = -A 4 (3/4)(1/4) r.
    positive, negative = 1 + math.log(3), 1 + math.log(3) / 2
    losses, gradient = run(sapo, [positive, negative], [1.0, -1.0], sapo_temperature_pos=1.0, sapo_temperature_neg=2.0)
    assert losses == pytest.approx([-3.0, 1.5])
    assert gradient == pytest.approx([-0.75 * positive, 0.75 * negative])


def test_sapo_gate_closes_far_from_1() -> None:
    assert abs(run(sapo, [30.0], [1.0])[1][0]) < 1e-9


def test_gmpo_is_the_geometric_mean_of_ratios_that_are_clipped_in_log_space() -> None:
    # Completion 0: 0.4 for its log-ratio 0.9, and -0.2: exp(0.1). Completion 1, A = -2: -0.4 for -0.9, and 0.2: exp(-0.1).
    ratios = [math.exp(value) for value in (0.9, -0.2, -0.9, 0.2)]
    batch = token_batch(ratios, [1.0, 1.0, -2.0, -2.0], completion=[0, 0, 1, 1])
    losses, metrics = gmpo(batch, epsilon=0.4)
    assert losses.tolist() == pytest.approx([-1.1051709, -1.1051709, 1.8096748, 1.8096748])
    assert metrics["clip_ratio/high"].tolist() == [1, 0, 0, 0]
    assert metrics["clip_ratio/low"].tolist() == [0, 0, 1, 0]
    (gradient,) = torch.autograd.grad(losses.sum() / 2, batch.logprobs)  # the mean over each completion's tokens
    assert gradient.tolist() == pytest.approx([0.0, -1.1051709 / 2, 0.0, 1.8096748 / 2])


def test_vespo_weighs_by_a_gamma_of_the_completions_ratio() -> None:
    # w = 4 x 0.5 = 2: 2^2 e^(3 (1 - 2)) = 4 e^-3. The second, A = -1, w = 0.5: 0.5^3 e^(2 (1 - 0.5)) = e / 8.
    batch = token_batch([4.0, 0.5, 0.5], [1.0, 1.0, -1.0], completion=[0, 0, 1])
    losses, metrics = vespo(batch)
    assert losses.tolist() == pytest.approx([0.1991483, 0.1991483, -0.3397852])  # log π_θ = -1
    assert metrics["vespo/phi_seq"].tolist() == pytest.approx([0.1991483, math.nan, 0.3397852], nan_ok=True)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    assert gradient.tolist() == pytest.approx([-0.1991483, -0.1991483, 0.3397852])
    # The engine's 0.5 and, bounded, 2 for 8: w = 2 x 0.5 x 2; without correction it has no part.
    engine = token_batch([4.0, 0.5], completion=[0, 0], engine_ratios=[0.5, 8.0])
    bounded = vespo(engine, vllm_importance_sampling_clip_max=2.0)[0].tolist()
    assert bounded == pytest.approx([0.1991483] * 2)
    assert vespo(engine, vllm_importance_sampling_correction=False)[0].tolist() == pytest.approx([0.1991483] * 2)
    assert vespo(engine)[0].tolist() != pytest.approx([0.1991483] * 2)
    with pytest.raises(ValueError, match=r"mode='sequence_mask', but loss_type='vespo' .* 'token_truncate' or 'token_mask'"):
        vespo(engine, vllm_importance_sampling_mode="sequence_mask")


@pytest.mark.parametrize(
    ("loss", "epsilon"),
    [
        (dppo_tv, 0.1),  # π_θ = e^-1 = 0.368; π_old by the ratios: 0.245, 0.736, 0.334: steps of 0.123, -0.368 and 0.033
        (dppo_kl, 0.03),  # KL of (0.245, 0.755) and (0.368, 0.632): 0.0344; of 0.736: 0.284; of 0.334: 0.0025
    ],
)
def test_dppo_masks_large_steps_of_probability(loss: Callable[..., Any], epsilon: float) -> None:
    ratios, advantages = [1.5, 0.5, 1.1] * 2, [1.0] * 3 + [-1.0] * 3
    batch = token_batch(ratios, advantages)
    losses, metrics = loss(batch, epsilon=epsilon)
    assert losses.tolist() == pytest.approx([0.0, 0.5, 1.1, -1.5, 0.0, -1.1])
    assert metrics["clip_ratio/high"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["clip_ratio/low"].tolist() == [0, 0, 0, 0, 1, 0]
    assert loss(batch, epsilon=1.0, delta=1.2)[0].tolist() == pytest.approx([1.2, 0.5, 1.1, -1.2, -0.5, -1.1])


def test_which_tokens_change_the_entropy_most() -> None:
    # Deviations of A: 2, 2, -2, -2; of log π_θ: 3, -1, -1, -1: covariances 6, -2, 2, 2.
    logprobs = torch.tensor([0.0, -4.0, -4.0, -4.0])
    batch = replace(token_batch([1.0] * 4, [2.0, 2.0, -2.0, -2.0]), logprobs=logprobs, old_logprobs=logprobs)
    assert highest_covariance(batch).tolist() == [1, 0, 0, 0]
    assert highest_covariance(batch, kl_cov_ratio=0.75).tolist() == [1, 0, 1, 1]
    assert covariance_band(batch, clip_cov_ratio=1.0).tolist() == [0, 0, 1, 1], "above 1 and below 5"
    assert covariance_band(batch).sum() == 1
    assert covariance_band(batch, clip_cov_lb=6.0).tolist() == [0, 0, 0, 0]
    wide = covariance_band(batch, clip_cov_ratio=0.5, clip_cov_lb=-3.0, clip_cov_ub=7.0)
    assert wide[1] == wide[2] + wide[3] == 1, "spread over the band, which begins with the second token"
    moved = replace(batch, old_logprobs=torch.tensor([0.0, -4.0, -3.0, -4.0]))
    assert covariance_band(moved, clip_cov_ratio=1.0).tolist() == [0, 0, 0, 1], "the third is clipped already"


def test_top_entropy_keeps_the_highest_share() -> None:
    batch = replace(token_batch([1.0] * 5), entropy=torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4]))
    # Quantiles 0.8, 0.5, 1 and 0 of 0.1 ... 0.5: 0.42, 0.3, 0.5, 0.1.
    assert top_entropy(batch, top_entropy_quantile=0.2).tolist() == [0, 0, 1, 0, 0]
    assert top_entropy(batch, top_entropy_quantile=0.5).tolist() == [1, 0, 1, 0, 1]
    assert top_entropy(batch, top_entropy_quantile=0.0).tolist() == [0, 0, 1, 0, 0]
    assert top_entropy(batch, top_entropy_quantile=1.0).tolist() == [1] * 5


def test_clip_cov_and_kl_cov_treat_what_is_selected_apart() -> None:
    chosen = torch.tensor([1.0, 0.0, 0.0, 1.0])
    batch = replace(token_batch(RATIOS, ADVANTAGES), selected={"clip_cov": chosen, "kl_cov": chosen})
    assert clip_cov(batch)[0].tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])
    # -A r, and |ln 1.5| x 2 or |ln 0.5| x 2 on those.
    assert kl_cov(batch, kl_cov_coef=2.0)[0].tolist() == pytest.approx([-1.5 + 0.8109302, -0.5, 1.5, 0.5 + 1.3862944])


@pytest.mark.parametrize("loss", ALL)
def test_on_policy_every_loss_has_reinforces_gradient(loss: str) -> None:
    assert run(ALL[loss], [1.0, 1.0, 1.0], [2.0, -3.0, 0.0])[1] == pytest.approx([-2.0, 3.0, 0.0])


@pytest.mark.parametrize("loss", sorted(ALL.keys() - {"kl_cov"}))  # it holds tokens back whatever their advantage is
def test_no_advantage_no_gradient(loss: str) -> None:
    assert run(ALL[loss], [0.1, 1.0, 7.0], [0.0, 0.0, 0.0])[1] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", sorted(ALL.keys() - {"reinforce", "cispo", "vespo", "dppo_tv", "dppo_kl"}))
def test_gradient_is_the_finite_difference(loss: str) -> None:
    """Of those that are functions of the ratio, and not of log π_θ with a constant weight."""
    ratios, advantages = [0.5, 0.9, 1.1, 1.7] * 2, [1.3] * 4 + [-0.7] * 4
    step = 1e-6
    up = run(ALL[loss], [ratio * math.exp(step) for ratio in ratios], advantages)[0]
    down = run(ALL[loss], [ratio * math.exp(-step) for ratio in ratios], advantages)[0]
    slope = [(high - low) / (2 * step) for high, low in zip(up, down, strict=True)]
    assert run(ALL[loss], ratios, advantages)[1] == pytest.approx(slope, abs=1e-6)


def test_a_ratio_is_exp_of_the_difference() -> None:
    batch = replace(token_batch([1.0]), logprobs=torch.tensor([-2.0]), old_logprobs=torch.tensor([-1.0]))
    # The quotient of the log-probs would be 2.
    assert LEVELS["token"](batch).exp().item() == pytest.approx(0.3678794)
    assert LEVELS["sequence"](batch).exp().item() == pytest.approx(0.3678794)


@pytest.mark.parametrize("level", LEVELS)
def test_old_logprobs_are_constants(level: str) -> None:
    batch = token_batch([1.0, 1.0])
    log_ratio = LEVELS[level](replace(batch, old_logprobs=batch.logprobs))  # the very same tensor, not detached
    assert log_ratio.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(log_ratio.exp().sum(), batch.logprobs)
    assert gradient.tolist() == [1.0, 1.0]


def interleaved(**options: Any) -> TokenBatch:
    """Completion 0 has the first and the third token, completion 1 the second; log-prob differences 0.2, -0.1, 0.4."""
    return token_batch([math.exp(0.2), math.exp(-0.1), math.exp(0.4)], completion=[0, 1, 0], **options)


def test_sequence_level_is_the_mean_difference_of_the_completion() -> None:
    batch = interleaved()
    log_ratio = LEVELS["sequence"](batch)
    assert log_ratio.tolist() == pytest.approx([0.3, -0.1, 0.3])
    # Each token of completion 0 moves the first token's ratio by a half.
    (gradient,) = torch.autograd.grad(log_ratio[0], batch.logprobs)
    assert gradient.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_sequence_level_divides_by_the_targets_of_the_whole_completion() -> None:
    # Of 4 and 2 targets; those that are not here have a ratio of 1.
    assert LEVELS["sequence"](interleaved(lengths=[4, 2])).tolist() == pytest.approx([0.15, -0.05, 0.15])


def test_gspo_clips_whole_completions() -> None:
    batch = interleaved()
    losses, metrics = clipped(replace(batch, log_ratio=LEVELS["sequence"](batch)), epsilon=0.2)
    # exp(0.3) = 1.35 is clipped at 1.2, on the token whose own ratio is exp(0.2) = 1.22 too; exp(-0.1) = 0.9048.
    assert losses.tolist() == pytest.approx([-1.2, -0.9048374, -1.2])
    assert metrics["clip_ratio/high"].tolist() == [1.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    assert gradient.tolist() == pytest.approx([0.0, -0.9048374, 0.0])


# ---- Metrics


def metrics_of(
    loss: Callable[..., Any], ratios: list[float], advantages: list[float], **options: Any
) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in loss(token_batch(ratios, advantages), **options)[1].items()}


def test_clip_ratios() -> None:
    ratios, advantages = [1.5, 0.5, 1.5, 0.5, 1.1, 1.3], [1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
    assert metrics_of(clipped, ratios, advantages, epsilon=0.2, epsilon_high=0.4) == {
        "clip_ratio/low": [0, 0, 0, 1, 0, 0],
        "clip_ratio/high": [1, 0, 0, 0, 0, 0],
        "clip_ratio/region": [1, 0, 0, 1, 0, 0],
    }
    assert metrics_of(clipped, ratios, advantages, epsilon=0.2)["clip_ratio/high"] == [1, 0, 0, 0, 0, 1]


def test_the_clip_ratio_says_where_the_gradient_is_0() -> None:
    ratios = [0.3, 0.7, 0.95, 1.0, 1.1, 1.25, 1.6] * 2
    advantages = [1.0] * 7 + [-2.0] * 7
    gradient = run(clipped, ratios, advantages, epsilon=0.2)[1]
    region = metrics_of(clipped, ratios, advantages, epsilon=0.2)["clip_ratio/region"]
    assert region == [value == 0 for value in gradient]


def test_cispos_clip_ratio() -> None:
    assert metrics_of(cispo, [6.0, 4.0, 6.0], [1.0, 1.0, -1.0], epsilon_high=5.0) == {"cispo_clip_ratio": [1, 0, 0]}


@pytest.mark.parametrize("loss", [reinforce, unclipped, sapo])
def test_losses_without_a_clip_have_no_clip_ratio(loss: Callable[..., Any]) -> None:
    assert metrics_of(loss, RATIOS, ADVANTAGES) == {}


# ---- Bad options


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (cispo, {"epsilon_high": 0.28}, "epsilon_high=0.28: .* at least 1"),
        (clipped, {"delta": 1.2}, r"epsilon_high=0.2, delta=1.2, but delta > 1 \+ epsilon_high is needed"),
        (clipped, {"delta": 1.3, "epsilon_high": 0.4}, r"epsilon_high=0.4, delta=1.3, but delta > 1 \+ epsilon_high"),
    ],
)
def test_a_loss_refuses_what_cannot_work(loss: Callable[..., Any], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(token_batch([1.0]), **options)
