"""Verifiers in worker processes: a deadline and a memory limit for each call, and only its sample is lost when one breaks.

Each worker is a pebble pool of one. Workers of one pool would share a pipe and its locks, which a process that dies at the
wrong moment takes with it; and a pool of one says without doubt which call its worker died of.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo_hf.rewards.judging import Verdict
from grpo_hf.rewards.lanes import Call, Gold, Jobs, Lane, Parse
from grpo_hf.rewards.parcels import Parcel
from grpo_hf.rewards.processes import start_server


class Workers:
    """Worker processes, started when they are first needed and ended when this is garbage, or the interpreter is."""

    def __init__(
        self, *, count: int | None = None, timeout: float = 10.0, memory_gb: float = 4.0, modules: Iterable[str] = ()
    ):
        """``modules`` are loaded once, in the process that workers are forked from."""
        self.count, self.modules = count or default_count(), set(modules)
        self.timeout, self.memory_bytes = timeout, int(memory_gb * 2**30)
        self._open()

    def call(
        self, verifier: Parcel, keywords: dict[str, Any], gold: Future[list[Gold]] | None, *more: Parcel
    ) -> Future[Verdict]:
        """Have a sample judged; ``more`` is what the call needs besides."""
        return self._submit(Call(verifier, keywords, gold, more))

    def parse_gold(self, verifier: Parcel, values: Sequence[Any]) -> Future[list[Gold]]:
        """Have gold answers parsed by one worker, in one go as long as nothing goes wrong."""
        return self._submit(Parse(verifier, values))

    def close(self) -> None:
        """Give up all calls and end the workers; the next call starts new ones."""
        self._closed()
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._jobs: Jobs = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lanes: list[Lane] = []
        self._closed = weakref.finalize(self, _close, self._jobs, self._lanes, self._process)

    def _submit(self, job: Callable[[Lane], Any]) -> Future[Any]:
        if os.getpid() != self._process:  # a fork: its threads and pipes are the parent's
            self._closed.detach()
            self._open()
        if not self._lanes:
            start_server(self.modules)
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        if not self._idle.acquire(blocking=False) and len(self._lanes) < self.count:
            self._lanes.append(Lane(self._jobs, self._idle, self.timeout, self.memory_bytes))
            # A daemon: the interpreter does not wait for calls that nobody waits for any more.
            threading.Thread(target=self._lanes[-1].serve, name="verifier", daemon=True).start()
        return future


def default_count() -> int:
    """Cores that this process may use, shared with the other training processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _close(jobs: Jobs, lanes: list[Lane], process: int) -> None:
    if os.getpid() != process:
        return
    for lane in lanes:
        lane.closed = True
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()[1].cancel()
    for lane in lanes:
        lane.close()
        jobs.put((lambda lane: None, Future()))  # for it to notice
