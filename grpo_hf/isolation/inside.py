"""What runs inside a worker process around a user's functions: its walls, and what a call leaves behind. Light to import."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

PRINTED_CHARACTERS = 2000
"""What all calls of a worker may print between them; an endless print must not fill the run's log."""
MESSAGE_CHARACTERS = 4000
"""The end of a longer traceback is kept, where the error is."""

Value = TypeVar("Value")

sent: dict[str, Any] = {}
"""What this process was sent, by slot."""
_memory = 0
_nowhere = -1
_at_rest = (0, 0, False)


def start(memory_bytes: int, folder: str, path: list[str], printed: int) -> None:
    """Put up a worker's walls, and look for modules where the trainer does; runs once, before its first call."""
    global _memory, _nowhere
    os.chdir(folder)
    sys.path[:] = path
    output = _Printed(os.dup(2), printed)
    _nowhere = os.open(os.devnull, os.O_RDWR)
    _mute()
    sys.stdout = sys.stderr = output  # type: ignore[assignment]
    _memory = memory_bytes
    _rest()


def load(slot: str, blob: bytes) -> str:
    """Keep what calls will name by its slot; says why where that fails, else nothing."""
    problem = ""
    try:
        sent[slot] = pickle.loads(blob)
    except BaseException as error:
        problem = described(error)
    _rest()
    return problem


def guarded(work: Callable[[], Value], failed: Callable[[BaseException, float], Value]) -> tuple[Value, bool]:
    """Do the work; afterwards undo or notice what it has left behind.

    Returns what it returns, or what ``failed`` makes of what it raised and of the seconds that it took; and whether a fresh
    worker is needed.
    """
    process, output = os.getpid(), sys.stdout
    start = time.perf_counter()
    try:
        found = work()
    except BaseException as error:
        found = failed(error, time.perf_counter() - start)
    if os.getpid() != process:  # a fork that the work has made came back too
        os._exit(1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout = sys.stderr = output
    _mute()
    return found, _left_something()


def described(error: BaseException) -> str:
    """The end of an error's traceback, without the frame that caught it."""
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, frames)).strip()
    return text[-MESSAGE_CHARACTERS:]


def _mute() -> None:
    """Lead the standard files nowhere, also where the work has closed them."""
    for descriptor in (0, 1, 2):
        os.dup2(_nowhere, descriptor)


def _left_something() -> bool:
    """Whether threads, processes or much memory are left of a call; a fresh worker is cheaper than to sort them out."""
    used, threads, children = _at_rest
    grown = _memory_used() - used > _memory / 2
    return grown or threading.active_count() > threads or (_has_children() and not children)


def _has_children() -> bool:
    if not hasattr(os, "waitid"):  # macOS
        return False
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _rest() -> None:
    """Let memory grow by so much from here on: libraries, threads and processes that loading has brought do not count."""
    global _at_rest
    _at_rest = _memory_used(), threading.active_count(), _has_children()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _at_rest[0] + _memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _memory_used() -> int:
    """Bytes that RLIMIT_DATA counts; 0 where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
    return 0


class _Printed(io.TextIOBase):
    """Shows the first of what is printed, where the trainer's own errors go, and drops the rest."""

    def __init__(self, descriptor: int, characters: int):
        self.descriptor, self.left = descriptor, characters

    def write(self, text: str) -> int:
        if self.left > 0:
            shown, self.left = text[: self.left], self.left - len(text)
            ending = "" if self.left > 0 else "\n[this worker has printed its share; the rest is not shown]\n"
            with contextlib.suppress(OSError):
                os.write(self.descriptor, (shown + ending).encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return 1

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """It stays open for the next call."""
