"""Verifiers in worker processes: each call has a deadline and a memory limit, and one that breaks loses its sample alone."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from grpo_hf.isolation.parcel import Courier, Parcel, UnloadableError, walls
from grpo_hf.isolation.pool import DiedError, Lane, LateError, Pool, default_count
from grpo_hf.rewards import worker
from grpo_hf.rewards.settings import RewardSettings
from grpo_hf.rewards.verdict import Logged, Verdict, failed


@dataclass(frozen=True)
class Gold:
    """A parsed gold answer as bytes that only workers read, or why there is none."""

    blob: bytes
    verdict: Verdict


class Workers:
    """A pool whose workers hold verifiers."""

    def __init__(self, settings: RewardSettings, modules: frozenset[str] = frozenset()):
        self.timeout = settings.timeout
        self.pool = Pool(settings.workers or default_count(), modules, walls(settings.memory_gb))
        self.courier = Courier()

    def judge(
        self, verifier: Parcel, keywords: dict[str, Any], gold: Future[list[Gold]] | None, *more: Parcel
    ) -> Future[Any]:
        """Have a sample judged; ``more`` is what the call needs besides."""

        def job(lane: Lane) -> Verdict:
            known = gold.result()[0] if gold is not None else None
            if known is not None and known.verdict.outcome != "scored":
                return known.verdict
            try:
                arguments = pickle.dumps(keywords)
            except Exception as error:
                return failed(error, 0.0)
            slots = [parcel.slot for parcel in more]
            asked = worker.call, verifier.slot, arguments, known and known.blob, slots
            answer = self._ask(lane, [verifier, *more], self.timeout, *asked)
            return answer if isinstance(answer, Verdict) else _verdict(answer)

        return self.pool.submit(job)

    def judge_all(self, verifier: Parcel, keywords: dict[str, Any], count: int, *more: Parcel) -> Future[Any]:
        """Have all samples judged in one call, which has their deadlines together."""

        def job(lane: Lane) -> list[Verdict]:
            try:
                arguments = pickle.dumps(keywords)
            except Exception as error:
                return [failed(error, 0.0)] * count
            asked = worker.batch, verifier.slot, arguments, count, [parcel.slot for parcel in more]
            answers = self._ask(lane, [verifier, *more], self.timeout * count, *asked)
            if isinstance(answers, Verdict):
                return [replace(answers, seconds=answers.seconds / count)] * count
            verdicts = [_verdict(answer) for answer in answers]
            return verdicts if len(verdicts) == count else verdicts[:1] * count

        return self.pool.submit(job)

    def parse_gold(self, verifier: Parcel, values: Sequence[Any]) -> Future[list[Gold]]:
        """Have gold answers parsed: all in one go, and where that breaks each alone, with the deadline to itself."""

        def job(lane: Lane, values: Sequence[Any] = values) -> list[Gold]:
            asked = worker.parse_gold, verifier.slot, pickle.dumps(values)
            answers = self._ask(lane, [verifier], self.timeout, *asked)
            if not isinstance(answers, Verdict):
                return [_gold(answer[4], _verdict(answer, logs=False)) for answer in answers]
            if answers.outcome == "error":  # not of the answers: the verifier cannot be loaded
                return [Gold(b"", answers)] * len(values)
            if len(values) == 1:
                return [_gold(b"", answers)]
            return [gold for value in values for gold in job(lane, [value])]

        return self.pool.submit(job)

    def _ask(
        self, lane: Lane, parcels: Sequence[Parcel], timeout: float, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a function of `worker` answers, or a Verdict where the worker is killed, dies or lacks what it needs."""
        start = time.perf_counter()
        try:
            return self.courier.ask(lane.worker(parcels[0].slot), parcels, timeout, function, *arguments)
        except UnloadableError as error:
            return Verdict("error", message=str(error))
        except LateError:
            return Verdict("timeout", seconds=timeout, message=f"it ran past its deadline of {timeout:g} s and was killed")
        except DiedError as error:
            return Verdict("crash", seconds=time.perf_counter() - start, message=str(error))


def _gold(blob: bytes, verdict: Verdict) -> Gold:
    """However its parsing failed, a gold answer that could not be parsed is a bad one."""
    return Gold(blob, verdict if verdict.outcome == "scored" else replace(verdict, outcome="bad_gold"))


def _verdict(answer: worker.Answer, *, logs: bool = True) -> Verdict:
    """Read a worker's answer; what the verifier has logged are objects of its own, which may refuse."""
    outcome, score, seconds, message, blob = answer
    try:
        logged = pickle.loads(blob) if blob and logs else Logged()
    except Exception as error:
        return failed(error, seconds)
    return Verdict(outcome, score, seconds, message, logged)
