"""Programs that hang, flood, fork, kill, spy and stay: each ends in time as what it is, and nothing of it is left."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from grpo_hf.isolation import job, sandbox
from grpo_hf.isolation.job import make_job
from grpo_hf.isolation.sandbox import Limits, Result, Sandbox, examine
from grpo_hf.reward_fns.code import code

ROOT = Path(__file__).parents[1]
TIMEOUT = 1.0
SECRET = f"secret-{secrets.token_hex(8)}"
GOOD = "```python\nimport collections\ndef f(x):\n    return dict(collections.Counter(x))\n```"
GOOD_TESTS = ["assert f('aab') == {'a': 2, 'b': 1}", "assert f('') == {}"]

# The statuses that each may end with, and the program. Words in capitals stand for what only the test knows.
HOSTILE = {
    "a number of 4.6 million digits": ("failed timeout", "print(9**9**7)"),
    "and its text": ("timeout", "import sys; sys.set_int_max_str_digits(0); print(9**9**7)"),
    "10,000 digits, again and again": ("timeout", "x = 3 ** 20960\nwhile True: x * x"),
    "catastrophic regex": ("timeout", "import re; re.match(r'(a+)+$', 'a' * 50 + 'b')"),
    "endless loop": ("timeout", "while True: pass"),
    "endless loop that catches all": ("timeout", "while True:\n  try:\n    while True: pass\n  except BaseException: pass"),
    "sleeps for ever": ("timeout", "import time; time.sleep(1e6)"),
    "ignores signals": (
        "timeout",
        "import signal\nfor s in (2, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ),
    "waits for its own stop": ("timeout", "import os; os.kill(os.getpid(), 19)"),
    "reads for ever": ("timeout", "import sys\nwhile True: sys.stdin.readline()"),
    "fork bomb": ("failed timeout", "import os\nwhile True: os.fork()"),
    "stubborn fork bomb": ("timeout", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"),
    "thread bomb": (
        "failed timeout",
        "import threading as t\nwhile True: t.Thread(target=t.Event().wait).start()",
    ),
    "10 GB": ("memory", "x = bytearray(10 << 30)"),
    "10 GB in a list": ("memory", "x = [0]\nwhile True: x += x"),
    "10 GB of text": ("memory", "x = 'x' * 10**6\nwhile True: x += x"),
    "10 GB of anonymous files": ("failed", "import os\nfor i in range(50): os.memfd_create('x')"),
    "kills itself": ("killed", "import os; os.kill(os.getpid(), 9)"),
    "kills its group": ("killed", "import os; os.killpg(0, 9)"),
    "kills process 1 and its parent": ("failed", "import os\nfor p in (1, os.getppid()): os.kill(p, 9)\nassert not 'alive'"),
    "kills everything": ("failed", "import os; os.kill(-1, 9); assert not 'alive'"),
    "segmentation fault": ("killed", "import ctypes; ctypes.string_at(0)"),
    "deep recursion": ("failed", "def f(): f()\nf()"),
    "deeper recursion": (
        "failed killed memory timeout",
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(self): return repr(self)\nrepr(A())",
    ),
    "deep source": ("failed memory killed", "x = " + "[" * 5000 + "]" * 5000),
    "null in the source": ("failed", "x = 1\x00"),
    "surrogate in the source": ("failed", "x = '\ud800'"),
    "closes stdout": ("failed", "import os; os.close(1); print('x')"),
    "closes its stdout object": ("ok", "import sys; sys.stdout.close()"),
    "floods stdout": ("output_limit", "while True: print('x' * 1000)"),
    "floods the descriptor": ("output_limit", "import os\nwhile True: os.write(1, b'x' * 65536)"),
    "floods stderr": ("failed", "import os\nwhile True: os.write(2, b'x' * 65536)"),
    "a huge file": ("failed", "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))"),
    "a file with a hole": ("failed", "open('x', 'wb').truncate(1 << 40)"),
    "many big files": ("failed", "for i in range(1000): open(str(i), 'wb').write(bytes(8 << 20))"),
    "100,000 files": ("failed", "for i in range(100_000): open(str(i), 'w').close()"),
    "100,000 open files": ("failed", "x = [open('/dev/null') for i in range(100_000)]"),
    "deep folders": ("failed", "import os\nwhile True: os.mkdir('d'); os.chdir('d')"),
    "writes to a folder of the machine": ("failed", "open('PLACES/new', 'w')"),
    "writes to /tmp": ("ok", "open('/tmp/NAME', 'w').write('x')"),
    "writes to home": ("failed", "import os; os.chmod('/', 0o777)"),
    "writes to the standard library": ("failed", "import os; open(os.__file__, 'a')"),
    "deletes the standard library": ("failed", "import os; os.unlink(os.__file__)"),
    "reads a file of the machine": ("failed", "print(open('PLACES/secret').read())"),
    "reads the users": ("failed", "print(open('/etc/passwd').read())"),
    "looks around": (
        "ok",
        "import os\nfor f in '/', '/etc', '/dev', '.': print(os.listdir(f))\nassert not os.path.exists('/proc/self')",
    ),
    "reads the environment": ("ok", "import os, ctypes\nprint(os.environ, ctypes.CDLL(None).getenv(b'SECRET'))"),
    "reads others' environment": (
        "failed",
        "import os\nfor p in ('self', 1, os.getppid(), 'PID'): print(open(f'/proc/{p}/environ').read())",
    ),
    "looks at the caller's frames": (
        "ok",
        "import sys\nframe = sys._getframe()\nwhile frame: print(frame.f_locals, frame.f_globals); frame = frame.f_back",
    ),
    "connects by TCP": ("failed", "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1).send(b'x')"),
    "listens": ("failed", "import socket; socket.create_server(('127.0.0.1', 0))"),
    "connects to a socket file": ("failed", "import socket; socket.socket(socket.AF_UNIX).connect('PLACES/socket')"),
    "asks for a name": ("failed", "import socket; socket.getaddrinfo('example.com', 80)"),
    "talks to the host of a virtual machine": ("failed", "import socket; socket.socket(40, socket.SOCK_STREAM)"),
    "runs a shell": ("failed", "import subprocess; subprocess.run(['/bin/sh', '-c', 'echo x'], check=True)"),
    "runs the loader": ("failed", "import os; os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '--version'])"),
    "becomes root": ("failed", "import os; os.setuid(0)"),
    "makes a user namespace": (
        "failed",
        "import ctypes; assert ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0, ctypes.get_errno()",
    ),
    "leaves its root": ("failed", "import os; os.mkdir('x'); os.chroot('x')"),
    "raises its limits": ("failed", "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"),
    "traces process 1": ("failed", "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0"),
    "leaves a daemon": (
        "ok",
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(1000)\n  os._exit(0)",
    ),
    "leaves a busy child": ("ok", "import os\nif os.fork() == 0:\n  while True: pass"),
    "leaves a thread": ("timeout", "import threading\nthreading.Thread(target=threading.Event().wait).start()"),
    "hangs at its end": ("timeout", "import atexit, time; atexit.register(time.sleep, 1000)"),
}

users: list[int | None] = []


def own_user(choose=job._own_user) -> int | None:
    """Choose a user number as ever, and remember it."""
    users.append(choose())
    return users[-1]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Things that no program should reach: a secret in a file and in the environment, and listening sockets."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    (folder / "secret").write_text(SECRET)
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    unix.listen()
    with pytest.MonkeyPatch.context() as patch, tcp, unix:
        patch.setenv("SECRET", SECRET)
        patch.setattr(job, "_own_user", own_user)
        yield {
            "PLACES": str(folder),
            "NAME": f"sandbox-{secrets.token_hex(8)}",
            "PORT": str(tcp.getsockname()[1]),
            "PID": str(os.getpid()),
        }


def run(program: str, words: dict[str, str], timeout: float) -> Result:
    for word, value in words.items():
        program = program.replace(word, value)
    with Sandbox(program, limits=Limits(timeout=timeout)) as box:
        return box.run()


@pytest.fixture(scope="module")
def others() -> set[int]:
    """Processes that other files' tests of this process have started, a server of vLLM say."""
    return {kin.pid for kin in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def results(others: set[int], machine: dict[str, str]) -> dict[str, object]:
    """All hostile programs in a pool of two, and among them 200 good ones."""
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, object] = {}
        share = -(-200 // len(HOSTILE))
        good = []
        for name, (statuses, program) in HOSTILE.items():
            futures[name] = pool.submit(run, program, machine, TIMEOUT if "timeout" in statuses else 20 * TIMEOUT)
            good += [pool.submit(code, GOOD, GOOD_TESTS) for _ in range(share)]
        return {name: future.result() for name, future in futures.items()} | {"good": [future.result() for future in good]}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name, results):
    result = results[name]
    assert result.status in HOSTILE[name][0].split(), result
    assert SECRET not in result.stdout + result.stderr
    assert result.status != "timeout" or result.seconds < TIMEOUT + 5


