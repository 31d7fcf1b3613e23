"""Invariant 4."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_hf.algorithm.objective import Objective
from tests.tiny import tiny_trainer


@pytest.mark.parametrize(("updates_per_rollout", "num_iterations"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_first_ratio_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates_per_rollout: int, num_iterations: int
) -> None:
    """On the first update of a fresh rollout the ratio is exactly 1 and nothing is clipped.

    On a rollout's later updates the weights have moved, and so has the ratio.
    """
    steps = updates_per_rollout * num_iterations
    trainer = tiny_trainer(
        tmp_path,
        max_steps=2 * steps,
        learning_rate=0.03,
        steps_per_generation=updates_per_rollout,
        num_iterations=num_iterations,
        tokens_per_microbatch=40,
    )
    ratios: dict[int, list[Tensor]] = defaultdict(list)
    parts = Objective.parts

    def observed(self, batch, denominators):
        ratios[trainer.state.global_step].append((batch.logprobs - batch.old_logprobs).detach().exp())
        return parts(self, batch, denominators)

    monkeypatch.setattr(Objective, "parts", observed)
    trainer.train()
    clipped = [line["clip_ratio/region_mean"] for line in trainer.state.log_history if "loss" in line]
    assert sorted(ratios) == list(range(2 * steps))
    for step, found in ratios.items():
        is_first = step % steps == 0
        assert bool((torch.cat(found) == 1).all()) is is_first
        assert (clipped[step] == 0) is is_first
