"""The ways in which a verifier is called over one rollout: in workers, or in this process as functions or as coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpo_hf.isolation.parcel import Parcel
from grpo_hf.rewards.event_loop import EventLoop
from grpo_hf.rewards.signature import Reward, judge_of, parser_of
from grpo_hf.rewards.verdict import (
    BatchLogged,
    Logged,
    Verdict,
    batch_keywords,
    failed,
    judged,
    judged_batch,
    sample_keywords,
    unpacked,
)
from grpo_hf.rewards.workers import Gold, Workers
from grpo_hf.types import Sample

CANCELLED = (Exception, asyncio.CancelledError)
Result = Callable[[], Verdict]
"""Waits for a sample's verdict."""


class Runner(Protocol):
    """Calls one verifier on the samples of one rollout."""

    def expect(self, row: dict[str, Any]) -> Any:
        """Parse the gold answer of a row, once, before its samples are there."""
        ...

    def submit(self, samples: Sequence[Sample]) -> Sequence[Result]:
        """Have samples judged: one, or, in the batch form, all of the rollout."""
        ...


@dataclass
class InWorkers:
    """Each sample in a worker process from the moment that it is there, or, in the batch form, all in one call."""

    reward: Reward
    parcel: Parcel
    workers: Workers
    more: tuple[Parcel, ...] = ()
    golds: dict[int, Future[list[Gold]]] = field(default_factory=dict)

    def expect(self, row: dict[str, Any]) -> Future[list[Gold]] | None:
        """Parse the gold answer of a row, once; nothing without one."""
        column = self.reward.gold_column
        if column is None:
            return None
        if id(row) not in self.golds:
            self.golds[id(row)] = self.workers.parse_gold(self.parcel, [row[column]])
        return self.golds[id(row)]

    def submit(self, samples: Sequence[Sample]) -> Sequence[Result]:
        """Have samples judged."""
        if not self.reward.per_sample:
            keywords = batch_keywords(self.reward, samples)
            future = self.workers.judge_all(self.parcel, keywords, len(samples), *self.more)
            return [lambda place=place: future.result()[place] for place in range(len(samples))]  # type: ignore[misc]
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Result:
        keywords = sample_keywords(self.reward, sample)
        gold = self.expect(sample.row)
        if gold is not None:
            del keywords[str(self.reward.gold_column)]
        return self.workers.judge(self.parcel, keywords, gold, *self.more).result


@dataclass
class ByEnvironment:
    """No call at all: an environment has judged itself when its episode ended."""

    reward: Reward

    def expect(self, row: dict[str, Any]) -> None:
        """Nothing to parse."""

    def submit(self, samples: Sequence[Sample]) -> Sequence[Result]:
        """What environments of its name have said; it does not apply to the others."""
        known = [item if (item := sample.environment) and item.name == self.reward.name else None for sample in samples]
        return [lambda item=item: item.verdict if item else Verdict("scored") for item in known]  # type: ignore[misc]


@dataclass
class InProcess:
    """Each sample, or all, in this process: functions when their verdict is asked for, async ones on an event loop."""

    reward: Reward
    loop: EventLoop
    trainer_state: Any = None
    golds: dict[int, Verdict | Callable[..., Any]] = field(default_factory=dict)

    def expect(self, row: dict[str, Any]) -> Verdict | Callable[..., Any]:
        """What judges samples of a row, its gold answer parsed, once; a Verdict where that cannot be read."""
        if self.reward.gold_column is None:
            return self.reward.function
        if id(row) not in self.golds:
            parsed = parsed_gold(self.reward, row[self.reward.gold_column])
            column, judge = str(self.reward.gold_column), judge_of(self.reward.function)
            self.golds[id(row)] = (
                parsed if isinstance(parsed, Verdict) else lambda **keywords: judge(**keywords | {column: parsed[0]})
            )
        return self.golds[id(row)]

    def submit(self, samples: Sequence[Sample]) -> Sequence[Result]:
        """Have samples judged."""
        return [self._one(sample) for sample in samples] if self.reward.per_sample else self._all(samples)

    def _one(self, sample: Sample) -> Result:
        function, name = self.expect(sample.row), self.reward.name
        if isinstance(function, Verdict):
            return lambda: function
        logged = Logged()
        keywords = sample_keywords(self.reward, sample) | logged.keywords(self.reward, self.trainer_state)
        if self.reward.gold_column is not None:
            del keywords[self.reward.gold_column]
        if not self.reward.is_async:
            return lambda: replace(judged(name, lambda: function(**unpacked(keywords))), logged=logged)

        def verdict(call: Callable[[], Any], start: float) -> Verdict:
            return replace(judged(name, call, caught=CANCELLED), seconds=time.perf_counter() - start, logged=logged)

        return self.loop.call(lambda: function(**unpacked(keywords)), verdict, self.loop.timeout, 1)

    def _all(self, samples: Sequence[Sample]) -> Sequence[Result]:
        name, logged = self.reward.name, BatchLogged(count=len(samples))
        keywords = batch_keywords(self.reward, samples) | logged.keywords(self.reward, self.trainer_state)
        found: list[Verdict] = []

        def verdicts(call: Callable[[], Any], start: float) -> list[Verdict]:
            return judged_batch(name, call, logged, start, caught=CANCELLED)

        if self.reward.is_async:
            count = len(samples)
            call = lambda: self.reward.function(**unpacked(keywords))  # noqa: E731
            result = self.loop.call(call, verdicts, self.loop.timeout * count, count)
        else:
            result = lambda: verdicts(lambda: self.reward.function(**unpacked(keywords)), time.perf_counter())  # noqa: E731

        def of(place: int) -> Verdict:
            if not found:
                answer = result()
                found.extend(answer if isinstance(answer, list) else [answer] * len(samples))
            return found[place]

        return [lambda place=place: of(place) for place in range(len(samples))]  # type: ignore[misc]


def parsed_gold(reward: Reward, value: Any) -> tuple[Any] | Verdict:
    """A gold answer, parsed here; a Verdict where it cannot be read."""
    start = time.perf_counter()
    try:
        return (parser_of(reward.function)(value),)
    except Exception as error:
        return failed(error, time.perf_counter() - start, "bad_gold")
