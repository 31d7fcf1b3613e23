"""The walls as another user sees them: what holds without namespaces, without Landlock, and for whom nothing holds."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SECRET = f"secret-{secrets.token_hex(8)}"
USER = 12345

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

# A private Python, as below /root, is shown to everybody first; then system calls are refused, as Docker or an old kernel
# refuses them; then the user changes, makes a file, a folder and a process of its own, and runs programs.
SCRIPT = """
import json, os, resource, subprocess, sys, tempfile
from pathlib import Path
from grpo_hf.isolation import sandbox, walls
from grpo_hf.reward_fns.code import code
task = json.loads(sys.argv[1])
sandbox._parts()
python = sys.base_prefix
sys.executable = os.path.realpath(sys.executable)
if not all(os.stat(folder).st_mode & 1 for folder in Path(python).parents):
    walls._call("unshare", 0x20000)
    walls._mount(None, "/", None, walls._RECURSIVE | walls._PRIVATE)
    folder = os.open(python, os.O_PATH)
    walls._mount("none", "/" + python.split("/")[1], "tmpfs", 0, "mode=755")
    os.makedirs(python)
    walls._mount(f"/proc/self/fd/{folder}", python, None, walls._BIND | walls._RECURSIVE)
refused = {"namespaces": "unshare 272 97", "landlock": "landlock_create_ruleset 444 444"}
if task["without"]:
    walls._REFUSED = chr(10).join(refused[name] for name in task["without"])
    walls._prctl(walls._SET_NO_NEW_PRIVILEGES, 1)
    walls.restrict_calls(namespaces=True)
if user := task["user"]:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
own = Path(tempfile.mkdtemp(), "file")
own.write_text("mine")
victim = subprocess.Popen(["sleep", "1000"])
words = {"FILE": str(own), "FOLDER": str(own.parent), "VICTIM": str(victim.pid), "ME": str(os.getpid())}

def state():
    about = os.stat(own), os.stat(own.parent)
    told = [(item.st_mode, item.st_mtime_ns, item.st_uid, item.st_nlink) for item in about]
    limits = resource.prlimit(victim.pid, resource.RLIMIT_CPU)
    place = os.getpriority(os.PRIO_PROCESS, victim.pid), os.sched_getscheduler(victim.pid), os.sched_getaffinity(victim.pid)
    return [told, own.read_text(), os.listxattr(own), victim.poll(), limits, *map(str, place)]

def run(program):
    for word, value in words.items():
        program = program.replace(word, value)
    try:
        if task["tests"]:
            text = "```python\\n" + program + "\\n```"
            return [code(text, task["tests"], isolation=task["isolation"], timeout=1.0)]
        with sandbox.Sandbox(program, limits=sandbox.Limits(timeout=task['timeout']), isolation=task["isolation"]) as box:
            result = box.run("7")
        return [result.status, result.stdout, result.stderr.strip().split(chr(10))[-1]]
    except ValueError as error:
        return [repr(error)]

before, results = state(), []
try:
    for program in task["programs"]:
        results.append(run(program) + ["changed" for now in [state()] if now != before])
finally:
    victim.kill()
print(json.dumps(results))
"""


def elsewhere(
    user: int,
    isolation: str,
    programs: list[str],
    *,
    without: tuple[str, ...] = (),
    tests: object = None,
    timeout: float = 1.0,
) -> list[list[object]]:
    """What became of programs in a sandbox of another user, where system calls are refused."""
    task = {
        "user": user,
        "isolation": isolation,
        "programs": programs,
        "without": without,
        "tests": tests,
        "timeout": timeout,
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder that everybody may write to, with a secret."""
    folder = tmp_path / "outside"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.mark.parametrize("user", [0, USER])
def test_without_namespaces_full_isolation_is_refused_with_the_reason(user: int) -> None:
    ((told, *_),) = elsewhere(user, "full", ["print(1)"], without=("namespaces",))
    assert "programs cannot be isolated here: [Errno 1] unshare: Operation not permitted" in str(told)
    assert "isolation='limits'" in str(told)


