"""Completions are scored while others are sampled: shown by the order of events, not by a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_hf.rewards import RewardSettings, Scorer, get_rewards
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.stream import GroupSampler
from grpo_hf.types import Completion, Prompt
from tests.runs import values
from tests.streams import FakeEngine
from tests.tiny import PROMPTS, tiny_tokenizer, tiny_trainer

PATIENCE = 60
"""Seconds after which the order of events is taken to be wrong; nothing takes long when it is right."""


def noting(file: Path) -> Callable[[str], float]:
    """A verifier that writes a line for each call, in whichever process it runs."""
    path = str(file)

    def noted(completion: str) -> float:
        with open(path, "a") as log:
            log.write("called\n")
        return float(len(completion))

    return noted


class PatientEngine:
    """Hands a group on once all groups before it have been scored. Where scoring waits for sampling it waits in vain."""

    def __init__(self, engine: Any, calls: Path):
        self.engine, self.calls = engine, calls
        self.scored_before: list[int] = []
        """How many of a round's completions had been scored when each group was handed on."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The engine's groups, one by one."""
        earlier = self.count()
        for place, group in enumerate(self.engine.sample(prompts, seeds, num_generations, sampling)):
            deadline = time.monotonic() + PATIENCE
            while self.count() - earlier < place * num_generations and time.monotonic() < deadline:
                time.sleep(0.01)
            self.scored_before.append(self.count() - earlier)
            yield group

    def count(self) -> int:
        return self.calls.read_text().count("\n") if self.calls.exists() else 0


def test_scoring_overlaps_sampling(tmp_path: Path) -> None:
    scorer = Scorer(get_rewards(noting(tmp_path / "calls")), settings=RewardSettings(workers=2))
    engine = PatientEngine(FakeEngine(lambda ids, seed, n: [ids[0], n]), tmp_path / "calls")
    sampler = GroupSampler(engine, tiny_tokenizer(), scorer)
    prompts = [Prompt(ids=[n], raw="w1", row={"prompt": "w1"}, index=n) for n in range(8)]
    groups, tally = sampler.sample(prompts, list(range(8)), 4, Sampling(4, ()))
    assert engine.scored_before == [4 * place for place in range(8)]
    assert [item.reward for group in groups for item in group.completions] == [5.0] * 32
    assert [group.prompt.index for group in groups] == list(range(8))
    assert tally["noted"].outcomes == {"scored": 32}
    scorer.close()


def test_a_training_step_scores_while_it_samples(tmp_path: Path) -> None:
    """All groups but the last, in every step; what is left of scoring after that is a phase of its own."""
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, "reward_workers": 2}
    trainer = tiny_trainer(tmp_path, reward=noting(tmp_path / "calls"), dataset=PROMPTS * 2, **settings)
    engine = trainer.stream.sampler.engine = PatientEngine(trainer.stream.sampler.engine, tmp_path / "calls")
    trainer.train()
    assert engine.scored_before == [0, 4, 8, 12] * 2
    assert len(values(trainer, "time/generate")) == len(values(trainer, "time/score")) == 2
