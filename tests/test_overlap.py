"""Completions are scored while others are sampled: the two take less than one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_hf.rewards import RewardSettings, Scorer, get_rewards
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.sampler import GroupSampler
from grpo_hf.types import Completion, Prompt
from tests.runs import logs
from tests.tiny import PROMPTS, tiny_tokenizer, tiny_trainer

SLEEP = 0.05


def slow(completion: str) -> float:
    time.sleep(SLEEP)
    return float(len(completion))


class SlowEngine:
    """Groups of four, one in a while, the last first."""

    def __init__(self, engine: Any = None, seconds: float = 0.15):
        self.engine, self.seconds = engine, seconds

    def sync_weights(self) -> None:
        """Hand it on."""
        self.engine.sync_weights()

    def abort(self) -> None:
        """Nothing to give up."""

    def sample(self, prompts: Any, seeds: Any, num_generations: int, sampling: Any) -> Iterator[Any]:
        """The engine's groups, or canned ones, one by one."""
        canned = [(n, [Completion([n, k], truncated=False) for k in range(num_generations)]) for n in range(len(prompts))]
        for group in self.engine.sample(prompts, seeds, num_generations, sampling) if self.engine else reversed(canned):
            time.sleep(self.seconds)
            yield group


def test_scoring_overlaps_sampling() -> None:
    scorer = Scorer(get_rewards(slow), settings=RewardSettings(workers=2))
    sampler = GroupSampler(SlowEngine(), tiny_tokenizer(), scorer)
    prompts = [Prompt(ids=[n], raw="w1", row={"prompt": "w1"}, index=n) for n in range(8)]
    sampler.sample(prompts[:1], [0], 4, Sampling(4, ()))  # starts the workers
    start = time.perf_counter()
    groups = sampler.sample(prompts, list(range(8)), 4, Sampling(4, ()))
    seconds = time.perf_counter() - start
    sampling, scoring = 8 * 0.15, 8 * 4 * SLEEP / 2
    assert [item.reward for group in groups for item in group.completions] == [5.0] * 32
    assert [group.prompt.index for group in groups] == list(range(8))
    assert sampler.tally["slow"].outcomes == {"scored": 32}
    assert seconds < sampling + scoring / 2, "one after the other it is sampling + scoring"


def test_a_training_step_with_a_slow_verifier(tmp_path: Path) -> None:
    """Sampling hides the scoring of all groups but the last: its time is what is left of that."""
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, "reward_workers": 2}
    trainer = tiny_trainer(tmp_path, reward=slow, dataset=PROMPTS * 2, **settings)
    trainer.stream.sampler.engine = SlowEngine(trainer.stream.sampler.engine, seconds=0.3)
    trainer.train()
    entry = logs(trainer)[-1]  # the first step starts the workers
    scoring = 16 * SLEEP / 2
    assert entry["rewards/slow/seconds/mean"] >= SLEEP
    assert entry["time/generate"] >= 4 * 0.3
    assert entry["time/score"] < 0.75 * scoring, "the last group's is a quarter"
