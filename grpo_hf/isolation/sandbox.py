"""Runs a Python program that nobody trusts in a process that can neither stay, nor see, nor reach anything.

    with Sandbox("print(int(input()) ** 2)") as box:
        box.run("7\\n").stdout

The program starts afresh for each input, in a fork of a bare interpreter: only the standard library can be imported. Tests
that call its functions run in a second process with walls of its own, see `examine`.

With `isolation="full"` a program is process 1 of new PID, mount, network, IPC and host-name namespaces. When that ends
the kernel kills all that it started, and when the process that made it ends, in whatever way, it is killed itself. There is
no network, no /proc and no other program to run; of files there are the standard library and the system's shared
libraries, read-only, and an empty folder in memory (the current folder, HOME and TMPDIR). The program has no privileges, and
as root we give it a user number of its own. Seccomp (on x86_64 and aarch64) refuses sockets and kernel interfaces such as
ptrace. CPU time, address space, open files, sizes of files, processes and wall-clock time are limited. This needs Linux 5.4
and either root with CAP_SYS_ADMIN or user namespaces; a container often has neither.

`isolation="limits"` goes without namespaces: what is left are the limits, Landlock in place of the file system (from Linux
5.13), a user number of its own as root, the kill of the process group, which seccomp keeps the program from leaving, and
seccomp's refusal of all calls by which a process signals another, sets its limits or priority, or sets the mode, owner or
times of a file. The program can then see that other processes exist; its folder is on disk, holds no folders and is looked
at ten times a second for its size; and its processes can outlive one of ours that is killed. This needs x86_64 or aarch64.

`isolation="none"` raises of these walls those that the machine has, and goes without the others. Nothing is promised then.

Limits are per process: a program can use `processes` times `memory_mb`. Against a flaw in the kernel only a virtual machine
protects.
"""

from __future__ import annotations

import functools
import importlib.util
import marshal
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Literal, Self, get_args

from grpo_hf.isolation.job import HOME, Isolation, Limits, Preamble, make_job

__all__ = ["Isolation", "Limits", "Result", "Sandbox", "Status", "Test", "examine"]

Status = Literal["ok", "failed", "timeout", "memory", "killed", "output_limit"]

_PREFIX = "grpo_hf_sandbox_"
_KILLED = (-9, 256 - 9)  # of the outer process, and of the inner one as the outer reports it
_GRACE = 30.0  # seconds that a busy machine may take to start the sandbox or to end a program
_PARTS = ("walls", "program", "cell", "foreign", "values", "wire", "judge")
# Each part gets built-ins of its own, so that a program that patches the shared ones changes nothing there.
_BOOT = """
import builtins, marshal, os, sys
size, data = {size}, b""
while len(data) < size:
    data += os.read(0, size - len(data)) or sys.exit()
sys.modules["grpo_hf"] = type(sys)("grpo_hf")
package = sys.modules["grpo_hf.isolation"] = type(sys)("grpo_hf.isolation")
for name, code in marshal.loads(data):
    part = sys.modules["grpo_hf.isolation." + name] = type(sys)("grpo_hf.isolation." + name)
    part.__builtins__ = dict(vars(builtins))
    setattr(package, name, part)
    exec(code, vars(part))
package.cell.main()
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

    def __init__(
        self,
        program: str,
        *,
        limits: Limits | None = None,
        isolation: Isolation = "full",
        preamble: Preamble | None = None,
    ) -> None:
        self.program, self.limits, self.isolation, self.preamble = program, limits or Limits(), isolation, preamble
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._process = stack.enter_context(_Process(self.limits, self.isolation))
            self._process.start(self.program, self.preamble)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, stdin: str = "", *, timeout: float = math.inf) -> Result:
        """Run the program as a script with this standard input, for `timeout` seconds where the limit is not less."""
        (answer,) = self._process.case([stdin.encode("utf-8", "surrogateescape")], timeout)
        return answer


Test = tuple[Sequence[CodeType], Sequence[str]]
"""The statements of a test, which passes when they end without an exception, and the program's names that they use."""