def test_good_programs_beside_them_all_score(results):
    assert len(results["good"]) >= 200 and set(results["good"]) == {1.0}


def test_nothing_is_left_outside(others, results, machine):
    assert sorted(os.listdir(machine["PLACES"])) == ["secret", "socket"]
    assert not Path("/tmp", machine["NAME"]).exists()
    assert len(users) >= len(HOSTILE) + 200
    assert [process for process in psutil.process_iter(["uids"]) if process.info["uids"].real in users] == []
    kin = [kin for kin in psutil.Process().children(recursive=True) if kin.pid not in others]
    # Reward workers that other tests have started are not of these programs.
    assert [one for one in kin if "isolation import server" not in str(one.cmdline())] == []


def test_a_killed_worker_takes_its_program_along():
    program = "import os, time\nif os.fork() == 0: os.setsid(); os.fork()\nprint('started', flush=True)\nwhile True: pass"
    script = (
        f"from grpo_hf.isolation.sandbox import *\nwith Sandbox({program!r}, limits=Limits(timeout=300)) as box: box.run()"
    )
    worker = psutil.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while len(family := worker.children(recursive=True)) < 5:  # outer, inner, program, child, grandchild
        assert time.monotonic() < deadline, family
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []


@pytest.mark.parametrize("place", [0, 1], ids=["judge", "program"])
def test_a_cell_that_the_kernel_kills_is_no_error(place):
    """As when memory runs out: the process that reads and writes the cases goes first."""

    def kill():
        end = time.monotonic() + 30
        while time.monotonic() < end:
            boots = [child for child in psutil.Process().children() if "sys.modules" in " ".join(child.cmdline())]
            cells = [cell for boot in boots for cell in boot.children()]
            running = [cell for cell in cells if len(cell.children(recursive=True)) == 2]  # process 1, and what it runs
            if len(running) == 2:
                sorted(running, key=lambda cell: cell.pid)[place].children()[0].kill()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    tests = [([compile("assert f() == 1", "<tests>", "exec")], ["f"])]
    result = examine("def f():\n  while True: pass", tests, limits=Limits(timeout=5.0))
    thread.join()
    assert result.status in ("memory", "timeout") and result.passed == (False,)


