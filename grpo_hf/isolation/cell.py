"""The sandbox's own process: it raises the walls, then starts a program afresh for every case that it is sent.

Runs in a bare interpreter that `sandbox.py` hands this code to. Frames on its control files carry a job, then for each case
its input, and how the program ended. The program runs in a fork of the process that reads and writes them, and cannot reach
it. Where tests judge the program there are two such processes with walls of their own: one runs the program, the other runs
the tests, which it alone is sent, and asks the program through a pipe.
"""

from __future__ import annotations

import marshal
import os
import select
import time

from grpo_hf.isolation import program as inside
from grpo_hf.isolation import walls

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_MUCH = 1 << 16  # of an output that is only for the eyes
_EVERY_FILE = 1 << 16
_WATCH_MILLISECONDS = 100
_SIGKILL, _SIGXCPU = 9, 24


class _Cell:
    """What runs behind a set of walls: a program as a script, a program that answers, or the tests that ask it."""

    def __init__(self, run: Callable[[dict[str, Any]], int], uid: int | None, control: tuple[int, int]):
        self.run, self.uid, self.control = run, uid, control
        self.channel: list[int] = []  # the pipes between the two
        self.out: int | None = None  # what the program prints, where the judge reads it too
        self.judges = False


def main() -> None:
    """Raise the walls and serve cases until the control file ends."""
    job = marshal.loads(_read(0, int.from_bytes(_read(0, 8), "little")))
    cell = _Cell(inside.run_script, job["uid"], (0, 1))
    try:
        walls.die_with_parent()
        if os.getppid() != job["parent"]:
            os._exit(0)
        walls.be_killed_first()
        if job["isolation"] == "full":
            walls.new_namespaces(as_root=job["uid"] is not None)
            user = os.getuid() if job["uid"] is None else job["uid"]
            walls.new_root(job["shown"], job["links"], job["home"], job["disk_mb"], user)
        elif job["uid"] is not None:
            os.chown(job["home"], job["uid"], job["uid"])
            os.chmod(job["home"], 0o1777)  # the judge is another user
        if job["judge"]:
            cell = _one_of_two(job)
        _enter(job, cell)
    except OSError as error:
        _send(cell, {"problem": str(error)})
        os._exit(1)
    _send(cell, {"problem": None})
    while header := _read(cell.control[0], 16):
        size, milliseconds = (int.from_bytes(header[place : place + 8], "little") for place in (0, 8))
        _send(cell, _run_case(job, cell, _received(cell.control[0], size), milliseconds))
    os._exit(0)


def _one_of_two(job: dict[str, Any]) -> _Cell:
    """Fork a process for the program and one for the judge, joined by a pipe each way, and wait for them."""
    from grpo_hf.isolation import judge

    out, asked, answered = os.memfd_create("out"), os.pipe(), os.pipe()
    judging = os.fork()
    if judging == 0:
        cell, others = _Cell(judge.main, job["judge_uid"], job["judge"]), (0, 1, asked[0], answered[1])
        cell.channel, cell.judges = [answered[0], asked[1]], True
    elif child := os.fork():
        _wait_for(child, judging)
    else:
        cell, others = _Cell(inside.serve, job["uid"], (0, 1)), (*job["judge"], asked[1], answered[0])
        cell.channel = [asked[0], answered[1]]
    walls.die_with_parent()
    cell.out = out
    for file in others:
        os.close(file)
    return cell


def _enter(job: dict[str, Any], cell: _Cell) -> None:
    """Raise the cell's own walls, but for those that only its program is to have."""
    if job["isolation"] == "full":
        walls.new_process_numbers()
        if child := os.fork():  # process 1, whose end kills whatever runs with it
            _wait_for(child)
    walls.drop_privileges(cell.uid)
    walls.die_with_parent()
    if job["isolation"] == "full":
        return
    walls.adopt_orphans()
    if not os.access(os.__file__, os.R_OK):
        raise OSError(f"the user {cell.uid} may not read {os.__file__}; use a Python that everybody may read")
    _unless_none(job, walls.restrict_files, job["shown"], job["home"])
    os.chdir(job["home"])


def _wait_for(*children: int) -> NoReturn:
    """End when all children have, as the first that fails; without files, or the pipes between the cells would never end."""
    os.closerange(0, _EVERY_FILE)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(next((status for status in ended if status), 0) & 0xFF)


def _unless_none(job: dict[str, Any], raise_wall: Callable[..., None], *arguments: Any) -> None:
    """Raise a wall, which the machine may lack only where the user has asked for none."""
    try:
        raise_wall(*arguments)
    except OSError:
        if job["isolation"] != "none":
            raise


