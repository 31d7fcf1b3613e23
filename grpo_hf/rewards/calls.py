"""The ways in which a verifier is called over one rollout: in workers, here, as async calls, or once for the whole batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_hf.rewards.background import Background
from grpo_hf.rewards.judging import Logged, Verdict, failed, judged, shown
from grpo_hf.rewards.lanes import Gold
from grpo_hf.rewards.parcels import Parcel
from grpo_hf.rewards.samples import batch_keywords, sample_keywords
from grpo_hf.rewards.signature import Reward, judge_of, parser_of
from grpo_hf.rewards.workers import Workers
from grpo_hf.types import Sample

Result = Callable[[], Verdict]
"""Waits for a call's verdict."""


@dataclass
class InWorkers:
    """Each sample in a worker process, from the moment that it is there."""

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

    def submit(self, sample: Sample) -> Result:
        """Have it judged."""
        keywords = sample_keywords(self.reward, sample)
        gold = self.expect(sample.row)
        if gold is not None:
            del keywords[str(self.reward.gold_column)]
        return self.workers.call(self.parcel, keywords, gold, *self.more).result


@dataclass
class Here:
    """Each sample in this process: trivial functions when their verdict is asked for, async ones on an event loop."""

    reward: Reward
    background: Background
    trainer_state: Any = None
    golds: dict[int, Verdict | Callable[..., Any]] = field(default_factory=dict)

    def expect(self, row: dict[str, Any]) -> Verdict | Callable[..., Any]:
        """What judges samples of a row, its gold answer parsed, once; a Verdict where that cannot be read."""
        if self.reward.gold_column is None:
            return self.reward.function
        if id(row) not in self.golds:
            self.golds[id(row)] = self._parsed(row)
        return self.golds[id(row)]

    def submit(self, sample: Sample) -> Result:
        """Have it judged."""
        function = self.expect(sample.row)
        if isinstance(function, Verdict):
            return lambda: function
        logged = Logged()
        keywords = sample_keywords(self.reward, sample) | asked_for(self.reward, logged, self.trainer_state)
        if self.reward.gold_column is not None:
            del keywords[self.reward.gold_column]
        if self.reward.is_async:
            result = self.background.call(self.reward.name, function, keywords)
            return lambda: replace(result(), logged=logged)
        return lambda: replace(judged(self.reward.name, function, keywords), logged=logged)

    def _parsed(self, row: dict[str, Any]) -> Verdict | Callable[..., Any]:
        column = str(self.reward.gold_column)
        start = time.perf_counter()
        try:
            parsed = parser_of(self.reward.function)(row[column])
        except Exception as error:
            return failed(error, time.perf_counter() - start, "bad_gold")
        judge = judge_of(self.reward.function)
        return lambda **keywords: judge(**keywords | {column: parsed})


@dataclass
class Batch:
    """All samples in one call, as TRL makes it, when all are there; an async one from then on beside the others."""

    reward: Reward
    samples: Sequence[Sample]
    background: Background
    trainer_state: Any = None

    def __post_init__(self) -> None:
        self.logged = _BatchLogged(count=len(self.samples))
        keywords = batch_keywords(self.reward, list(self.samples)) if self.samples else {}
        self.keywords = keywords | asked_for(self.reward, self.logged, self.trainer_state)
        self.start = time.perf_counter()
        if self.reward.is_async and self.samples:
            self.future = self.background.call_batch(self.reward.function, self.keywords)

    def verdicts(self) -> list[Verdict]:
        """One a sample; where the call raises it is the same for all."""
        if not self.samples:
            return []
        try:
            values = self.future.result() if self.reward.is_async else self.reward.function(**self.keywords)
            values = checked_list(self.reward.name, values, len(self.samples))
            logged = self.logged.by_sample()
        except Exception as error:
            return [failed(error, (time.perf_counter() - self.start) / len(self.samples))] * len(self.samples)
        seconds = (time.perf_counter() - self.start) / len(self.samples)
        return [
            replace(judged(self.reward.name, lambda value=value: value, {}), seconds=seconds, logged=own)
            for value, own in zip(values, logged, strict=True)
        ]


@dataclass
class _BatchLogged(Logged):
    """Columns of a batch: log_extra adds to a list, one value for each sample in the end, as in TRL."""

    count: int = 0

    def log_extra(self, column: str, value: Any) -> None:
        """Add values to a column."""
        self.extra.setdefault(column, []).extend(value)

    def by_sample(self) -> list[Logged]:
        """Each sample's own values, and the metrics with the first."""
        for column, values in self.extra.items():
            if len(values) != self.count:
                raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {self.count} completions")
        own = [Logged(extra={name: values[n] for name, values in self.extra.items()}) for n in range(self.count)]
        own[0].metrics = self.metrics
        return own


def asked_for(reward: Reward, logged: Logged, trainer_state: Any) -> dict[str, Any]:
    """What the trainer says to a verifier beside its sample, as far as it accepts it."""
    known = logged.keywords() | {"trainer_state": trainer_state}
    return {key: value for key, value in known.items() if reward.accepts(key)}


def checked_list(name: str, scores: Any, count: int) -> Sequence[Any]:
    """What a batch verifier returned, if it is one score a completion.

    Raises:
        ValueError: it is not a list, or of another length.
    """
    listed = isinstance(scores, Sequence) and not isinstance(scores, str | bytes)
    if not (listed or getattr(scores, "ndim", None) == 1):
        raise ValueError(f"the verifier {name!r} returned {shown(scores)}; expected a list of {count} numbers")
    if len(scores) != count:
        raise ValueError(
            f"the verifier {name!r} returned {len(scores)} scores for {count} completions: {shown(scores)};"
            " expected one each"
        )
    return scores
