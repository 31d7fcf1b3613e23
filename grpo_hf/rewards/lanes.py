"""One worker as the trainer sees it: what it is asked, and what its answers, its deadlines and its death mean."""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pebble import ProcessExpired, ProcessPool

from grpo_hf.rewards import in_worker
from grpo_hf.rewards.judging import Logged, Verdict, failed
from grpo_hf.rewards.parcels import Parcel
from grpo_hf.rewards.processes import ENDED_BY_ITSELF, WorkerContext

LOAD_SECONDS = 120.0
"""Deadline for importing a verifier and what it needs; calls have theirs."""

Jobs: TypeAlias = "queue.SimpleQueue[tuple[Callable[[Lane], Any], Future[Any]]]"


@dataclass(frozen=True)
class Gold:
    """A parsed gold answer as bytes that only workers read, or why there is none."""

    blob: bytes
    verdict: Verdict


@dataclass(frozen=True)
class Call:
    """Judge one sample."""

    verifier: Parcel
    keywords: dict[str, Any]
    gold: Future[list[Gold]] | None
    more: tuple[Parcel, ...]

    def __call__(self, lane: Lane) -> Verdict:
        gold = self.gold.result()[0] if self.gold is not None else None
        if gold is not None and gold.verdict.outcome != "scored":
            return gold.verdict
        try:
            keywords = pickle.dumps(self.keywords)
        except Exception as error:
            return failed(error, 0.0)
        arguments = self.verifier.slot, keywords, gold and gold.blob, [parcel.slot for parcel in self.more]
        answer = lane.ask([self.verifier, *self.more], in_worker.call, *arguments)
        return answer if isinstance(answer, Verdict) else _verdict(answer)


@dataclass(frozen=True)
class Parse:
    """Parse gold answers: all in one go, and each alone where that breaks, so that each has the deadline to itself."""

    verifier: Parcel
    values: Sequence[Any]

    def __call__(self, lane: Lane) -> list[Gold]:
        answers = lane.ask([self.verifier], in_worker.parse_gold, self.verifier.slot, pickle.dumps(self.values))
        if not isinstance(answers, Verdict):
            return [_gold(answer[4], _verdict(answer, logs=False)) for answer in answers]
        if answers.outcome == "error":  # not of the answers: the verifier cannot be loaded
            return [Gold(b"", answers)] * len(self.values)
        if len(self.values) == 1:
            return [_gold(b"", answers)]
        return [gold for value in self.values for gold in Parse(self.verifier, [value])(lane)]


@dataclass
class Lane:
    """A worker process, and the thread that hands it one job after another."""

    jobs: Jobs
    idle: threading.Semaphore
    """Counts the lanes that wait for a job."""
    timeout: float
    memory_bytes: int
    pool: ProcessPool | None = None
    context: WorkerContext = field(default_factory=WorkerContext)
    sent: dict[str, str] = field(default_factory=dict)
    """Versions by slot of what the worker holds."""
    refused: dict[str, Verdict] = field(default_factory=dict)
    """What it could not load, by version, so that it is not tried again for every sample."""
    waiting: Future[Any] | None = None
    closed: bool = False

    def serve(self) -> None:
        """Do jobs until it is closed."""
        while not self.closed:
            try:
                job, future = self.jobs.get_nowait()
            except queue.Empty:
                self.idle.release()
                job, future = self.jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job(self))
                except BaseException as error:
                    future.set_exception(error)

    def ask(self, parcels: Sequence[Parcel], function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of in_worker answers, or a Verdict where the worker is killed, dies or lacks what it needs."""
        for parcel in parcels:
            if parcel.version in self.refused:
                return self.refused[parcel.version]
            if self.sent.get(parcel.slot) != parcel.version:
                answer = self._run(in_worker.load, parcel.slot, parcel.blob, timeout=LOAD_SECONDS)
                verdict = answer if isinstance(answer, Verdict) else _verdict(answer)
                if verdict.outcome != "scored":
                    message = f"it cannot be loaded in a worker process: {verdict.message}"
                    self.refused[parcel.version] = replace(verdict, outcome="error", message=message)
                    return self.refused[parcel.version]
                self.sent[parcel.slot] = parcel.version
        answer = self._run(function, *arguments, timeout=self.timeout)
        if isinstance(answer, Verdict):
            return answer
        if any(part[-1] for part in (answer if isinstance(answer, list) else [answer])):
            self.end()
        return answer

    def _run(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        start = time.perf_counter()
        try:
            if self.pool is not None and not self.pool.active:  # its worker died between two calls
                self.end()
            self.pool = self.pool or self._new_pool()
            self.waiting = self.pool.schedule(function, args=arguments, timeout=timeout)
            if self.closed:
                raise CancelledError
            return self.waiting.result()
        except TimeoutError:  # the pool has killed its worker
            self.sent.clear()
            return Verdict("timeout", seconds=timeout, message=f"it ran past its deadline of {timeout:g} s and was killed")
        except (Exception, CancelledError) as error:
            self.end()
            return Verdict("crash", seconds=time.perf_counter() - start, message=_cause(error))

    def _new_pool(self) -> ProcessPool:
        self.context = WorkerContext()
        return ProcessPool(1, initializer=in_worker.start, initargs=(self.memory_bytes,), context=self.context)

    def end(self) -> None:
        """Kill the worker with all that it has started; the next call starts another."""
        pool, self.pool = self.pool, None
        self.sent.clear()
        if self.waiting is not None:
            self.waiting.cancel()
        if pool is not None:
            pool.stop()
            for worker in self.context.processes:
                worker.terminate()
            with contextlib.suppress(RuntimeError):  # of an interpreter that is ending
                threading.Thread(target=pool.join, daemon=True).start()

    def close(self) -> None:
        """End it for good, from any thread."""
        self.closed = True
        self.end()


def _gold(blob: bytes, verdict: Verdict) -> Gold:
    """However its parsing failed, a gold answer that could not be parsed is a bad one."""
    return Gold(blob, verdict if verdict.outcome == "scored" else replace(verdict, outcome="bad_gold"))


def _verdict(answer: in_worker.Answer, *, logs: bool = True) -> Verdict:
    """Read a worker's answer; what the verifier has logged are objects of its own, which may refuse."""
    outcome, score, seconds, message, blob, _ = answer
    try:
        logged = pickle.loads(blob) if blob and logs else Logged()
    except Exception as error:
        return failed(error, seconds)
    return Verdict(outcome, score, seconds, message, logged)


def _cause(error: BaseException) -> str:
    """Why a worker has ended."""
    if not isinstance(error, ProcessExpired):
        return f"its process broke: {error!r}"
    if error.exitcode >= 0:
        return f"its process ended, with exit code {0 if error.exitcode == ENDED_BY_ITSELF else error.exitcode}"
    return f"its process was killed by {signal.Signals(-error.exitcode).name}"
