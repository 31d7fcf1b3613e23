"""One verifier on a few samples in this process, for tests of what it scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo_hf.rewards import FAULTS, Reward, RewardSettings, Scorer
from grpo_hf.types import Sample


def score(reward: Reward, samples: list[Sample], *, trainer_state: Any = None, timeout: float = 60.0) -> list[float]:
    """Each sample's score; a fault is an error with its message."""
    scorer = Scorer([replace(reward, in_process=True)], settings=RewardSettings(timeout=timeout))
    with scorer.round(trainer_state) as scoring:
        scoring.add(0, samples)
        (verdicts,) = scoring.verdicts()
    found = [by_name[reward.name] for by_name in verdicts]
    for verdict in found:
        if verdict.outcome in FAULTS:
            raise ValueError(verdict.message)
    return [verdict.score for verdict in found]
