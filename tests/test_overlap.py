"""Completions are scored while others are sampled: shown by the order of events, not by a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @contextmanager
    def requests(self, sampling: Sampling) -> Iterator[PatientRequests]:
        """The engine's groups, one by one."""
        with self.engine.requests(sampling) as requests:
            yield PatientRequests(self, requests)

    def count(self) -> int:
        return self.calls.read_text().count("\n") if self.calls.exists() else 0


class PatientRequests:
    """See PatientEngine."""

    def __init__(self, engine: PatientEngine, requests: Any):
        self.engine, self.requests, self.add = engine, requests, requests.add
        self.earlier, self.handed_on, self.made = engine.count(), 0, []

    def finished(self) -> list[tuple[Any, list[Completion]]]:
        self.made = self.made or self.requests.finished()
        deadline = time.monotonic() + PATIENCE
        while self.engine.count() - self.earlier < self.handed_on and time.monotonic() < deadline:
            time.sleep(0.01)
        self.engine.scored_before.append(self.engine.count() - self.earlier)
        group, *self.made = self.made
        self.handed_on += len(group[1])
        return [group]


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
