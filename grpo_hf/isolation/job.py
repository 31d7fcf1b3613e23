"""What a sandbox is told about its program: limits, paths, users."""

from __future__ import annotations

import functools
import math
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Isolation = Literal["full", "limits", "none"]
Preamble = Mapping[str, tuple[str, str | None]]
"""For a name the module that has it, and what it is called there (None: it is the module)."""

HOME = "/sandbox"


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    timeout: float = 5.0
    """Seconds of wall-clock time for each input; CPU time is limited to a little more."""
    memory_mb: int = 512
    """Address space of each process, Python's own 30 MB included."""
    file_mb: int = 16
    """Size of a file, and of what it may print."""
    disk_mb: int = 64
    """Size of its folder; also 64 files for each MB."""
    open_files: int = 64
    processes: int = 16
    """Processes and threads together."""

    def __post_init__(self) -> None:
        least = {"timeout": 0.01, "memory_mb": 64, "file_mb": 1, "disk_mb": 1, "open_files": 16, "processes": 2}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name}={getattr(self, name)!r} is too little to run Python; give at least {value}")


def make_job(
    program: str,
    limits: Limits,
    isolation: Isolation,
    home: str,
    *,
    preamble: Preamble | None = None,
    judge: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """What the sandbox is told before its first case; ``judge`` are the files that one for tests is controlled by."""
    shown, links = _paths()
    full = isolation == "full"
    uid, judge_uid = (None, None) if isolation == "none" else (_own_user(), _own_user() if judge else None)
    counted_alone = uid is not None or (full and _kernel() >= (5, 14))
    return {
        "parent": os.getpid(),
        "program": program,
        "preamble": dict(preamble or {}),
        "isolation": isolation,
        "uid": uid,
        "judge": judge,
        "judge_uid": judge_uid,
        "home": home,
        "shown": shown,
        "links": links,
        "disk_mb": limits.disk_mb,
        "file_bytes": limits.file_mb << 20,
        "limits": {
            "AS": limits.memory_mb << 20,
            "CPU": math.ceil(limits.timeout) + 1,
            "FSIZE": limits.file_mb << 20,
            "NOFILE": limits.open_files,
            "NPROC": limits.processes + (0 if counted_alone else _threads()),
            "CORE": 0,
            "MSGQUEUE": 0,
        },
    }


@functools.cache
def _paths() -> tuple[list[str], dict[str, str]]:
    """What a program may read: the standard library, the shared libraries that it loads, a few devices; and links."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    python = [os.path.dirname(os.__file__), *(os.path.join(sys.base_exec_prefix, name) for name in ("lib", sys.platlibdir))]
    others = ["/etc/ld.so.cache", "/usr/share/zoneinfo", *(f"/dev/{name}" for name in ("null", "zero", "urandom", "random"))]
    paths = [path for path in system + python + others if os.path.exists(path)]
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)} | {"/dev/shm": HOME}
    real = [path for path in paths if path not in links]
    shown = [path for path in dict.fromkeys(real) if not any(path.startswith(f"{other}/") for other in real)]
    return shown, links if any(path.startswith("/tmp/") for path in shown) else links | {"/tmp": HOME}


def _own_user() -> int | None:
    """As root, a user number that nobody else has; None for anyone else, who cannot change it."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        top = max(sum(map(int, line.split()[::2])) for line in file)  # the end of each range of users: first + count
    return None if top < 1 << 16 else secrets.randbelow(min(top, 1 << 31) // 2) + min(top, 1 << 31) // 2


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _threads() -> int:
    """How many threads there are on the machine."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].split("/")[1])
