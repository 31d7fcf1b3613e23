"""Runs a Python program that nobody trusts in a process that can neither stay, nor see, nor reach anything.

    with Sandbox("print(int(input()) ** 2)") as box:
        box.run("7\\n").stdout

The program starts afresh for each input, in a fork of a bare interpreter: only the standard library can be imported.

With `isolation="full"` that interpreter is process 1 of new PID, mount, network, IPC and host-name namespaces. When it ends
the kernel kills all that it started, and when the process that made it ends, in whatever way, it is killed itself. There is
no network, no /proc and no other program to run; of files there are the standard library and the system's shared
libraries, read-only, and an empty folder in memory (the current folder, HOME and TMPDIR). The program has no privileges, and
as root we give it a user number of its own. Seccomp (on x86_64 and aarch64) refuses sockets and kernel interfaces such as
ptrace. CPU time, address space, open files, sizes of files, processes and wall-clock time are limited. This needs Linux 5.4
and either root with CAP_SYS_ADMIN or user namespaces; a container often has neither.

`isolation="limits"` goes without namespaces: what is left are the limits, seccomp, Landlock in place of the file system
(from Linux 5.13), a user number of its own as root, and the kill of the process group, which seccomp keeps the program from
leaving. The program can then see that other processes exist, its folder is on disk and has no limit, and its processes can
outlive a process of ours that is killed. This needs x86_64 or aarch64.

Limits are per process: a program can use `processes` times `memory_mb`. Against a flaw in the kernel only a virtual machine
protects.
"""

from __future__ import annotations

import functools
import importlib.util
import marshal
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Literal, Self

from reward_fns._sandbox_job import HOME, Isolation, Limits, make_job

__all__ = ["Isolation", "Limits", "Result", "Sandbox", "Status"]

Status = Literal["ok", "failed", "timeout", "memory", "killed", "output_limit"]

_PREFIX = "grpo_hf_sandbox_"
_KILLED = (-9, 256 - 9)  # of the outer process, and of the inner one as the outer reports it
_GRACE = 30.0  # seconds that a busy machine may take to start the sandbox or to end a program
_PARTS = ("_sandbox_walls", "_sandbox_program", "_sandbox_child")
# Each part gets built-ins of its own, so that a program that patches the shared ones changes nothing there.
_BOOT = """
import builtins, marshal, os, sys
size, data = {size}, b""
while len(data) < size:
    data += os.read(0, size - len(data)) or sys.exit()
package = sys.modules["reward_fns"] = type(sys)("reward_fns")
for name, code in marshal.loads(data):
    part = type(sys)(name)
    part.__builtins__ = dict(vars(builtins))
    setattr(package, name, part)
    exec(code, vars(part))
part.main()
"""


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    status: Status
    """ok: it ended with status 0, and its tests passed. failed: it did not. timeout: it was killed at its deadline. memory:
    an uncaught MemoryError. killed: a signal ended it. output_limit: it printed more than it may."""
    returncode: int
    """Its exit status, or minus the signal that ended it."""
    stdout: str
    stderr: str
    """The end of it."""
    passed: tuple[bool, ...]
    """For each test, whether it passed."""
    seconds: float


