"""What runs inside a worker process: its walls, the verifiers that it was sent, and their calls. Light to import.

Answers are built of plain types and bytes only, so that whatever a verifier returns, the answer can be sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import cloudpickle

from grpo_hf.rewards.judging import Logged, Verdict, failed, judged
from grpo_hf.rewards.signature import Reward, judge_of, parser_of

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PRINTED_CHARACTERS = 2000
"""What all verifiers of a worker may print between them; an endless print must not fill the run's log."""

_memory = 0
_nowhere = -1
_at_rest = (0, 0, False)
_sent: dict[str, Any] = {}

Answer = tuple[str, float, float, str, bytes, bool]
"""A verdict's outcome, score, seconds and message; pickled: what it logged, or the parsed gold answer; whether the worker is
spent."""


def start(memory_bytes: int) -> None:
    """Put up a worker's walls; runs once, before its first call."""
    global _memory, _nowhere
    os.setsid()  # its own group, so that all that it starts can be killed with it, and Ctrl-C does not reach it
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    os.close(server._forkserver_alive_fd)  # what tells the server that somebody lives is the trainer's alone
    server._forkserver_alive_fd = None
    die_with_parent()
    adopt_orphans()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine run out of memory, the trainer is not the one to go
    printed = _Printed(os.dup(2))
    _nowhere = os.open(os.devnull, os.O_RDWR)
    _mute()
    sys.stdout = sys.stderr = printed  # type: ignore[assignment]
    _memory = memory_bytes
    _rest()


def load(slot: str, blob: bytes) -> Answer:
    """Keep what calls will name by its slot: a verifier's Reward, or the value of a keyword."""
    start = time.perf_counter()
    try:
        _sent[slot] = pickle.loads(blob)
        verdict = Verdict("scored")
    except BaseException as error:
        verdict = failed(error, time.perf_counter() - start)
    _rest()
    return _answer(verdict, b"", spent=False)


def call(slot: str, arguments: bytes, gold: bytes | None, more: list[str]) -> Answer:
    """Judge one sample."""

    def judge() -> tuple[Verdict, bytes]:
        reward: Reward = _sent[slot]
        logged = Logged()
        keywords = pickle.loads(arguments) | {k: v for k, v in logged.keywords().items() if reward.accepts(k)}
        keywords |= {name: _sent[name] for name in more}
        function = reward.function
        if gold is not None:
            keywords[str(reward.gold_column)], function = pickle.loads(gold), judge_of(reward.function)
        verdict = judged(reward.name, function, keywords, caught=BaseException)
        return verdict, cloudpickle.dumps(logged) if logged.metrics or logged.extra else b""

    return _guarded(judge)


def parse_gold(slot: str, values: bytes) -> list[Answer]:
    """Parse gold answers; each has an answer of its own."""
    reward: Reward = _sent[slot]
    parse = parser_of(reward.function)

    def one(value: Any) -> Callable[[], tuple[Verdict, bytes]]:
        def parsed() -> tuple[Verdict, bytes]:
            return Verdict("scored"), cloudpickle.dumps(parse(value))

        return parsed

    return [_guarded(one(value)) for value in pickle.loads(values)]


def _guarded(work: Callable[[], tuple[Verdict, bytes]]) -> Answer:
    """Do the work; afterwards undo or notice what it has left behind."""
    process, output = os.getpid(), sys.stdout
    start = time.perf_counter()
    try:
        verdict, blob = work()
    except BaseException as error:
        verdict, blob = failed(error, time.perf_counter() - start), b""
    if os.getpid() != process:  # a fork that the verifier has made came back too
        os._exit(1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout = sys.stderr = output
    _mute()
    return _answer(verdict, blob, spent=verdict.outcome == "crash" or _left_something())


def _mute() -> None:
    """Lead the standard files nowhere, also where a verifier has closed them."""
    for descriptor in (0, 1, 2):
        os.dup2(_nowhere, descriptor)


def _answer(verdict: Verdict, blob: bytes, *, spent: bool) -> Answer:
    return verdict.outcome, verdict.score, verdict.seconds, verdict.message, blob, spent


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


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs, so that they can be found."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _Printed(io.TextIOBase):
    """Shows the first of what verifiers print, where the trainer's own errors go, and drops the rest."""

    def __init__(self, descriptor: int):
        self.descriptor, self.left = descriptor, PRINTED_CHARACTERS

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
