"""The walls around a program: namespaces, a file system of its own, no privileges, fewer system calls, resource limits.

Runs in the sandbox's own process, so it imports little, and nothing outside the standard library. Every wall stays for good.
"""

from __future__ import annotations

import ctypes
import os
import resource

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

_STAGE = "/proc"  # the new root is laid over it: it is on every Linux and holds nothing that a program gets to see

# Constants of <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/landlock.h>, <linux/audit.h>, <linux/filter.h>.
_NEW_USER = 0x10000000
_NEW_OTHERS = 0x20000 | 0x4000000 | 0x8000000 | 0x40000000  # mounts, host name, IPC, network
_NEW_NUMBERS = 0x20000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_STAT_RELATIME, _RELATIME = 4096, 1 << 21
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048  # of statvfs, where they have the values that mount takes
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ, _READ_FOLDER, _WRITE_DEVICE = 1 | 4, 8, 2
_OWN_FILES = _READ | _READ_FOLDER | 2 | 32 | 256 | 1 << 14  # write, remove and make files, truncate them
_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050001, 0x00050026  # the others fail with EPERM and, as if it were new, ENOSYS

# System calls with their numbers on x86_64 and aarch64 ("-": has none). They go past the namespaces (a socket of a family
# that has none), hold memory that no limit counts, or are kernel surface that a program under test has no use for.
_REFUSED = """
execve 59 221
execveat 322 281
socket 41 198
ptrace 101 117
process_vm_readv 310 270
process_vm_writev 311 271
unshare 272 97
setns 308 268
mount 165 40
pivot_root 155 41
open_tree 428 428
fsopen 430 430
shmget 29 194
semget 64 190
msgget 68 186
memfd_create 319 279
memfd_secret 447 447
add_key 248 217
request_key 249 218
keyctl 250 219
bpf 321 280
perf_event_open 298 241
userfaultfd 323 282
io_uring_setup 425 425
pidfd_getfd 438 438
"""
# Without namespaces also those that signal other processes of the user, leave the process group, change the priority, the
# limits or the memory of another process, reach IPC objects, or change of a file what Landlock does not guard.
_REFUSED_WITHOUT_NAMESPACES = """
setpgid 109 154
setsid 112 157
kill 62 129
tkill 200 130
tgkill 234 131
rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
pidfd_send_signal 424 424
setpriority 141 140
ioprio_set 251 30
sched_setparam 142 118
sched_setscheduler 144 119
sched_setaffinity 203 122
sched_setattr 314 274
migrate_pages 256 238
move_pages 279 239
process_madvise 440 440
process_mrelease 448 448
kcmp 312 272
chroot 161 51
umount2 166 39
move_mount 429 429
mount_setattr 442 442
shmat 30 196
shmctl 31 195
semop 65 193
semctl 66 191
semtimedop 220 192
msgsnd 69 189
msgrcv 70 188
msgctl 71 187
mq_open 240 180
mq_unlink 241 181
inotify_init 253 -
inotify_init1 294 26
fanotify_init 300 262
name_to_handle_at 303 264
open_by_handle_at 304 265
truncate 76 45
chmod 90 -
fchmod 91 52
fchmodat 268 53
fchmodat2 452 452
chown 92 -
fchown 93 55
lchown 94 -
fchownat 260 54
utime 132 -
utimes 235 -
futimesat 261 -
utimensat 280 88
setxattr 188 5
lsetxattr 189 6
fsetxattr 190 7
setxattrat 463 463
removexattr 197 14
lremovexattr 198 15
fremovexattr 199 16
removexattrat 466 466
file_setattr 469 469
"""
_CLONE, _CLONE3, _FCNTL, _IOCTL, _PRLIMIT = (56, 220), (435, 435), (72, 25), (16, 29), (302, 261)
_NEW_ANY = 0x7E020000  # of clone's flags: a new namespace of any kind
_SIGNALS_OTHERS = (8, 10, 15, 1024)  # of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE
_HARMLESS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # of ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FION-, FIOCLEX


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library.

    Raises:
        OSError: it failed; the text names it.
    """
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: object = None) -> None:
    zero = ctypes.c_ulong(0)
    _call("prctl", option, ctypes.c_ulong(value), pointer or zero, zero, zero)


def die_with_parent() -> None:
    """Be killed when the parent ends; a change of user undoes it."""
    _prctl(_SET_DEATH_SIGNAL, 9)


def adopt_orphans() -> None:
    """Be the parent of the descendants whose own ends, and so the one to reap them."""
    _prctl(_SET_SUBREAPER, 1)


def be_killed_first() -> None:
    """Ask the kernel to kill this process and its children before any other when the machine runs out of memory."""
    _write("/proc/self/oom_score_adj", "1000")


def new_namespaces(as_root: bool) -> None:
    """Leave the machine's mounts, network, IPC objects and host name."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", ctypes.c_int(_NEW_OTHERS if as_root else _NEW_OTHERS | _NEW_USER))
    if not as_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")


def new_process_numbers() -> None:
    """Have the next child be process 1 of a PID namespace."""
    _call("unshare", ctypes.c_int(_NEW_NUMBERS))


