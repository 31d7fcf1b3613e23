"""Invariant 3."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.invariants.one_step import gradient_of_one_step
from tests.tiny import relative_error, tiny_model


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("flat_from", [1, 3])
def test_dropping_zero_signal_leaves_the_gradient(tmp_path: Path, loss_type: str, flat_from: int) -> None:
    """Dropping zero-signal groups leaves the gradient identical.

    To the last bit where the other completions are computed in the same forward passes with and without them, here in
    one each. In a longer row matrix products round otherwise, which is all that changes.
    """

    def gradient(*, keep: bool, budget: int) -> dict[str, Tensor]:
        options = {"loss_type": loss_type, "flat_from": flat_from, "tokens_per_microbatch": budget}
        return gradient_of_one_step(tmp_path, keep_zero_signal=keep, **options)

    dropped, kept = gradient(keep=False, budget=1), gradient(keep=True, budget=1)
    assert all(torch.equal(dropped[name], kept[name]) for name in kept)
    assert relative_error(gradient(keep=False, budget=10_000), gradient(keep=True, budget=10_000)) < 1e-5


@pytest.mark.parametrize("keep", [False, True])
def test_without_any_signal_the_gradient_is_zeros(tmp_path: Path, keep: bool) -> None:
    """Zeros, not None: the optimizer's momentum goes on, and other processes find what they wait for."""
    gradient = gradient_of_one_step(tmp_path, keep_zero_signal=keep, flat_from=0)
    assert len(gradient) > 10
    assert all(torch.equal(part, torch.zeros_like(part)) for part in gradient.values())


def test_masked_completions_leave_zeros_too(tmp_path: Path) -> None:
    """All are cut off at two tokens and left out of the loss, whatever their advantages."""
    settings = {"max_completion_length": 2, "mask_truncated_completions": True}
    gradient = gradient_of_one_step(tmp_path, model=tiny_model(), **settings)
    assert not any(bool(part.any()) for part in gradient.values())
