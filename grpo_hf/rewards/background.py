"""Async verifiers (network calls): in this process, on an event loop of their own, many at a time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from grpo_hf.rewards.judging import Verdict, judged

Function = Callable[..., Any]


class Background:
    """An event loop in a thread, which outlives the calls, so that verifiers may keep their connections."""

    def __init__(self, *, concurrency: int = 64, timeout: float = 10.0):
        self.concurrency, self.timeout = concurrency, timeout
        self._process = 0
        self._loop: asyncio.AbstractEventLoop
        self._blocked: set[asyncio.AbstractEventLoop] = set()

    def call(self, name: str, function: Function, keywords: dict[str, Any]) -> Callable[[], Verdict]:
        """Judge one sample when fewer than ``concurrency`` others are; the deadline counts from there."""
        loop = self._running_loop()
        future = asyncio.run_coroutine_threadsafe(self._judge(name, function, keywords), loop)
        return lambda: self._result(future, loop)

    def call_batch(self, function: Function, keywords: dict[str, Any]) -> Future[Any]:
        """Call a batch form at once and without a deadline; it limits itself."""

        async def work() -> Any:
            return await function(**keywords)

        return asyncio.run_coroutine_threadsafe(work(), self._running_loop())

    async def _judge(self, name: str, function: Function, keywords: dict[str, Any]) -> Verdict:
        async def work() -> Any:
            return await function(**keywords)

        async with self._limit:
            start = time.perf_counter()
            task = asyncio.create_task(work())
            try:
                done, _ = await asyncio.wait({task}, timeout=self.timeout)
            finally:
                task.cancel()  # and does not wait for that: it may refuse
            if not done:
                return self._late("it ran past its deadline")
            seconds = time.perf_counter() - start
            return replace(judged(name, task.result, {}, caught=(Exception, asyncio.CancelledError)), seconds=seconds)

    def _result(self, future: Future[Verdict], loop: asyncio.AbstractEventLoop) -> Verdict:
        while True:
            try:
                return future.result(0 if loop in self._blocked else self.timeout)
            except TimeoutError:
                if loop in self._blocked or not self._responds(loop):
                    self._blocked.add(loop)
                    return self._late(
                        "an async verifier keeps the event loop to itself (await what takes time) and ran past its deadline"
                    )

    def _responds(self, loop: asyncio.AbstractEventLoop) -> bool:
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(self.timeout)
        except TimeoutError:
            return False
        return True

    def _late(self, what: str) -> Verdict:
        return Verdict("timeout", seconds=self.timeout, message=f"{what} of {self.timeout:g} s")

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop; a new one at first, in a fork, and where a verifier has blocked the old."""
        if self._process != os.getpid() or self._loop in self._blocked:
            self._process, self._loop = os.getpid(), asyncio.new_event_loop()
            self._limit = asyncio.Semaphore(self.concurrency)
            threading.Thread(target=self._loop.run_forever, name="async verifiers", daemon=True).start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop).atexit = False
        return self._loop
