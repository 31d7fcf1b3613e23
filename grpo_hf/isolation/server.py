"""The process that workers are forked from: preloaded, single-threaded, and gone, with all its kin, when the trainer is.

A trainer holds CUDA, threads and locks that do not survive a fork, and takes seconds to start; this process holds the
modules that its workers will need and forks one in milliseconds. It is told what to do over a socket, whose end is its own.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection
from typing import Any

import psutil

from grpo_hf.isolation import walls

COMMAND = struct.Struct("<cq")
"""FORK, with a socket for the worker, or END and a worker's number; the answer is a worker's number or how it ended."""
HEAD = struct.Struct("<8scq")
"""A message of a worker: the call's token, BEAT or ANSWER, and the size of what follows."""
FORK, END, BEAT, ANSWER = b"f", b"e", b"b", b"a"
BEAT_SECONDS = 0.05
_PATIENCE = 0.5  # seconds that a worker which says nothing more has to end by itself


def main(file: int, modules: Collection[str]) -> None:
    """Load the modules, then fork workers and end them until the socket is closed."""
    os.setsid()  # what kills the trainer's process group leaves this one time to clear up
    if sys.platform == "linux":
        walls.adopt_orphans()
    control = socket.socket(fileno=file)
    for module in modules:
        with contextlib.suppress(Exception):  # the workers will meet it again, and say so
            importlib.import_module(module)
    workers: set[int] = set()
    try:
        while True:
            command, files, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if not command:
                break
            name, number = COMMAND.unpack(command)
            answer = _fork(control, files[0], workers) if name == FORK else _end(number, workers)
            control.sendall(COMMAND.pack(name, answer))
    except OSError:  # the trainer has gone
        pass
    _kill_children(os.getpid())


def _fork(control: socket.socket, file: int, workers: set[int]) -> int:
    """Start a worker that serves a socket; where that is not possible, the error's number, negative."""
    try:
        pid = os.fork()
    except OSError as error:  # too many processes: those that run go on
        os.close(file)
        return -int(error.errno or errno.EAGAIN)
    if pid == 0:
        status = 1
        try:
            control.close()
            _Worker(socket.socket(fileno=file)).serve()
        finally:
            os._exit(status)
    os.close(file)
    workers.add(pid)
    return pid


def _end(pid: int, workers: set[int]) -> int:
    """Kill a worker with its group, and whatever has left its group; how it ended, as os.waitstatus_to_exitcode says it."""
    workers.discard(pid)
    end = time.monotonic() + _PATIENCE * (pid < 0)
    pid = abs(pid)
    status = _waited(pid)
    while status is None and time.monotonic() < end:
        time.sleep(0.001)
        status = _waited(pid)
    if status is None:
        _kill(pid, {os.getpgrp()})
        status = os.waitpid(pid, 0)[1]
    _kill_children(os.getpid(), spare=workers)
    return os.waitstatus_to_exitcode(status)


def _waited(pid: int) -> int | None:
    """The status of a process that has ended."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def _kill_children(parent: int, *, spare: Collection[int] = ()) -> None:
    """Kill all descendants of a process but those spared and theirs.

    What loses its parent meanwhile comes to this process in turn, so it takes several rounds.
    """
    for _ in range(50):
        strays = _strays(parent, spare)
        running = [child for child in strays if _is_running(child)]
        for stray in running:
            for descendant in [*_children(stray, recursive=True), stray]:
                _kill(descendant.pid, {os.getpgrp()})
        for stray in strays:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(stray.pid, os.WNOHANG)
        if not running:
            return
        time.sleep(0.005)


def _strays(parent: int, spare: Collection[int]) -> list[psutil.Process]:
    """The children of this process but those spared; Linux lists them, which costs little where many are spared."""
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            numbers = [int(number) for number in file.read().split()]
    except OSError:
        return [child for child in _children(parent) if child.pid not in spare]
    strays = []
    for number in numbers:
        if number not in spare:
            with contextlib.suppress(psutil.Error):
                strays.append(psutil.Process(number))
    return strays


def _kill(pid: int, own_groups: set[int]) -> None:
    """Kill a process and its process group in one go, which no fork bomb can outrun."""
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(pid)
        if group in own_groups:
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)


def _children(parent: int | psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(parent) if isinstance(parent, int) else parent
        return process.children(recursive=recursive)
    return []


def _is_running(child: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return child.status() != psutil.STATUS_ZOMBIE
    return False


class _Worker:
    """What a worker process does: one call after another, each a function with its arguments."""

    def __init__(self, connection: socket.socket):
        self.connection, self.token, self.beaten = connection, b"", 0.0
        self.writing = threading.RLock()

    def serve(self) -> None:
        """Do calls until the socket is closed."""
        os.setsid()  # its own group, so that all that it starts can be killed with it, and Ctrl-C does not reach it
        if sys.platform == "linux":
            walls.die_with_parent()
            walls.adopt_orphans()
            with contextlib.suppress(OSError):
                walls.be_killed_first()
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        while size := self._read(8):
            message = self._read(int.from_bytes(size, "little"))
            self.token = message[:8]  # what unpickling imports counts as well
            function, arguments = pickle.loads(message[8:])
            self._write(ANSWER, pickle.dumps(function(*arguments)))

    def find_spec(self, *module: Any) -> None:
        """Say, as one of the places where Python looks for a module that is to be imported, that the call is getting on."""
        if time.monotonic() - self.beaten > BEAT_SECONDS:
            self.beaten = time.monotonic()
            self._write(BEAT, b"")

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.connection.recv(size - len(data))
            if not part:
                os._exit(0)
            data += part
        return data

    def _write(self, kind: bytes, data: bytes) -> None:
        with self.writing:
            if self.token:  # and no thread speaks between two calls
                self.connection.sendall(HEAD.pack(self.token, kind, len(data)) + data)
            if kind == ANSWER:
                self.token = b""