class Sandbox:
    """A program in a sandbox, to be run on any number of inputs, each time from the start and with an empty folder.

    It is killed when the thread that opened it ends.

    >>> with Sandbox("print(int(input()) ** 2)") as box:
    ...     box.run("7\\n").stdout, box.run("seven").status
    ('49\\n', 'failed')

    Raises:
        ValueError: the machine cannot isolate programs as asked for; it says why.
        RuntimeError: the sandbox itself failed, with its traceback.
    """

    def __init__(self, program: str, *, limits: Limits | None = None, isolation: Isolation = "full") -> None:
        if isolation not in ("full", "limits"):
            raise ValueError(f"isolation={isolation!r} is neither 'full' nor 'limits'")
        if sys.platform != "linux":
            raise ValueError(f"programs can be isolated on Linux only, not on {sys.platform}")
        self.program, self.limits, self.isolation = program, limits or Limits(), isolation
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            home = HOME
            if self.isolation == "limits":
                _remove_leftovers()
                folder = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
                home = stack.enter_context(folder)
            # Not -I, which would ignore the seed that makes the order of sets, and so outputs, the same at every run.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT.format(size=len(_parts()))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"HOME": home, "TMPDIR": home, "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
            stack.callback(self._end)
            job = marshal.dumps(make_job(self.program, self.limits, self.isolation, home))
            problem = self._exchange(_parts() + len(job).to_bytes(8, "little") + job, _GRACE)["problem"]
            if problem is not None:
                raise ValueError(_advice(problem, self.isolation))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()  # a case may be running
        self._stack.close()

    def run(self, stdin: str = "", *, timeout: float = math.inf) -> Result:
        """Run the program as a script with this standard input, for `timeout` seconds where the limit is not less."""
        return self._case(stdin.encode("utf-8", "surrogateescape"), 0, timeout)

    def test(self, tests: Sequence[CodeType], *, keep_going: bool = False, timeout: float = math.inf) -> Result:
        """Run the program as a module, then each test in that module, which passes when it ends without an exception.

        After one that fails the others are run with `keep_going` only.
        """
        return self._case(marshal.dumps((list(tests), keep_going)), len(tests), timeout)

    def _case(self, given: bytes, tests: int, timeout: float) -> Result:
        seconds = min(timeout, self.limits.timeout)
        header = b"".join(number.to_bytes(8, "little") for number in (len(given), tests, max(1, int(1000 * seconds))))
        answer = self._exchange(header + given, seconds + _GRACE)
        texts = {name: answer[name].decode("utf-8", "replace") for name in ("stdout", "stderr")}
        if problem := answer.pop("problem"):
            raise RuntimeError(f"the sandbox could not start the program, as {problem}: {texts['stderr']}")
        return Result(**answer | texts | {"passed": tuple(answer["passed"])})

    def _exchange(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Send a message and wait for the answer; after that time the sandbox is killed."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        with suppress(BrokenPipeError):  # the answer, or its lack, says why
            to.write(message)
            to.flush()
        size = int.from_bytes(back.read(8), "little")
        answer = back.read(size)
        late = timer.finished.is_set()
        timer.cancel()
        timer.join()
        if size == 0 or len(answer) < size:
            return self._without_answer(f" in {seconds:g} s" if late else "")
        return marshal.loads(answer)

    def _without_answer(self, late: str) -> dict[str, Any]:
        """Say how the sandbox ended; a kill that is not ours is the kernel's, which ends it first when memory runs out."""
        assert self._process.stderr is not None
        text, status = self._process.stderr.read().decode(errors="replace"), self._process.wait()
        if status not in _KILLED or late or text:
            raise RuntimeError(f"the sandbox gave no answer{late}; it ended with status {status}\n{text}")
        ended = {"status": "memory", "returncode": -9, "stdout": b"", "stderr": b"", "passed": (), "seconds": 0.0}
        return ended | {"problem": None}

    def _end(self) -> None:
        """End the sandbox, and with it whatever runs in it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        timer = threading.Timer(_GRACE, self._process.kill)
        timer.start()
        self._process.wait()
        timer.cancel()
        timer.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@functools.cache
def _remove_leftovers() -> None:
    """Remove the folders of processes that were killed; once in a process, and old ones only, as others may be in use."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _parts() -> bytes:
    """The code that runs in the sandbox."""
    parts = []
    for name in _PARTS:
        module = f"reward_fns.{name}"
        spec = importlib.util.find_spec(module)
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        parts.append((name, spec.loader.get_code(module)))
    return marshal.dumps(parts)


def _advice(problem: str, isolation: Isolation) -> str:
    """The text of the error where the walls cannot be raised."""
    if isolation == "limits":
        return f"programs cannot be run here with isolation='limits': {problem}"
    return (
        f"programs cannot be isolated here: {problem}. isolation='full' needs mount, PID and network namespaces: root with"
        " CAP_SYS_ADMIN, or user namespaces, which containers (Docker's default profile) and some distributions switch off;"
        " allow them, or pass isolation='limits' for resource limits, seccomp and Landlock alone"
    )
