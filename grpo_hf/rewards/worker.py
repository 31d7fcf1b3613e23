"""What runs inside a worker process: its walls, the verifiers that it was sent, and their calls. Light to import.

Answers are built of plain types and bytes only, so that whatever a verifier returns, the answer can be sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from grpo_hf.rewards.loading import from_file, place_in_file
from grpo_hf.rewards.signature import Reward, judge_of, parser_of
from grpo_hf.rewards.verdict import BatchLogged, Logged, Verdict, failed, judged, judged_batch

PRINTED_CHARACTERS = 2000
"""What all verifiers of a worker may print between them; an endless print must not fill the run's log."""

Answer = tuple[str, float, float, str, bytes, bool]
"""A verdict's outcome, score, seconds and message; pickled: what it logged, or the parsed gold answer; whether the worker is
spent."""

# ---- What is sent


@dataclass(frozen=True)
class Parcel:
    """Something that a worker is sent once: a verifier, or the trainer's state."""

    slot: str
    """What calls name it by."""
    version: str
    """A worker that holds another version is sent this one."""
    blob: bytes
    """The thing itself."""
    modules: frozenset[str] = frozenset()
    """What loading it imports."""


def verifier_parcel(reward: Reward) -> Parcel:
    """Pack a verifier, by reference where workers can import it, else by value.

    Raises:
        ValueError: it holds something that cannot be sent to another process.
    """
    packed = io.BytesIO()
    pickler = _Pickler(packed)
    try:
        pickler.dump(reward)
    except Exception as error:
        raise ValueError(
            f"the verifier {reward.name!r} cannot be sent to worker processes: {error}. Let it make what it holds when it is"
            " called, or register it with in_process=True, which goes without a deadline and a memory limit"
        ) from error
    digest = hashlib.sha256(packed.getvalue()).hexdigest()
    return Parcel(digest, digest, packed.getvalue(), frozenset(pickler.modules))


class _Pickler(cloudpickle.Pickler):
    """Has workers load a verifier's file, where it came from one, as this process did; notes what they will import."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if (place := place_in_file(obj)) is not None:
            return from_file, place
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and isinstance(obj, FunctionType | ModuleType | type):
            self.modules.add(obj.__name__ if isinstance(obj, ModuleType) else obj.__module__)
        return reduced


_states = itertools.count()


def state_parcel(state: Any) -> Parcel:
    """Pack the trainer's state as it is now."""
    return Parcel("trainer_state", str(next(_states)), cloudpickle.dumps(state))


# ---- What is done there

_memory = 0
_nowhere = -1
_at_rest = (0, 0, False)
_sent: dict[str, Any] = {}


def start(memory_bytes: int, folder: str, path: list[str]) -> None:
    """Put up a worker's walls, and look for modules where the trainer does; runs once, before its first call."""
    global _memory, _nowhere
    os.chdir(folder)
    sys.path[:] = path
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

    def judge() -> list[tuple[Verdict, bytes]]:
        reward: Reward = _sent[slot]
        logged = Logged()
        keywords = pickle.loads(arguments) | logged.keywords(reward) | {name: _sent[name] for name in more}
        function = reward.function
        if gold is not None:
            keywords[str(reward.gold_column)], function = pickle.loads(gold), judge_of(reward.function)
        verdict = judged(reward.name, lambda: function(**keywords), caught=BaseException)
        return [(verdict, _packed(logged))]

    return _guarded(judge)[0]


def batch(slot: str, arguments: bytes, count: int, more: list[str]) -> list[Answer]:
    """Judge all samples of a rollout; one answer where what it logged could not be sent."""

    def judge() -> list[tuple[Verdict, bytes]]:
        reward: Reward = _sent[slot]
        logged = BatchLogged(count=count)
        keywords = pickle.loads(arguments) | logged.keywords(reward) | {name: _sent[name] for name in more}
        start = time.perf_counter()
        verdicts = judged_batch(reward.name, lambda: reward.function(**keywords), logged, start, caught=BaseException)
        return [(verdict, _packed(verdict.logged)) for verdict in verdicts]

    return _guarded(judge)


def parse_gold(slot: str, values: bytes) -> list[Answer]:
    """Parse gold answers; each has an answer of its own."""
    reward: Reward = _sent[slot]
    parse = parser_of(reward.function)

    def one(value: Any) -> Callable[[], list[tuple[Verdict, bytes]]]:
        return lambda: [(Verdict("scored"), cloudpickle.dumps(parse(value)))]

    return [_guarded(one(value))[0] for value in pickle.loads(values)]


def _guarded(work: Callable[[], list[tuple[Verdict, bytes]]]) -> list[Answer]:
    """Do the work; afterwards undo or notice what it has left behind."""
    process, output = os.getpid(), sys.stdout
    start = time.perf_counter()
    try:
        found = work()
    except BaseException as error:
        found = [(failed(error, time.perf_counter() - start), b"")]
    if os.getpid() != process:  # a fork that the verifier has made came back too
        os._exit(1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout = sys.stderr = output
    _mute()
    spent = any(verdict.outcome == "crash" for verdict, _ in found) or _left_something()
    return [_answer(verdict, blob, spent=spent) for verdict, blob in found]


def _packed(logged: Logged) -> bytes:
    return cloudpickle.dumps(logged) if logged.metrics or logged.extra else b""


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
