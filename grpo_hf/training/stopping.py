"""Ctrl-C and SIGTERM: a run stops between two steps, all processes together, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo_hf.rollout.peers import Peers

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ONE_PRESS = 1.0
"""Seconds within which a terminal and a launcher may both hand on the same Ctrl-C."""


class RunStopped(SystemExit):
    """A signal has ended the run, as it ends a program: without a traceback, with the exit status 128 + its number."""


@dataclass
class StopRequest:
    """Whether a signal has asked this process, or one of its peers, to stop."""

    peers: Peers
    """All stop together."""
    asked: int = 0
    """The signal's number, or 0."""
    since: float = 0.0
    """When."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile the first signal asks, and a second Ctrl-C ends the process at once."""
        self.asked = 0
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self.since > ONE_PRESS:
            raise SystemExit(128 + number)
        if not self.asked:
            self.asked, self.since = number, now
            if self.peers.rank == 0:
                name = signal.Signals(number).name
                print(f"\n{name}: the run stops after this step; Ctrl-C ends it at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Between two steps. Raises RunStopped on all processes where any was asked."""
        asked = max(self.peers.gather(self.asked))
        if asked:
            raise RunStopped(128 + asked)