def examine(
    program: str,
    tests: Sequence[Test],
    *,
    keep_going: bool = False,
    limits: Limits | None = None,
    isolation: Isolation = "full",
    preamble: Preamble | None = None,
    library: Preamble | None = None,
    timeout: float = math.inf,
) -> Result:
    """Load a program as the module `solution` and run tests on it, one after the other in one module of their own.

    The tests run in another process, behind the same walls but in a namespace (or, as root, under a user number) of their
    own, in an interpreter that never runs a line of the program. The program's functions and objects are asked over a pipe,
    see `wire`. After a test that fails the others are run with `keep_going` only. The tests may use the modules and names of
    `library` without importing them.

    >>> examine("def f(x): return x + 1", [([compile("assert f(1) == 2", "<tests>", "exec")], ["f"])]).passed
    (True,)

    Raises:
        ValueError: the machine cannot isolate programs as asked for; it says why.
        RuntimeError: the sandbox itself failed, with its traceback.
    """
    plain = [(list(statements), list(names)) for statements, names in tests]
    given = marshal.dumps((plain, dict(library or {}), keep_going))
    with _Process(limits or Limits(), isolation, judged=True) as process:
        process.start(program, preamble)
        answers = process.case([b"", given], timeout)
    of_program, of_tests = answers
    passed = tuple(flag == 1 for flag in of_tests.passed) + (False,) * (len(tests) - len(of_tests.passed))
    worse = of_program if of_program.status not in ("ok", "failed") else of_tests
    status: Status = "ok" if all(passed) else "failed" if worse.status == "ok" else worse.status
    return replace(of_program, status=status, passed=passed, stderr=of_program.stderr + of_tests.stderr)


