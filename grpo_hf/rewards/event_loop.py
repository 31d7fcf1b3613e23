"""Async functions (network calls): in this process, on an event loop of their own, many at a time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from grpo_hf.rewards.verdict import Verdict


class EventLoop:
    """An event loop in a thread, which outlives the calls, so that async functions may keep their connections."""

    def __init__(self, *, concurrency: int = 64, timeout: float = 10.0):
        self.concurrency, self.timeout = concurrency, timeout
        self._process = 0
        self._loop: asyncio.AbstractEventLoop
        self._blocked: set[asyncio.AbstractEventLoop] = set()

    def call(
        self,
        call: Callable[[], Coroutine[Any, Any, Any]],
        verdict: Callable[[Callable[[], Any], float], Any],
        timeout: float,
        share: int,
    ) -> Callable[[], Any]:
        """Await a call when fewer than ``concurrency`` others run; its deadline counts from there.

        ``verdict`` is made of what it returned or raised, and of its start; ``share`` is how many samples it is for.
        """
        loop = self._running_loop()
        future = asyncio.run_coroutine_threadsafe(self._judge(call, verdict, timeout, share), loop)
        return lambda: self._result(future, loop, timeout, share)

    async def _judge(self, call: Any, verdict: Any, timeout: float, share: int) -> Any:
        async with self._limit:
            start = time.perf_counter()
            task = asyncio.create_task(_awaited(call))
            try:
                done, _ = await asyncio.wait({task}, timeout=timeout)
            finally:
                task.cancel()  # and does not wait for that: it may refuse
            return verdict(task.result, start) if done else _late("it ran past its deadline", timeout, share)

    def _result(self, future: Future[Any], loop: asyncio.AbstractEventLoop, timeout: float, share: int) -> Any:
        while True:
            try:
                return future.result(0 if loop in self._blocked else timeout)
            except TimeoutError:
                if loop in self._blocked or not self._responds(loop):
                    self._blocked.add(loop)
                    what = (
                        "an async function keeps the event loop to itself (await what takes time) and ran past its deadline"
                    )
                    return _late(what, timeout, share)

    def _responds(self, loop: asyncio.AbstractEventLoop) -> bool:
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(self.timeout)
        except TimeoutError:
            return False
        return True

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop; a new one at first, in a fork, and where a function has blocked the old."""
        if self._process != os.getpid() or self._loop in self._blocked:
            self._process, self._loop = os.getpid(), asyncio.new_event_loop()
            self._limit = asyncio.Semaphore(self.concurrency)
            threading.Thread(target=self._loop.run_forever, name="async calls", daemon=True).start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop).atexit = False
        return self._loop


async def _awaited(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop, and every other call with it
        raise RuntimeError(f"it raised {error!r}") from error


def _late(what: str, timeout: float, share: int) -> Verdict:
    return Verdict("timeout", seconds=timeout / share, message=f"{what} of {timeout:g} s")