@pytest.mark.parametrize("user", [0, USER])
def test_without_landlock_limits_are_refused_and_none_is_not(user: int) -> None:
    ((told, *_),) = elsewhere(user, "limits", ["print(1)"], without=("namespaces", "landlock"))
    assert "isolation='limits': the kernel has no Landlock" in str(told) and "isolation='none'" in str(told)
    assert elsewhere(user, "none", ["print(1)"], without=("namespaces", "landlock")) == [["ok", "1\n", ""]]


HOSTILE = {
    "import os, sys\nprint(int(input()) ** 2, os.listdir('.'))": "ok 49 []",
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass": "timeout",
    "import os, time\nif os.fork() == 0:\n  print('child')\n  time.sleep(1000)\nos.wait()": "timeout",
    "import os\nif os.fork() == 0:\n  while True: pass": "ok",
    "import os, socket\nsocket.socket()": "failed PermissionError",
    "open('PLACES/new', 'w')": "failed",
    "print(open('PLACES/secret').read())": "failed",
    "open('/etc/passwd')": "failed",
    "import os; open(os.__file__, 'a')": "failed",
    "import os; os.kill(os.getppid(), 9); assert not 'alive'": "failed",
    "import os; os.kill(ME, 0)": "failed",
    "x = bytearray(10 << 30)": "memory",
    "open('file', 'w').write('x' * 10); print(open('file').read())": "ok xxxxxxxxxx",
}


@pytest.mark.parametrize(
    ("user", "isolation", "without"),
    [(USER, "full", ()), (USER, "limits", ("namespaces",)), (0, "limits", ("namespaces",))],
)
def test_as_another_user_and_without_namespaces(user: int, isolation: str, without: tuple[str, ...], places: Path) -> None:
    results = elsewhere(user, isolation, [text.replace("PLACES", str(places)) for text in HOSTILE], without=without)
    for expected, (status, out, err, *changed) in zip(HOSTILE.values(), results, strict=True):
        assert " ".join(f"{status} {out} {err}".split()).startswith(expected) and not changed, (expected, status, out, err)
        assert SECRET not in f"{out}{err}"
    left = [process for process in psutil.process_iter(["uids", "cmdline"]) if process.info["uids"].real == USER]
    assert psutil.wait_procs(left, timeout=30)[1] == [], [process.info for process in left]  # a busy machine kills slowly


# What a program of the same user could do to the user's files and processes; none may return.
CALL = "import ctypes, os, resource\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CALL += "def call(name, *args):\n  if getattr(libc, name)(*args) == -1: raise OSError(ctypes.get_errno(), name)\n"
REACHING_OUT = {
    "mode": "os.chmod('FILE', 0o777)",
    "mode of a folder": "os.chmod('FOLDER', 0o777)",
    "mode of an open file": "os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o666)",
    "mode by the newest call": "call('syscall', 452, -100, b'FILE', 0o777, 0)",
    "owner": "os.chown('FILE', -1, os.getgid())",
    "times": "os.utime('FILE', (1, 1))",
    "times of an open file": "os.utime(os.open(os.__file__, os.O_RDONLY), (1, 1))",
    "an attribute": "os.setxattr('FILE', b'user.x', b'1')",
    "length": "os.truncate('FILE', 0)",
    "a link": "os.link('FILE', 'link')",
    "a lease": "import fcntl\nfcntl.fcntl(os.open(os.__file__, os.O_RDONLY), 1024, 1)",
    "flags of a file": "import fcntl\nfcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x40086602, bytes(8))",
    "handles of files": "call('name_to_handle_at', -100, b'FILE', bytes(200), bytes(8), 0)",
    "another root": "os.mkdir('x'); os.chroot('x')",
    "a folder": "os.mkdir('x')",
    "a signal": "os.kill(VICTIM, 9)",
    "a signal to a thread": "call('syscall', 234, VICTIM, VICTIM, 9)",
    "a queued signal": "call('syscall', 129, VICTIM, 9, bytes(128))",
    "a signal by a handle": "import signal\nsignal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
    "a signal by a pipe": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 8, VICTIM)",
    "a signal by a socket": "import fcntl, socket\na, b = socket.socketpair()\nfcntl.ioctl(a, 0x8901, bytes(4))",
    "limits of a process": "resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1))",
    "priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "priority of all": "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "priority of its files": "call('syscall', 251, 1, VICTIM, 3 << 13)",
    "cores": "os.sched_setaffinity(VICTIM, {0})",
    "scheduler": "os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0))",
    "scheduler by the newest call": "call('syscall', 314, VICTIM, bytes([48, 0, 0, 0, 5]) + bytes(43), 0)",
    "memory of a process": "call('process_vm_readv', VICTIM, None, 0, None, 0, 0)",
    "a trace": "call('ptrace', 16, VICTIM, 0, 0)",
    "pages of a process": "call('syscall', 256, VICTIM, 8, bytes(8), bytes(8))",
    "a namespace": "call('unshare', 0x10000000)",
    "a namespace by clone": "call('syscall', 56, 0x10000000 | 17, 0, 0, 0, 0)",
    "shared memory": "call('shmat', 0, None, 0)",
    "a semaphore": "call('semctl', 0, 0, 0)",
    "a message queue": "call('msgctl', 0, 0, 0)",
    "a named queue": "call('syscall', 240, b'/queue', 0, 0, 0)",
    "a session": "os.setsid()",
    "a group": "os.setpgid(0, 0)",
    "watched files": "call('inotify_init1', 0)",
}


