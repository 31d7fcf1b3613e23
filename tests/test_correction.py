"""Engine-mismatch weights and the numbers that are logged beside them, worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from grpo_hf.algorithm.correction import CORRECTION_MODES, corrected, measured, off_policy_masked
from grpo_hf.types import TokenBatch
from tests.batches import token_batch

NAN = float("nan")


def sampled(engine_ratios: list[float], completion: list[int] | None = None) -> TokenBatch:
    """Tokens by π_old / μ; their π_θ is not π_old, which changes nothing here."""
    return token_batch([1.3] * len(engine_ratios), completion=completion, engine_ratios=engine_ratios)


def metrics_of(factor: Callable[[TokenBatch], Any], batch: TokenBatch) -> dict[str, list[float]]:
    return {name.removeprefix("sampling/"): values.tolist() for name, values in factor(batch)[1].items()}


# Completion 0 has tokens 0 and 2 at twice the engine's probability, completion 1 has token 1 at half of it.
BATCH = sampled([2.0, 0.5, 2.0], [0, 1, 0])


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, None, [2.0, 0.5, 2.0]),
        ("token_truncate", None, 1.5, [1.5, 0.5, 1.5]),
        ("token_truncate", 0.8, 3.0, [2.0, 0.8, 2.0]),
        ("token_mask", None, None, [2.0, 0.5, 2.0]),
        ("token_mask", None, 1.5, [0.0, 0.5, 0.0]),
        ("token_mask", 0.8, 3.0, [2.0, 0.0, 2.0]),
        ("sequence_truncate", None, None, [4.0, 0.5, 4.0]),  # 2 x 2
        ("sequence_truncate", None, 3.0, [3.0, 0.5, 3.0]),
        ("sequence_truncate", 0.8, 5.0, [4.0, 0.8, 4.0]),
        ("sequence_mask", None, None, [4.0, 0.5, 4.0]),
        ("sequence_mask", None, 3.0, [0.0, 0.5, 0.0]),
        ("sequence_mask", 0.8, 5.0, [4.0, 0.0, 4.0]),
        ("geometric_truncate", 0.8, 1.5, [1.5, 0.8, 1.5]),
        ("geometric_mask", None, 3.0, [2.0, 0.5, 2.0]),  # √(2 x 2)
        ("geometric_mask", 0.99, 3.0, [2.0, 0.0, 2.0]),
    ],
)
def test_modes(mode: str, low: float | None, high: float | None, expected: list[float]) -> None:
    weights, _ = corrected(BATCH, mode=mode, low=low, high=high)
    assert weights.tolist() == pytest.approx(expected)


def test_the_default_masks_sequences_above_3() -> None:
    assert corrected(BATCH)[0].tolist() == pytest.approx([0.0, 0.5, 0.0])
    nearer = replace(BATCH, old_logprobs=BATCH.old_logprobs - 0.15)
    assert corrected(nearer)[0][0].item() == pytest.approx(4 * math.exp(-0.3))  # 2.963


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_equal_logprobs_weigh_exactly_1(mode: str) -> None:
    equal = replace(BATCH, rollout_logprobs=BATCH.old_logprobs)
    assert corrected(equal, mode=mode, low=1.0, high=1.0)[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "factor", [measured, *(partial(corrected, mode=mode) for mode in CORRECTION_MODES)], ids=["measured", *CORRECTION_MODES]
)
def test_weights_are_constants(factor: Callable[[TokenBatch], Any]) -> None:
    weights, metrics = factor(replace(BATCH, old_logprobs=BATCH.logprobs))
    assert not any(values.requires_grad for values in (weights, *metrics.values()))


@pytest.mark.parametrize(("mode", "expected"), [("token_truncate", 3.0), ("token_mask", 0.0), ("sequence_mask", 0.0)])
def test_a_weight_past_the_largest_float_is_bounded_too(mode: str, expected: float) -> None:
    far = replace(sampled([1.0]), rollout_logprobs=torch.tensor([-1000.0]))
    assert corrected(far, mode=mode)[0].tolist() == [expected]


def test_modes_are_named_as_documented() -> None:
    trls = {"token_truncate", "token_mask", "sequence_truncate", "sequence_mask"}
    assert set(CORRECTION_MODES) == {*trls, "geometric_truncate", "geometric_mask"}


def test_completions_that_the_policy_has_left_are_masked_where_they_were_worse() -> None:
    # log μ - log π_θ: completion 0 has ln 4 and 0, mean ln 2; completion 1 the same with A > 0; completion 2 has 0.1.
    batch = token_batch([0.25, 1.0, 0.25, 1.0, math.exp(-0.1)], [-1.0, -1.0, 1.0, 1.0, -1.0], completion=[0, 0, 1, 1, 2])
    weights, metrics = off_policy_masked(batch, threshold=0.5)
    assert weights.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert metrics["off_policy_mask_ratio"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert off_policy_masked(batch, threshold=0.7)[0].tolist() == [1.0] * 5
    # Where the engine gives log-probs they count: completion 0 has -ln 4 + ln 4 = 0 and a token without one.
    engine = replace(batch, rollout_logprobs=batch.old_logprobs + torch.tensor([math.log(0.25), NAN, 0.0, 0.0, 0.0]))
    assert off_policy_masked(engine, threshold=0.5)[0].tolist() == [1.0] * 5


# ---- What is logged


RATIOS = [2.0, 1.0, 4.0, 0.5]
LN2 = math.log(2)


def test_without_correction_the_difference_and_the_kl_are_measured() -> None:
    weights, _ = measured(sampled(RATIOS, [0, 0, 1, 1]))
    assert weights.tolist() == [1.0] * 4
    metrics = metrics_of(measured, sampled(RATIOS, [0, 0, 1, 1]))
    assert metrics.keys() == {"sampling_logp_difference", "kl", "frac_without_logprobs"}
    assert metrics["sampling_logp_difference"] == pytest.approx([LN2, 0, 2 * LN2, LN2])
    assert metrics["kl"] == pytest.approx([1 - LN2, 0, 3 - 2 * LN2, -0.5 + LN2])
    assert metrics["frac_without_logprobs"] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "low", "high", "ratio", "bounded"),
    [
        ("token_truncate", None, 3.0, [2, 1, 4, 0.5], [0, 0, 1, 0]),
        ("token_mask", 0.8, 3.0, [2, 1, 4, 0.5], [0, 0, 1, 1]),
        ("sequence_mask", None, 1.5, [2, 2, 2, 2], [1, 1, 1, 1]),
        ("sequence_mask", None, 3.0, [2, 2, 2, 2], [0, 0, 0, 0]),
    ],
)
def test_weights_are_logged_before_their_bounds(mode, low, high, ratio, bounded) -> None:
    factor = partial(corrected, mode=mode, low=low, high=high)
    metrics = metrics_of(factor, sampled(RATIOS, [0, 0, 1, 1]))
    assert metrics["importance_sampling_ratio"] == pytest.approx(ratio)
    assert metrics["frac_weights_bounded"] == bounded
    assert metrics["sampling_logp_difference"] == pytest.approx([LN2, 0, 2 * LN2, LN2])


# ---- What an engine does not give


@pytest.mark.parametrize(
    "factor", [measured, *(partial(corrected, mode=mode) for mode in CORRECTION_MODES)], ids=["measured", *CORRECTION_MODES]
)
def test_without_an_engines_logprobs_there_is_nothing_to_correct(factor: Callable[[TokenBatch], Any]) -> None:
    weights, metrics = factor(token_batch([1.5, 0.5]))
    assert weights.tolist() == [1.0, 1.0]
    assert metrics == {}


@pytest.mark.parametrize(
    ("mode", "high", "weights", "ratio", "bounded"),
    [
        ("token_truncate", 1.5, [1.5, 1.0, 1.5, 1.0, 0.5], [2, NAN, 4, NAN, 0.5], [1, NAN, 1, NAN, 0]),
        ("token_mask", 3.0, [2.0, 1.0, 0.0, 1.0, 0.5], [2, NAN, 4, NAN, 0.5], [0, NAN, 1, NAN, 0]),
        # Completion 0's known tokens have 2 x 4, completion 1's one 0.5, whatever the missing tokens are.
        ("sequence_truncate", 3.0, [3.0, 1.0, 3.0, 1.0, 0.5], [8, NAN, 8, NAN, 0.5], [1, NAN, 1, NAN, 0]),
        ("sequence_mask", 3.0, [0.0, 1.0, 0.0, 1.0, 0.5], [8, NAN, 8, NAN, 0.5], [1, NAN, 1, NAN, 0]),
        # √(2 x 4), over the two that are known.
        ("geometric_mask", 3.0, [8**0.5, 1.0, 8**0.5, 1.0, 0.5], [8**0.5, NAN, 8**0.5, NAN, 0.5], [0, NAN, 0, NAN, 0]),
    ],
)
def test_a_missing_logprob_has_weight_1_and_is_in_no_sum_and_no_metric(mode, high, weights, ratio, bounded) -> None:
    batch = sampled([2.0, NAN, 4.0, NAN, 0.5], [0, 0, 0, 1, 1])
    factor = partial(corrected, mode=mode, high=high)
    assert factor(batch)[0].tolist() == pytest.approx(weights)
    metrics = metrics_of(factor, batch)
    assert metrics["importance_sampling_ratio"] == pytest.approx(ratio, nan_ok=True)
    assert metrics["frac_weights_bounded"] == pytest.approx(bounded, nan_ok=True)
    assert metrics["frac_without_logprobs"] == [0, 1, 0, 1, 0]


def test_a_missing_logprob_is_measured_as_missing() -> None:
    metrics = metrics_of(measured, sampled([2.0, NAN]))
    assert metrics["sampling_logp_difference"] == pytest.approx([LN2, NAN], nan_ok=True)
    assert metrics["kl"] == pytest.approx([1 - LN2, NAN], nan_ok=True)
    assert metrics["frac_without_logprobs"] == [0, 1]