class _Process:
    """A bare interpreter that raises the walls around itself, and the files that it is spoken to by."""

    def __init__(self, limits: Limits, isolation: Isolation, *, judged: bool = False):
        if isolation not in get_args(Isolation):
            raise ValueError(f"isolation={isolation!r} is none of {', '.join(map(repr, get_args(Isolation)))}")
        if sys.platform != "linux":
            raise ValueError(f"programs can be isolated on Linux only, not on {sys.platform}")
        self.limits, self.isolation, self.judged = limits, isolation, judged
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.home = HOME
            if self.isolation != "full":
                _remove_leftovers()
                self.home = tempfile.mkdtemp(prefix=_PREFIX)
                stack.callback(_remove, self.home)
            pipes = [os.pipe(), os.pipe()] if self.judged else []
            theirs = [pipes[0][0], pipes[1][1]] if self.judged else []
            # Not -I, which would ignore the seed that makes the order of sets, and so outputs, the same at every run.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT.format(size=len(_parts()))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"HOME": self.home, "TMPDIR": self.home, "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
                pass_fds=theirs,
            )
            stack.callback(self._end)
            for file in theirs:
                os.close(file)
            self._judge = (theirs[0], theirs[1]) if self.judged else None
            self._to: list[Any] = [self._process.stdin]
            self._back: list[Any] = [self._process.stdout]
            if self.judged:
                self._to.append(open(pipes[0][1], "wb"))
                self._back.append(open(pipes[1][0], "rb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()  # a case may be running
        self._stack.close()

    def start(self, program: str, preamble: Preamble | None) -> None:
        """Have the walls raised."""
        job = make_job(program, self.limits, self.isolation, self.home, preamble=preamble, judge=self._judge)
        data = marshal.dumps(job)
        first = [_parts() + len(data).to_bytes(8, "little") + data]
        for answer in self._exchange(first + [b""] * self.judged, _GRACE):
            if answer["problem"] is not None:
                raise ValueError(_advice(answer["problem"], self.isolation))

    def case(self, inputs: list[bytes], timeout: float) -> list[Result]:
        """Run one case: an input for the program, and for the judge its tests."""
        seconds = min(timeout, self.limits.timeout)
        wait = max(1, int(1000 * seconds)).to_bytes(8, "little")
        answers = self._exchange([len(given).to_bytes(8, "little") + wait + given for given in inputs], seconds + _GRACE)
        results = []
        for answer in answers:
            texts = {name: answer[name].decode("utf-8", "replace") for name in ("stdout", "stderr")}
            if problem := answer.pop("problem"):
                raise RuntimeError(f"the sandbox could not start the program, as {problem}: {texts['stderr']}")
            results.append(Result(**answer | texts | {"passed": tuple(answer["passed"])}))
        return results

    def _exchange(self, messages: list[bytes], seconds: float) -> list[dict[str, Any]]:
        """Send messages and wait for the answers; after that time the sandbox is killed."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        for to, message in zip(self._to, messages, strict=True):
            with suppress(BrokenPipeError):  # the answer, or its lack, says why
                to.write(message)
                to.flush()
        answers = [_frame(back) for back in self._back]
        late = timer.finished.is_set()
        timer.cancel()
        timer.join()
        return [
            self._without_answer(f" in {seconds:g} s" if late else "") if answer is None else answer for answer in answers
        ]

    def _without_answer(self, late: str) -> dict[str, Any]:
        """Say how the sandbox ended; a kill that is not ours is the kernel's, which ends it first when memory runs out."""
        assert self._process.stderr is not None
        self._close(self._to)  # so that a judge that is left ends too
        text, status = self._process.stderr.read().decode(errors="replace"), self._process.wait()
        if status not in _KILLED or late or text:
            raise RuntimeError(f"the sandbox gave no answer{late}; it ended with status {status}\n{text}")
        ended = {"status": "memory", "returncode": -9, "stdout": b"", "stderr": b"", "passed": b"", "seconds": 0.0}
        return ended | {"problem": None}

    def _end(self) -> None:
        """End the sandbox, and with it whatever runs in it."""
        self._close(self._to)
        timer = threading.Timer(_GRACE, self._process.kill)
        timer.start()
        self._process.wait()
        timer.cancel()
        timer.join()
        self._close([*self._back, self._process.stderr])

    @staticmethod
    def _close(streams: Iterable[Any]) -> None:
        for stream in streams:
            with suppress(BrokenPipeError):
                stream.close()


def _frame(stream: Any) -> dict[str, Any] | None:
    """The next answer; None where there is none any more."""
    size = int.from_bytes(stream.read(8), "little")
    answer = stream.read(size)
    return None if size == 0 or len(answer) < size else marshal.loads(answer)


def _remove(folder: str) -> None:
    """Remove a folder, however deep a program has made it."""
    try:
        os.rmdir(folder)
    except OSError:
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


@functools.cache
def _remove_leftovers() -> None:
    """Remove the folders of processes that were killed; once in a process, and old ones only, as others may be in use."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > 3600:
                _remove(str(folder))


@functools.cache
def _parts() -> bytes:
    """The code that runs in the sandbox."""
    parts = []
    for name in _PARTS:
        module = f"grpo_hf.isolation.{name}"
        spec = importlib.util.find_spec(module)
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        parts.append((name, spec.loader.get_code(module)))
    return marshal.dumps(parts)


def _advice(problem: str, isolation: Isolation) -> str:
    """The text of the error where the walls cannot be raised."""
    if isolation == "limits":
        return (
            f"programs cannot be run here with isolation='limits': {problem}. isolation='none' goes without the walls that"
            " this machine lacks: for programs that you trust, or in a machine that nothing else runs on"
        )
    return (
        f"programs cannot be isolated here: {problem}. isolation='full' needs mount, PID and network namespaces: root with"
        " CAP_SYS_ADMIN, or user namespaces, which containers (Docker's default profile) and some distributions switch off;"
        " allow them, or pass isolation='limits' for resource limits, seccomp and Landlock alone"
    )
