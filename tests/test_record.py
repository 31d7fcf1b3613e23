"""The numbers of a rollout and of a step, by hand."""

from pathlib import Path

import pytest
import torch

from grpo_hf.packing.layout import packed_batch
from grpo_hf.rollout.record import num_padded_tokens, num_tokens
from grpo_hf.training.policy import StepReport
from grpo_hf.types import Completion
from tests.samples import group, random_samples
from tests.tiny import tiny_trainer

GROUPS = [group([1, 2], [[10, 11], [20]]), group([3], [[30, 31, 32]]), group([4, 5], [[40, 41, 42]])]


def test_tokens_when_every_completion_is_a_padded_row() -> None:
    assert num_padded_tokens(GROUPS) == 4 * (2 + 3)


def test_what_a_tool_answered_was_not_sampled() -> None:
    with_tool = group([1], [Completion([7, 90, 91, 8], truncated=False, is_sampled=[True, False, False, True])])
    assert num_tokens(GROUPS) == 2 + 1 + 3 + 3
    assert num_tokens([*GROUPS, with_tool]) == 9 + 2


def test_the_smallest_and_the_largest_share_of_clipped_tokens(tmp_path: Path) -> None:
    """Of two completions one has 1 of 4 tokens clipped, the other 3 of 4, on either side."""
    trainer = tiny_trainer(tmp_path)
    batch = packed_batch(random_samples([(3, [4, 4])]))
    clipped = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    metrics = {"clip_ratio/low": clipped, "clip_ratio/high": clipped}
    trainer.recorder.step(StepReport(torch.tensor(0.5), batches=[batch], metrics=[metrics]))
    logged = trainer.metrics.flush(lambda mine: [mine], steps=1)
    found = {name: logged[f"clip_ratio/{name}"] for name in ("low_mean", "high_mean", "low_min", "high_max")}
    assert found == pytest.approx({"low_mean": 0.5, "high_mean": 0.5, "low_min": 0.25, "high_max": 0.75})