@pytest.mark.parametrize("user", [0, USER])
def test_a_limited_program_reaches_no_file_and_no_process_of_its_user(user: int) -> None:
    programs = [f"{CALL}{text}\nprint('done')" for text in REACHING_OUT.values()]
    results = elsewhere(user, "limits", programs, without=("namespaces",))
    for name, (status, out, err, *changed) in zip(REACHING_OUT, results, strict=True):
        assert (status, out, changed) == ("failed", "", []), (name, status, out, err, changed)
        refused = "PermissionError", "[Errno 1]", "Invalid cross-device link"
        assert any(text in str(err) for text in refused), (name, err)


FILLING = {
    "many files": "for i in range(10**9): open(str(i), 'w').close()",
    "big files": "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'wb').write(bytes(16 << 20))",
}


@pytest.mark.parametrize("name", FILLING)
def test_the_folder_of_a_limited_program_has_a_size(name: str) -> None:
    ((status, _, err),) = elsewhere(USER, "limits", [FILLING[name]], without=("namespaces",), timeout=20.0)
    assert status == "output_limit", err


# A wrong program that goes after what judges it: each is wrong, and none is an error.
AGAINST_THE_JUDGE = [
    "import os\nfor p in range(2, 5000):\n  try: p != os.getpid() and os.kill(p, 9)\n  except OSError: pass",
    "import os\nfor p in range(2, 5000):\n  try: p != os.getpid() and os.kill(p, 19)\n  except OSError: pass",
    "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\ndef f(x): return 0",
    "import os\nfor i in range(3, 64):\n  try: os.close(i)\n  except OSError: pass\ndef f(x): return 0",
    "import os\nfor i in range(3, 64):\n  try: os.write(i, b'\\1' * 4096)\n  except OSError: pass\ndef f(x): return 0",
    "import resource, os\nfor p in range(os.getpid() - 10, os.getpid()):\n"
    "  try: resource.prlimit(p, resource.RLIMIT_CPU, (1, 1))\n  except OSError: pass\ndef f(x): return 0",
    "def f(x):\n  while True: pass",
    "def f(x):\n  a = [0]\n  while True: a += a",
    "import os\ndef f(x):\n  while True:\n    try: os.fork()\n    except OSError: pass",
    "import os\nwhile True: os.write(1, bytes(65536))",
    "import os\ni = 0\nwhile True:\n  i += 1\n  open(str(i), 'w').close()",
    "import os\nwhile True:\n  os.mkdir('d'); os.chdir('d')",
    "def f(x):\n  a = ()\n  for i in range(10**5): a = (a,)\n  return a",
]


@pytest.mark.parametrize(("user", "isolation"), [(USER, "full"), (0, "full"), (USER, "limits"), (0, "limits")])
def test_no_program_turns_a_wrong_answer_into_an_error(user: int, isolation: str) -> None:
    without = ("namespaces",) if isolation == "limits" else ()
    programs = [*AGAINST_THE_JUDGE, "def f(x): return x + 1"]
    results = elsewhere(user, isolation, programs, without=without, tests="assert f(1) == 2")
    assert results == [[0.0]] * len(AGAINST_THE_JUDGE) + [[1.0]]
