"""Processes that are forked from a small server of their own, never from the trainer, and killed with all that they started.

The trainer holds CUDA, threads and locks that do not survive a fork. The standard library's fork server is a process of few
megabytes that has the verifiers' modules loaded, so that a worker starts in milliseconds. This one is for the workers alone:
it does not run the user's script again, as the standard one does, so that a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable
from multiprocessing import context, forkserver, popen_forkserver, process, reduction, util
from typing import Any

import psutil

PRELOAD = "GRPO_HF_FORK_SERVER"
"""The environment variable that tells a new server what to load."""

ENDED_BY_ITSELF = 255
"""The exit code of a worker that has left with 0, which no worker is meant to do."""

_server = forkserver.ForkServer()
_starting = threading.RLock()
_workers: set[int] = set()


class WorkerProcess(context.ForkServerProcess):
    """A process of our own server."""

    def start(self) -> None:
        """Start it; interpreters that are forked from this one do not take it for theirs."""
        super().start()
        process._children.discard(self)  # type: ignore[attr-defined]

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)

    def terminate(self) -> None:
        """Kill it with all that it started; a verifier may ignore any signal but this."""
        if self.pid is not None:
            kill_worker(self.pid, alive=self.is_alive())

    @property
    def exitcode(self) -> int | None:
        """What it ended with."""
        return ENDED_BY_ITSELF if super().exitcode == 0 else super().exitcode


class WorkerContext(context.ForkServerContext):
    """What a pool makes its processes, pipes and locks by; it knows which processes it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[WorkerProcess] = []

    def Process(self, *args: Any, **options: Any) -> WorkerProcess:  # type: ignore[override]
        """A process that is not started yet."""
        made = WorkerProcess(*args, **options)
        self.processes = [*(old for old in self.processes if old.is_alive()), made]
        return made


class _Popen(popen_forkserver.Popen):
    """Starts a process as the standard one does, with the user's script left out and our own server."""

    def _launch(self, process_obj: Any) -> None:
        preparation = {
            "name": process_obj.name,
            "authkey": process.current_process().authkey,
            "sys_path": [path or os.getcwd() for path in sys.path],
            "sys_argv": sys.argv,
            "dir": os.getcwd(),
        }
        buffer = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(preparation, buffer)
            reduction.dump(process_obj, buffer)
        finally:
            context.set_spawning_popen(None)
        with _starting:
            self.sentinel, writer = _server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
            parents_writer = os.dup(writer)  # tells the child that its parent lives
            self.finalizer = util.Finalize(self, util.close_fds, (parents_writer, self.sentinel))  # type: ignore[attr-defined]
            with open(writer, "wb") as file:
                file.write(buffer.getbuffer())
            self.pid = forkserver.read_signed(self.sentinel)
            _workers.add(self.pid)


def start_server(modules: Iterable[str]) -> None:
    """Start the server, unless it runs, with modules that its workers will need."""
    method = multiprocessing.get_start_method(allow_none=True)
    with _starting:
        os.environ[PRELOAD] = json.dumps({"path": [path or os.getcwd() for path in sys.path], "modules": sorted(modules)})
        try:
            _server.set_forkserver_preload(["grpo_hf.rewards.zygote"])
            _server.ensure_running()
        finally:
            del os.environ[PRELOAD]
    if method is None:  # starting it has settled the method for everybody
        multiprocessing.set_start_method(None, force=True)


def kill_worker(pid: int, *, alive: bool) -> None:
    """Kill a worker, its group, and whatever has left its group."""
    server = _server._forkserver_pid  # type: ignore[attr-defined]
    if alive:
        _kill(pid, _own_groups(server))
    with _starting:
        _workers.discard(pid)
    if server is not None:
        kill_children(server, spare=_workers)


def kill_children(parent: int, *, spare: Collection[int] = ()) -> None:
    """Kill all descendants of a process but those spared and theirs.

    What loses its parent meanwhile comes to this process in turn, so it takes several rounds.
    """
    for _ in range(50):
        with _starting:  # or a worker would be taken for a stray between its start and its entry in the list
            strays = [child for child in _children(parent) if child.pid not in spare]
        if not strays:
            return
        groups = _own_groups(parent)
        for stray in strays:
            for descendant in [*_children(stray, recursive=True), stray]:
                _kill(descendant.pid, groups)
        time.sleep(0.01)


def _kill(pid: int, own_groups: set[int]) -> None:
    """Kill a process and its process group in one go, which no fork bomb can outrun."""
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(pid)
        if group in own_groups:
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)


def _own_groups(server: int | None) -> set[int]:
    """Process groups that are not to be killed: this process's and the server's, where a new worker starts."""
    with contextlib.suppress(ProcessLookupError):
        return {os.getpgrp(), os.getpgid(server or 0)}
    return {os.getpgrp()}


def _children(parent: int | psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    """Those that run; none of a process that has gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(parent) if isinstance(parent, int) else parent
        return [child for child in process.children(recursive=recursive) if _is_running(child)]
    return []


def _is_running(child: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return child.status() != psutil.STATUS_ZOMBIE
    return False


def _forget() -> None:
    """In a fork of this process: the server and the workers are the parent's."""
    global _server, _starting
    if _server._forkserver_alive_fd is not None:  # type: ignore[attr-defined]
        os.close(_server._forkserver_alive_fd)  # type: ignore[attr-defined]  # else the server would wait for this one too
    _server, _starting = forkserver.ForkServer(), threading.RLock()
    _workers.clear()


os.register_at_fork(after_in_child=_forget)