def new_root(shown: Iterable[str], links: dict[str, str], home: str, disk_mb: int, uid: int) -> None:
    """Change to a root that has nothing but the `shown` paths, read-only, and an empty `home` in memory, and go there.

    The root lies inside another mount, and a process with such a root may not make user namespaces.
    """
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("none", _STAGE, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    for path in shown:
        _show(path, _STAGE + path)
    for path, target in links.items():
        os.makedirs(os.path.dirname(_STAGE + path), exist_ok=True)
        os.symlink(target, _STAGE + path)
    os.makedirs(_STAGE + home)
    # An inode costs about 1 kB of kernel memory, so their number needs a limit besides the size.
    options = f"size={disk_mb}m,nr_inodes={64 * disk_mb},mode=1777,uid={uid},gid={uid}"
    _mount("none", _STAGE + home, "tmpfs", _NO_SUID | _NO_DEVICES, options)
    _mount(None, _STAGE, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chroot(_STAGE)
    os.chdir(home)


def _show(path: str, target: str) -> None:
    """Bind a file or folder to its place under the new root; read-only, as a user without privileges may own it."""
    folder = os.path.isdir(path)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, _BIND | _RECURSIVE)
    flags = os.statvfs(target).f_flag
    kept = (flags & _KEPT_FLAGS) | (_RELATIME if flags & _STAT_RELATIME else 0)
    device = path.startswith("/dev/")
    _mount(None, target, None, kept | _REMOUNT | _BIND | _NO_SUID | (0 if device else _READ_ONLY | _NO_DEVICES))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text if text is None else text.encode() for text in (source, target, kind, options)]
    try:
        _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source or 'flags'} on {target})") from error


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def drop_privileges(uid: int | None) -> None:
    """Become the user `uid` (None: stay the one it is) without capabilities, and with no way to get any."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)
    _prctl(_SET_DUMPABLE, 0)


def restrict_files(shown: Iterable[str], home: str) -> None:
    """Refuse files outside the `shown` paths and `home` with Landlock; in `home` there may be files, but no folders.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError("the kernel has no Landlock (Linux 5.13), so nothing would keep it from the user's files")
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    scopes = 3 if version >= 6 else 0  # abstract sockets and signals to processes outside
    attributes = (ctypes.c_uint64 * 3)(everything, 0, scopes)
    size = ctypes.c_size_t(24 if version >= 6 else 8)
    rules = _call("syscall", _LANDLOCK_CREATE, attributes, size, 0)
    for path, access in [*((path, _READ) for path in shown), (home, everything & _OWN_FILES)]:
        if path != home:
            access |= _READ_FOLDER if os.path.isdir(path) else _WRITE_DEVICE * path.startswith("/dev/")
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = (ctypes.c_uint32 * 3)(access, 0, beneath)
        _call("syscall", _LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(beneath)
    _call("syscall", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def restrict_calls(namespaces: bool) -> None:
    """Refuse system calls with seccomp; without namespaces more of them.

    Raises:
        OSError: the numbers of this machine's are not known here, and without namespaces they are needed.
    """
    machine = os.uname().machine
    if machine not in _MACHINES and namespaces:
        return
    if machine not in _MACHINES:
        raise OSError(f"seccomp on {machine} is not supported, only on {' and '.join(_MACHINES)}")
    column, architecture = _MACHINES[machine]
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    steps += [(_IF_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]  # a second set of numbers on x86_64
    for line in (_REFUSED + ("" if namespaces else _REFUSED_WITHOUT_NAMESPACES)).split("\n"):
        number = line.split()[column] if line else "-"
        steps += [] if number == "-" else [(_IF_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _REFUSE)]
    rules = [_refused_if(_CLONE, 0, [(_IF_ANY_BIT, _NEW_ANY)]), [(_IF_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _UNKNOWN)]]
    if not namespaces:
        rules.append(_refused_if(_FCNTL, 1, [(_IF_EQUAL, command) for command in _SIGNALS_OTHERS]))
        rules.append(_refused_if(_IOCTL, 1, [(_IF_EQUAL, command) for command in _HARMLESS], unless=True))
        rules.append(_refused_if(_PRLIMIT, 0, [(_IF_EQUAL, 0)], unless=True))  # 0: the process itself
    steps += [
        (kind, yes, no, value[column - 1] if isinstance(value, tuple) else value)
        for rule in rules
        for kind, yes, no, value in rule
    ]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(
        step.to_bytes(2, "little") + bytes([yes, no]) + value.to_bytes(4, "little") for step, yes, no, value in steps
    )
    filters = ctypes.create_string_buffer(code, len(code))
    _prctl(_SET_SECCOMP, 2, ctypes.byref((ctypes.c_uint64 * 2)(len(steps), ctypes.addressof(filters))))


def _refused_if(
    numbers: tuple[int, int], argument: int, tests: list[tuple[int, int]], *, unless: bool = False
) -> list[tuple[int, int, int, Any]]:
    """Steps that refuse a system call if (or unless) the low half of one of its arguments passes one of these tests."""
    found, otherwise = (_ALLOW, _REFUSE) if unless else (_REFUSE, _ALLOW)
    checks = [(kind, len(tests) - place, 0, value) for place, (kind, value) in enumerate(tests)]
    steps = [(_LOAD, 0, 0, 16 + 8 * argument), *checks, (_RETURN, 0, 0, otherwise), (_RETURN, 0, 0, found)]
    return [(_IF_EQUAL, 0, len(steps), numbers), *steps]


def limit_resources(limits: dict[str, int]) -> None:
    """Set soft and hard limits by their RLIMIT names, never above the ones in force."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
