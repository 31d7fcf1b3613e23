"""Engine-mismatch weights against numbers worked out by hand."""

import math

import pytest
import torch

from grpo_hf.algorithm.correction import CORRECTION_MODES, correction_weights

# Completion 0 has tokens 0 and 2 at twice the engine's probability, completion 1 has token 1 at half of it.
SEQUENCE = torch.tensor([0, 1, 0])
ROLLOUT = torch.tensor([-1.0, -2.0, -3.0])
OLD = ROLLOUT + torch.tensor([math.log(2), math.log(0.5), math.log(2)])


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
    ],
)
def test_modes(mode: str, low: float | None, high: float | None, expected: list[float]) -> None:
    weights = correction_weights(OLD, ROLLOUT, SEQUENCE, 2, mode=mode, low=low, high=high)
    assert weights.tolist() == pytest.approx(expected)


def test_the_default_masks_sequences_above_3() -> None:
    assert correction_weights(OLD, ROLLOUT, SEQUENCE, 2).tolist() == pytest.approx([0.0, 0.5, 0.0])
    assert correction_weights(OLD - 0.15, ROLLOUT, SEQUENCE, 2)[0].item() == pytest.approx(4 * math.exp(-0.3))  # 2.963


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_equal_logprobs_weigh_exactly_1(mode: str) -> None:
    assert correction_weights(OLD, OLD, SEQUENCE, 2, mode=mode, low=1.0, high=1.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_weights_are_constants(mode: str) -> None:
    old = OLD.clone().requires_grad_()
    assert not correction_weights(old, ROLLOUT, SEQUENCE, 2, mode=mode).requires_grad


@pytest.mark.parametrize(("mode", "expected"), [("token_truncate", 3.0), ("token_mask", 0.0), ("sequence_mask", 0.0)])
def test_a_weight_past_the_largest_float_is_bounded_too(mode: str, expected: float) -> None:
    far = correction_weights(torch.tensor([0.0]), torch.tensor([-1000.0]), torch.tensor([0]), 1, mode=mode)
    assert far.tolist() == [expected]


def test_modes_are_named_as_documented() -> None:
    assert set(CORRECTION_MODES) == {"token_truncate", "token_mask", "sequence_truncate", "sequence_mask"}
