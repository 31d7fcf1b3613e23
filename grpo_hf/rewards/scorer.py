"""Scoring a rollout while it is sampled: calls begin as samples come in, and what they said is read when all are there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from grpo_hf.rewards.event_loop import EventLoop
from grpo_hf.rewards.faults import Calls, Tally, found_by
from grpo_hf.rewards.outcomes import FAULTS
from grpo_hf.rewards.registry import check_columns
from grpo_hf.rewards.runners import ByEnvironment, InProcess, InWorkers, Result, Runner
from grpo_hf.rewards.settings import RewardSettings
from grpo_hf.rewards.signature import Reward
from grpo_hf.rewards.verdict import Verdict, sample_of
from grpo_hf.rewards.worker import state_parcel, verifier_parcel
from grpo_hf.rewards.workers import Workers
from grpo_hf.types import Completion, Group, Sample

logger = logging.getLogger(__name__)


class Scorer:
    """Verifiers with their weights, and the workers that run them: shared by training and evaluation."""

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float] | None = None, settings: RewardSettings | None = None
    ):
        self.rewards, self.weights = list(rewards), [1.0] * len(rewards) if weights is None else list(weights)
        self.settings = settings = settings or RewardSettings()
        names = [reward.name for reward in rewards]
        if len(self.weights) != len(names):
            raise ValueError(
                f"{len(self.weights)} reward weights for {len(names)} rewards ({', '.join(names)}); give one each"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"two rewards have one name: {', '.join(names)}; get_rewards gives them different ones")
        self.loop = EventLoop(concurrency=settings.concurrency, timeout=settings.timeout)
        self._blank = 0
        self._said: dict[str, set[str]] = {name: set() for name in names}
        self.parcels = {reward.name: verifier_parcel(reward) for reward in self.rewards if reward.in_worker}
        self.workers = Workers(settings, frozenset().union(*(parcel.modules for parcel in self.parcels.values())))

    @contextmanager
    def round(self, trainer_state: Any = None) -> Iterator[Round]:
        """One rollout's calls; they are given up where sampling or scoring raises."""
        try:
            yield Round(self, trainer_state)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; they start again where they are needed."""
        self.workers.pool.close()

    def settle(
        self, groups: Sequence[Group], verdicts: Sequence[Sequence[dict[str, Verdict]]], log_metric: Callable[..., None]
    ) -> Tally:
        """Write what became of each call into the completions, and count."""
        tally: Tally = {reward.name: Calls() for reward in self.rewards}
        for group, rows in zip(groups, verdicts, strict=True):
            for completion in group.completions:  # in the order of the verifiers, and of no earlier ones
                completion.rewards = dict.fromkeys(tally, math.nan)
            for completion, by_name in zip(_judged(group), rows, strict=True):
                for name, verdict in by_name.items():
                    tally[name].add(verdict, group.prompt.index, completion.text)
                    completion.outcomes[name] = verdict.outcome
                    completion.rewards[name] = self._score(verdict)
                    if verdict.outcome not in FAULTS:
                        completion.extra |= verdict.logged.extra
                        for metric, value in verdict.logged.metrics:
                            log_metric(metric, value)
                policies = {self.settings.policy_of(verdict.outcome) for verdict in by_name.values()}
                completion.valid = policies.isdisjoint(("drop", "stop"))
        self._count_blank(groups, tally)
        self._warn(tally)
        return tally

    def _warn(self, tally: Tally) -> None:
        """Say the first fault of each kind when it happens; the others are counted."""
        for name, calls in tally.items():
            for outcome in calls.outcomes.keys() & {*FAULTS} - self._said[name]:
                self._said[name].add(outcome)
                offender = calls.offenders[outcome][0]
                logger.warning(
                    f"The verifier {name!r} ended in {outcome} on row {offender.row}, counted from now on without a word as "
                    f"rewards/{name}/outcomes/{outcome}: {offender.verdict.message}"
                )

    def _count_blank(self, groups: Sequence[Group], tally: Tally) -> None:
        """Count the rollouts in a row in which no completion has got a number, and say so at the first."""
        scores = [score for group in groups for completion in group.completions for score in completion.rewards.values()]
        if scores:
            self._blank = self._blank + 1 if all(map(math.isnan, scores)) else 0
        for calls in tally.values():
            calls.blank_rollouts = self._blank
        if scores and self._blank == 1:
            logger.warning(f"No completion of this rollout has got a number as reward: {found_by(tally)}")

    def _score(self, verdict: Verdict) -> float:
        """Its score, or what the policy makes of its outcome."""
        policy = self.settings.policy_of(verdict.outcome)
        if policy is None:
            return verdict.score
        if policy == "zero":
            return verdict.score if verdict.outcome == "no_answer" else 0.0
        return math.nan


class Round:
    """The calls of one rollout."""

    def __init__(self, scorer: Scorer, trainer_state: Any):
        self.scorer, self.trainer_state = scorer, trainer_state
        self.samples: dict[int, Sequence[Sample]] = {}
        self.results: dict[int, list[dict[str, Result]]] = {}
        self.runners = {reward.name: self._runner(reward) for reward in scorer.rewards}
        self.at_once = [reward.name for reward in scorer.rewards if reward.per_sample]

    def expect(self, rows: Iterable[dict[str, Any]]) -> None:
        """Parse the gold answers of rows before their samples are there."""
        for row in rows:
            for name in self.at_once:
                self.runners[name].expect(row)

    def add(self, place: int, samples: Sequence[Sample]) -> None:
        """Have samples judged; ``place`` is where their verdicts will be."""
        if samples and not self.samples:
            check_columns(self.scorer.rewards, samples[0].row)
        self.samples[place] = samples
        by_name = {name: self.runners[name].submit(samples) for name in self.at_once}
        self.results[place] = [{name: results[n] for name, results in by_name.items()} for n in range(len(samples))]

    def add_group(self, place: int, group: Group) -> None:
        """Have a group's completions judged."""
        self.add(place, [sample_of(group.prompt, completion) for completion in _judged(group)])

    def verdicts(self) -> Iterator[list[dict[str, Verdict]]]:
        """By place in order, and sample: the verdict of each verifier by its name. Called when all samples are there."""
        places = sorted(self.samples)
        samples = [sample for place in places for sample in self.samples[place]]
        rest = [reward for reward in self.scorer.rewards if not reward.per_sample and samples]
        batches = {reward.name: iter(self.runners[reward.name].submit(samples)) for reward in rest}
        for place in places:
            yield [
                {r.name: next(batches[r.name])() if r.name in batches else results[r.name]() for r in self.scorer.rewards}
                for results in self.results[place]
            ]

    def _runner(self, reward: Reward) -> Runner:
        scorer = self.scorer
        if reward.of_environment:
            return ByEnvironment(reward)
        if not reward.in_worker:
            return InProcess(reward, scorer.loop, self.trainer_state)
        more = [state_parcel(_plain(self.trainer_state))] if reward.takes_state else []
        return InWorkers(reward, scorer.parcels[reward.name], scorer.workers, tuple(more))


def score_samples(
    rewards: Sequence[Reward], samples: Sequence[Sample], *, settings: RewardSettings | None = None
) -> Iterator[dict[str, Verdict]]:
    """Score samples outside training: for each in its order the verdict of each verifier, by name, as they come in.

    A verdict has outcome, score, seconds and message. Samples with one row object have its gold answer parsed once.

    Raises:
        ValueError: a column is missing, two rewards have one name, or a verifier cannot be sent to workers.
    """
    scorer = Scorer(rewards, settings=settings)
    try:
        with scorer.round() as scoring:
            for place, sample in enumerate(samples):
                scoring.add(place, [sample])
            for verdicts in scoring.verdicts():
                yield verdicts[0]
    finally:
        scorer.close()


def _judged(group: Group) -> list[Completion]:
    """Its completions but for episodes that are left out since a tool or an environment has failed."""
    return [completion for completion in group.completions if completion.valid]


def _plain(trainer_state: Any) -> Any:
    """The trainer's state with its fields alone, which a worker reads without importing transformers."""
    return SimpleNamespace(**vars(trainer_state)) if is_dataclass(trainer_state) else trainer_state
