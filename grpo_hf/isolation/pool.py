"""Worker processes with a deadline for each call: whatever a call does, it ends in time, and only it is lost.

Workers are forked from a small server process of their own, never from the trainer, see `server`. A lane is a thread that
hands jobs to its workers, one job at a time; every key (a verifier) has a worker of its own in each lane, so that what one
leaves behind in its interpreter never meets another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeAlias

from grpo_hf.isolation.server import ANSWER, COMMAND, END, FORK, HEAD

LOAD_SECONDS = 120.0
"""Deadline for importing what a call needs; the deadline of a call counts from the last module that it imports."""

_LARGEST = 1 << 32  # bytes of an answer
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from grpo_hf.isolation import server;"
    " server.main(int(sys.argv[1]), json.loads(sys.argv[3]))"
)

Jobs: TypeAlias = "queue.SimpleQueue[tuple[Callable[[Lane], Any], Future[Any]]]"


class LateError(Exception):
    """A call has run past its deadline; its worker has been killed."""


class DiedError(Exception):
    """A worker has ended in the middle of a call; the text says how."""


class StoppedError(DiedError):
    """A worker has been ended from here in the middle of a call."""


class Pool:
    """As many lanes as are needed, up to ``count``; ended when this is garbage, or the interpreter is."""

    def __init__(self, count: int, modules: Iterable[str] = (), setup: Callable[[Worker], None] = lambda worker: None):
        """``modules`` are loaded once, in the process that workers are forked from; ``setup`` is done to each new worker."""
        self.count, self.modules, self.setup = count, frozenset(modules), setup
        self._open()

    def submit(self, job: Callable[[Lane], Any]) -> Future[Any]:
        """Have a job done by the next lane that is free."""
        if os.getpid() != self._process:  # a fork: its threads and sockets are the parent's
            self._closed.detach()
            self._open()
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        if not self._idle.acquire(blocking=False) and len(self._lanes) < self.count:
            self._lanes.append(Lane(self._jobs, self._idle, self.modules, self.setup))
            # A daemon: the interpreter does not wait for calls that nobody waits for any more.
            threading.Thread(target=self._lanes[-1].serve, name="worker", daemon=True).start()
        return future

    def close(self) -> None:
        """Give up all jobs and end the workers; the next job starts new ones."""
        self._closed()
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._jobs: Jobs = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)  # counts the lanes that wait for a job
        self._lanes: list[Lane] = []
        self._closed = weakref.finalize(self, _close, self._jobs, self._lanes, self._process)


class Lane:
    """A thread with its workers."""

    def __init__(self, jobs: Jobs, idle: threading.Semaphore, modules: frozenset[str], setup: Callable[[Worker], None]):
        self.jobs, self.idle, self.modules, self.setup = jobs, idle, modules, setup
        self.workers: dict[str, Worker] = {}
        self.closed = False

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
            del job, future  # nothing of a job is kept while the next is waited for

    def worker(self, key: str) -> Worker:
        """The worker of a key, with nothing of another's in it.

        Raises:
            DiedError: it cannot be started.
        """
        if key not in self.workers or not self.workers[key].alive:
            self.workers[key] = Worker(self.modules)
            if self.closed:
                self.workers[key].end()
            self.setup(self.workers[key])
        return self.workers[key]

    def close(self) -> None:
        """End the workers, from any thread."""
        self.closed = True
        for worker in list(self.workers.values()):
            worker.end()


class Worker:
    """A process that does calls for one thread, and what it has been sent."""

    def __init__(self, modules: frozenset[str]):
        self.server = server_with(modules)
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.pid = self.server.fork(theirs)
        self.alive = True
        self.sent: dict[str, str] = {}
        self.ending = threading.Lock()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What a function returns there, of plain types; both it and its arguments are pickled.

        Raises:
            LateError: it ran past its deadline.
            DiedError: the process has ended, or has written to the socket what is no answer.
            StoppedError: another thread has ended it.
        """
        token, start = secrets.token_bytes(8), time.monotonic()
        data = token + pickle.dumps((function, arguments))
        try:
            self.connection.settimeout(timeout)
            self.connection.sendall(len(data).to_bytes(8, "little") + data)
            end = start + timeout
            while True:
                sent, kind, size = HEAD.unpack(self._read(HEAD.size, end))
                if sent != token or not 0 <= size < _LARGEST:
                    raise ValueError("something other than an answer was written to its socket")
                if kind == ANSWER:
                    return _Plain(io.BytesIO(self._read(size, end))).load()
                end = min(time.monotonic(), start + LOAD_SECONDS) + timeout
        except Exception as error:
            if not self.alive:
                raise StoppedError("its process was stopped, as nobody waits for it any more") from None
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        """What stands for an error in a call, which ends it."""
        if isinstance(error, EOFError):
            return DiedError(_cause(self.end(wait=True)))
        self.end()
        return LateError() if isinstance(error, TimeoutError) else DiedError(f"its process broke: {error}")

    def end(self, *, wait: bool = False) -> int:
        """Kill it with all that it has started; its exit code. ``wait`` lets it end by itself first."""
        with self.ending:
            if self.alive:
                self.alive = False
                self.exitcode = self.server.end(self.pid, wait)
            return self.exitcode

    def _read(self, size: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self.connection.settimeout(max(1e-3, end - time.monotonic()))
            part = self.connection.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
            if time.monotonic() > end and len(data) < size:
                raise TimeoutError
        return bytes(data)


class _Plain(pickle.Unpickler):
    """Reads plain types alone: a worker does not choose what runs in the trainer."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"an answer holds {module}.{name}")


class Server:
    """The server process of a set of modules, as the trainer sees it."""

    def __init__(self, modules: frozenset[str]):
        self.control, theirs = socket.socketpair()
        self.lock = threading.Lock()
        path = json.dumps([place or os.getcwd() for place in sys.path])
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), path, json.dumps(sorted(modules))]
            environ = {"PYTHONHASHSEED": "0"} | os.environ  # a set of texts has one order in every run
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environ)
        self.control.settimeout(LOAD_SECONDS)

    def fork(self, connection: socket.socket) -> int:
        """Start a worker that serves a socket; its process number.

        Raises:
            DiedError: the server has ended, or the machine allows no more processes.
        """
        with self.lock:
            try:
                socket.send_fds(self.control, [COMMAND.pack(FORK, 0)], [connection.fileno()])
                pid = self._answer()
            except (OSError, EOFError) as error:
                _servers.clear()  # the next worker gets another
                raise DiedError(f"the process that workers are forked from has ended: {error!r}") from error
        if pid < 0:
            raise DiedError(f"no process can be started: {os.strerror(-pid)}")
        return pid

    def end(self, pid: int, wait: bool) -> int:
        """End a worker; its exit code, and that of a killed one where the server is gone, whose workers go with it."""
        with self.lock, contextlib.suppress(OSError, EOFError):
            self.control.sendall(COMMAND.pack(END, -pid if wait else pid))
            return self._answer()
        return -signal.SIGKILL

    def _answer(self) -> int:
        data = b""
        while len(data) < COMMAND.size:
            part = self.control.recv(COMMAND.size - len(data))
            if not part:
                raise EOFError
            data += part
        return int(COMMAND.unpack(data)[1])


_servers: dict[frozenset[str], Server] = {}
_starting = threading.RLock()


def server_with(modules: frozenset[str]) -> Server:
    """The server that has these modules loaded."""
    with _starting:
        if modules not in _servers:
            _servers[modules] = Server(modules)
        return _servers[modules]


def _forget() -> None:
    """In a fork of this process: the servers and the workers are the parent's."""
    global _starting
    for server in _servers.values():
        server.control.close()  # else the server would wait for this one too
    _servers.clear()
    _starting = threading.RLock()


os.register_at_fork(after_in_child=_forget)


def default_count() -> int:
    """Cores that this process may use, shared with the other training processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def give_up(future: Future[Any]) -> None:
    """Cancel a future that nobody will work on; whoever waits for it is told."""
    if future.cancel():
        future.set_running_or_notify_cancel()


def _cause(exitcode: int) -> str:
    """Why a worker has ended."""
    if exitcode >= 0:
        return f"its process ended, with exit code {exitcode}"
    return f"its process was killed by {signal.Signals(-exitcode).name}"


def _close(jobs: Jobs, lanes: list[Lane], process: int) -> None:
    if os.getpid() != process:
        return
    for lane in lanes:
        lane.closed = True
    with contextlib.suppress(queue.Empty):
        while True:
            give_up(jobs.get_nowait()[1])
    for lane in lanes:
        lane.close()
        jobs.put((lambda lane: None, Future()))  # for it to notice
