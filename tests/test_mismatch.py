"""The numbers of engine against trainer, by hand."""

import math

import pytest
import torch

from grpo_hf.algorithm.mismatch import mismatch
from grpo_hf.algorithm.objective import engine_correction

RATIO = torch.tensor([2.0, 1.0, 4.0, 0.5])
ROLLOUT = torch.tensor([-1.0, -2.0, -3.0, -0.5])
SEQUENCE = torch.tensor([0, 0, 1, 1])


def measured(mode: str | None, low: float | None = None, high: float | None = 3.0) -> dict[str, list[float]]:
    correction = None if mode is None else engine_correction(mode, low, high)
    values = mismatch(ROLLOUT + RATIO.log(), ROLLOUT, SEQUENCE, 2, correction)
    return {name.removeprefix("sampling/"): value.tolist() for name, value in values.items()}


def test_difference_and_kl() -> None:
    values = measured(None)
    assert values.keys() == {"sampling_logp_difference", "kl"}
    ln2 = math.log(2)
    assert values["sampling_logp_difference"] == pytest.approx([ln2, 0, 2 * ln2, ln2])
    assert values["kl"] == pytest.approx([1 - ln2, 0, 3 - 2 * ln2, -0.5 + ln2])


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
    values = measured(mode, low, high)
    assert values["importance_sampling_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert values["frac_weights_bounded"] == bounded