def test_inside_a_limited_worker():
    script = (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 29, 1 << 29)); r.setrlimit(r.RLIMIT_NOFILE, (32, 32))\n"
        "from grpo_hf.isolation.sandbox import *\n"
        "with Sandbox('print(input())', limits=Limits(memory_mb=4096)) as box: print(box.run('hello').stdout)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["hello"], done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="the user does not own Python's library")
def test_the_owner_of_the_library_cannot_write_to_it(monkeypatch):
    monkeypatch.setattr(job, "_own_user", lambda: None)
    with Sandbox("import os; print(os.getuid()); open(os.__file__, 'a')") as box:
        result = box.run()
    assert (result.stdout, result.stderr.split()[-4:-1]) == ("0\n", ["Read-only", "file", "system:"])


def test_a_sandbox_that_fails_is_no_failed_program(monkeypatch):
    monkeypatch.setattr(
        sandbox, "make_job", lambda *args, **more: make_job(*args, **more) | {"limits": {"NO_SUCH_LIMIT": 1}}
    )
    with Sandbox("pass") as box, pytest.raises(RuntimeError, match=r"could not start the program.*NO_SUCH_LIMIT"):
        box.run()
    monkeypatch.setattr(sandbox, "_parts", lambda: b"not code")
    with pytest.raises(RuntimeError, match=r"(?s)gave no answer.*ValueError: bad marshal data"), Sandbox("pass"):
        pass
