"""The sandbox's own process: it raises the walls, then starts the program afresh for every input that it is sent.

Runs in a bare interpreter that `sandbox.py` hands this code to. Frames on standard input and output carry a job, then for
each case its input or tests, and how the program ended. The program runs in a fork of the process that reads and writes
them, and cannot reach it.
"""

from __future__ import annotations

import marshal
import os
import select
import time

from reward_fns import _sandbox_program as inside
from reward_fns import _sandbox_walls as walls

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from typing import Any, NoReturn

_MUCH = 1 << 16  # of an output that is only for the eyes
_SIGKILL, _SIGXCPU = 9, 24


def main() -> None:
    """Raise the walls and serve cases until standard input ends."""
    job = marshal.loads(_read(int.from_bytes(_read(8), "little")))
    try:
        walls.die_with_parent()
        if os.getppid() != job["parent"]:
            os._exit(0)
        walls.be_killed_first()
        (_enter_namespaces if job["namespaces"] else _enter_limits)(job)
    except OSError as error:
        _send({"problem": str(error)})
        os._exit(1)
    _send({"problem": None})
    while header := _read(24):
        size, tests, milliseconds = (int.from_bytes(header[place : place + 8], "little") for place in (0, 8, 16))
        _send(_run_case(job, _received(size), tests, milliseconds))
    os._exit(0)


def _enter_namespaces(job: dict[str, Any]) -> None:
    """Go on as process 1 of new namespaces, whose end kills whatever runs in them; the outer process waits for it."""
    uid = job["uid"]
    walls.new_namespaces(as_root=uid is not None)
    walls.new_root(job["shown"], job["links"], job["home"], job["disk_mb"], os.getuid() if uid is None else uid)
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    walls.drop_privileges(uid)
    walls.die_with_parent()


def _enter_limits(job: dict[str, Any]) -> None:
    """Do what can be done without namespaces."""
    if job["uid"] is not None:
        os.chown(job["home"], job["uid"], job["uid"])
    walls.drop_privileges(job["uid"])
    walls.die_with_parent()
    walls.adopt_orphans()
    if not os.access(os.__file__, os.R_OK):
        raise OSError(f"the user {job['uid']} may not read {os.__file__}; use a Python that everybody may read")
    walls.restrict_files(job["shown"], job["home"])
    os.chdir(job["home"])


def _run_case(job: dict[str, Any], given: int, tests: int, milliseconds: int) -> dict[str, Any]:
    """Run the program on one input, or against tests, and say how it ended."""
    _empty(job["home"])
    files = out, err, tickets, passed = [os.memfd_create(name) for name in ("out", "err", "tickets", "passed")]
    os.write(tickets, os.urandom(inside.TICKET * tests))
    os.lseek(tickets, 0, os.SEEK_SET)
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_program(job, given, files, tests, begins)
    os.close(begins)
    ready = os.read(begun, 1) != b""
    started = time.monotonic()
    in_time = _ends(child, milliseconds)
    _kill_all(child, everything=os.getpid() == 1 or job["uid"] is not None)
    returncode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - started
    _reap()
    earned = _earned(tickets, passed, tests)
    size, error_size = os.fstat(out).st_size, os.fstat(err).st_size
    flooded = size >= job["file_bytes"]
    result = {
        "problem": None if ready else "its last walls could not be raised",
        "status": _status(in_time, returncode, flooded, all(earned)),
        "returncode": returncode,
        "stdout": os.pread(out, _MUCH if flooded else size, 0),
        "stderr": os.pread(err, _MUCH, max(0, error_size - _MUCH)),
        "passed": earned,
        "seconds": seconds,
    }
    for file in (given, begun, *files):
        os.close(file)
    return result


def _be_the_program(job: dict[str, Any], given: int, files: list[int], tests: int, begins: int) -> NoReturn:
    """Give up everything, say so, and run the program; this process never returns to the server's code."""
    out, err, tickets, passed = files
    status = 1
    try:
        os.setsid()
        walls.die_with_parent()
        for file, place in ((os.open(os.devnull, os.O_RDONLY) if tests else given, 0), (out, 1), (err, 2)):
            os.dup2(file, place)
        inside.open_streams()
        walls.limit_resources(job["limits"])
        walls.restrict_calls(job["namespaces"])
        program = job["program"]
        os.write(begins, b".")
        os.close(begins)
        status = inside.run_tests(program, given, tickets, passed) if tests else inside.run_script(program)
    except Exception as error:
        os.write(err, repr(error).encode())
    finally:
        os._exit(status)


def _status(in_time: bool, returncode: int, flooded: bool, passed: bool) -> str:
    """Name the way a program ended."""
    if not in_time or returncode == -_SIGXCPU:
        return "timeout"
    if flooded:
        return "output_limit"
    if returncode == inside.OUT_OF_MEMORY:
        return "memory"
    if returncode < 0:
        return "killed"
    return "ok" if returncode == 0 and passed else "failed"


def _earned(tickets: int, passed: int, tests: int) -> list[bool]:
    """Which tests' tickets are among the passed ones."""
    size = inside.TICKET
    valid, shown = (os.pread(file, size * tests, 0) for file in (tickets, passed))
    return [valid[place : place + size] in shown for place in range(0, len(valid), size)]


def _ends(child: int, milliseconds: int) -> bool:
    """Wait for a process to end, and say whether it did so in time; it stays unreaped, so its number stays its own."""
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(milliseconds))
    os.close(handle)
    return ended


def _kill_all(child: int, everything: bool) -> None:
    """Kill all processes that can be (of this namespace, or of a user of our own), or else those of the child's group."""
    try:
        os.kill(-1 if everything else -child, _SIGKILL)
    except ProcessLookupError:
        os.kill(child, _SIGKILL)


def _reap() -> None:
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _empty(folder: str) -> None:
    """Remove what an earlier case left in a folder; in a process of its own, as there is no telling what it left."""
    if not os.listdir(folder):
        return
    child = os.fork()
    if child == 0:
        try:
            import shutil

            for entry in os.scandir(folder):
                remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
                remove(entry.path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _read(size: int) -> bytes:
    """Read that many bytes of standard input, or none where it ends; unbuffered, as the forks share it."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            return b""
        data += part
    return data


def _received(size: int) -> int:
    """Move bytes of standard input into an anonymous file, unread: what is in this memory is in the program's too."""
    file = os.memfd_create("given")
    while size > 0:
        moved = os.splice(0, file, size)
        if moved == 0:
            os._exit(0)
        size -= moved
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _send(message: dict[str, Any]) -> None:
    data = marshal.dumps(message)
    data = len(data).to_bytes(8, "little") + data
    while data:
        data = data[os.write(1, data) :]