def _run_case(job: dict[str, Any], cell: _Cell, given: int, milliseconds: int) -> dict[str, Any]:
    """Run the program on one input, or the tests, and say how it ended."""
    if not cell.channel:
        _empty(job["home"])
    out = os.memfd_create("out") if cell.out is None else cell.out
    err, passed = os.memfd_create("err"), os.memfd_create("passed")
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        judges = cell.judges
        files = [given, err if judges else out, err, *cell.channel, *((passed, out) if judges else ())]
        _be_the_program(job, cell, [*files, begins])
    for file in (begins, *cell.channel):
        os.close(file)
    ready = os.read(begun, 1) != b""
    started = time.monotonic()
    stopped = _stopped(child, milliseconds, "" if job["isolation"] == "full" else job["home"], job["disk_mb"])
    _kill_all(child, everything=os.getpid() == 1 or cell.uid is not None)
    returncode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - started
    _reap()
    size, error_size = os.fstat(out).st_size, os.fstat(err).st_size
    error = os.pread(err, _MUCH, max(0, error_size - _MUCH))
    flooded = size >= job["file_bytes"]
    result = {
        "problem": None if ready else "its last walls could not be raised",
        "status": stopped or _status(returncode, flooded, error),
        "returncode": returncode,
        "stdout": os.pread(out, _MUCH if flooded else size, 0),
        "stderr": error,
        "passed": os.pread(passed, _MUCH, 0),
        "seconds": seconds,
    }
    for file in (given, begun, out, err, passed):
        os.close(file)
    return result


def _be_the_program(job: dict[str, Any], cell: _Cell, files: list[int]) -> NoReturn:
    """Give up everything but these files, say so on the last, and run; this process never returns to the server's code."""
    status = 1
    try:
        os.setsid()
        walls.die_with_parent()
        begins = _keep_only(files) - 1
        inside.open_streams()
        walls.limit_resources(job["limits"])
        _unless_none(job, walls.restrict_calls, job["isolation"] == "full")
        os.write(begins, b".")
        os.close(begins)
        status = cell.run(job)
    except Exception as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(status)


def _keep_only(files: list[int]) -> int:
    """Close all files but these, which become 0, 1, 2 and so on; how many they are."""
    above = []
    for file in files:
        while file < len(files):
            file = os.dup(file)
        above.append(file)
    for place, file in enumerate(above):
        os.dup2(file, place)
    os.closerange(len(files), _EVERY_FILE)
    return len(files)


def _status(returncode: int, flooded: bool, error: bytes) -> str:
    """Name the way a program ended by itself."""
    if returncode == -_SIGXCPU:
        return "timeout"
    if flooded:
        return "output_limit"
    if returncode == 1 and error.endswith(inside.OUT_OF_MEMORY):
        return "memory"
    if returncode < 0:
        return "killed"
    return "ok" if returncode == 0 else "failed"


def _stopped(child: int, milliseconds: int, watched: str, disk_mb: int) -> str | None:
    """Wait for a process to end; why it must be ended, if it must. It stays unreaped, so its number stays its own.

    A folder without a file system of its own has no limit but this: it is looked at again and again.
    """
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    end, stopped = time.monotonic() + milliseconds / 1000, None
    while stopped is None:
        left = max(0.0, 1000 * (end - time.monotonic()))
        if poll.poll(min(left, _WATCH_MILLISECONDS) if watched else left):
            break
        if left == 0:
            stopped = "timeout"
        elif watched and _is_full(watched, disk_mb):
            stopped = "output_limit"
    os.close(handle)
    return stopped


def _is_full(folder: str, disk_mb: int) -> bool:
    count = size = 0
    for entry in os.scandir(folder):
        try:
            size += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
        count += 1
        if size > disk_mb << 20 or count > 64 * disk_mb:
            return True
    return False


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


def _read(file: int, size: int) -> bytes:
    """Read that many bytes of a file, or none where it ends; unbuffered, as the forks share it."""
    data = b""
    while len(data) < size:
        part = os.read(file, size - len(data))
        if not part:
            return b""
        data += part
    return data


def _received(file: int, size: int) -> int:
    """Move bytes of a pipe into an anonymous file, unread: what is in this memory is in the program's too."""
    given = os.memfd_create("given")
    while size > 0:
        moved = os.splice(file, given, size)
        if moved == 0:
            os._exit(0)
        size -= moved
    os.lseek(given, 0, os.SEEK_SET)
    return given


def _send(cell: _Cell, message: dict[str, Any]) -> None:
    data = marshal.dumps(message)
    data = len(data).to_bytes(8, "little") + data
    while data:
        data = data[os.write(cell.control[1], data) :]
