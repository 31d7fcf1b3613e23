"""Workers: whatever a verifier does, its call ends in time as what it was, others are scored, and nothing is left."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_hf.isolation.inside import MESSAGE_CHARACTERS
from grpo_hf.rewards import RewardSettings, get_reward, register_reward, score_samples
from grpo_hf.rewards.worker import verifier_parcel
from grpo_hf.rewards.workers import Workers
from grpo_hf.types import Sample

SLEEP = f"1000.{os.getpid()}"
"""Seconds that nobody else asks for, so that those who do can be found wherever they are."""

SETTINGS = RewardSettings(timeout=2.0, memory_gb=0.25, workers=2)


def sample(text: str, **row: Any) -> Sample:
    return Sample(prompt="Q", completion=text, text=text, completion_ids=[1], row=row)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(RewardSettings(workers=2, timeout=20.0))
    yield made
    made.pool.close()


def outcome(workers: Workers, reward: Any, text: str = "a", **columns: Any) -> Any:
    keywords = {"completion": text, **columns}
    return workers.judge(verifier_parcel(get_reward(reward)), keywords, None).result()


# ---- The torture set


def forever() -> None:
    while True:
        time.sleep(100)


def ignore_everything() -> None:
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


def fork_bomb() -> None:
    for _ in range(5):
        os.fork()
    forever()


def fork_and_return() -> float:
    os.fork()
    return 1.0


def children() -> None:
    for session in (False, True):
        subprocess.Popen(["sleep", SLEEP], start_new_session=session)


def daemon() -> float:
    """A process that has left its parent, session and group, as daemons do."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", SLEEP])
        os._exit(0)
    return 1.0


def hoard() -> None:
    kept = []
    while True:
        kept.append(bytes(10**6))


def close_stdout() -> float:
    sys.stdout.close()
    os.close(1)
    print("into the void")
    return 1.0


def flood() -> float:
    for _ in range(200):
        print("x" * 10**6)
        os.write(1, b"y" * 10**6)
    return 1.0


def leave_a_busy_thread() -> float:
    threading.Thread(target=spin, daemon=True).start()
    return 1.0


def spin() -> None:
    while True:
        pass


def leave_an_alarm() -> float:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return 1.0


def leave_a_killer() -> float:
    subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -9 {os.getpid()}"])
    return 1.0


def write_everywhere() -> float:
    """Junk to every file that is open, the worker's own among them."""
    for descriptor in range(100):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, b"junk" * 100)
        except OSError:
            pass
    return 1.0


class Spiteful:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


def throw(error: BaseException) -> None:
    raise error


def recursion() -> float:
    return recursion() + 1.0


TORTURE: dict[str, tuple[Callable[[], Any], str]] = {
    "catastrophic regex": (lambda: re.match(r"(a+)+$", "a" * 40 + "b"), "timeout"),
    "endless loop": (spin, "timeout"),
    "endless sleep": (forever, "timeout"),
    "stops itself": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "timeout"),
    "ignores signals and exceptions": (ignore_everything, "timeout"),
    "fork bomb": (fork_bomb, "timeout"),
    "children, then hangs": (lambda: (children(), forever()), "timeout"),
    "10 GB": (lambda: bytearray(10 * 2**30), "crash"),
    "hoards memory": (hoard, "crash"),
    "kills itself": (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
    "exits with 0": (lambda: os._exit(0), "crash"),
    "exits with 3": (lambda: os._exit(3), "crash"),
    "segmentation fault": (lambda: ctypes.string_at(0), "crash"),
    "closes every file": (lambda: os.closerange(0, 1000), "crash"),
    "writes to every file": (write_everywhere, "crash"),
    "too many digits": (lambda: str(10 ** (10**6)), "error"),
    "a number of 10^6 digits": (lambda: 10 ** (10**6), "error"),
    "SystemExit": (lambda: sys.exit(1), "error"),
    "KeyboardInterrupt": (lambda: throw(KeyboardInterrupt()), "error"),
    "its own TimeoutError": (lambda: throw(TimeoutError("own")), "error"),
    "a message of 10^7 characters": (lambda: throw(ValueError("x" * 10**7)), "error"),
    "recursion": (recursion, "error"),
    "returns text": (lambda: "1.0", "error"),
    "returns a lambda": (lambda: lambda: 1, "error"),
    "returns what has no repr": (Spiteful, "error"),
    "raises what cannot be sent": (lambda: throw(type("Odd", (Exception,), {"__reduce__": Spiteful.__reduce__})()), "error"),
    "closes stdout": (close_stdout, "scored"),
    "floods stdout": (flood, "scored"),
    "leaves children": (lambda: (children(), 1.0)[1], "scored"),
    "leaves a daemon": (daemon, "scored"),
    "comes back twice": (fork_and_return, "scored"),
    "leaves a busy thread": (leave_a_busy_thread, "scored"),
    "leaves an alarm": (leave_an_alarm, "scored"),
    "leaves its killer": (leave_a_killer, "scored"),
}


def test_the_torture_set_beside_a_thousand_good_samples() -> None:
    deeds = {name: deed for name, (deed, _) in TORTURE.items()}
    workers_of_other_tests = descendants()

    def verifier(completion: str) -> Any:
        return deeds[completion]() if completion in deeds else float(completion)

    good = [str(number / 7) for number in range(1000)]
    texts = [text for number, name in enumerate(TORTURE) for text in (name, *good[30 * number : 30 * number + 30])]
    texts += good[30 * len(TORTURE) :]
    verdicts = [
        found["verifier"] for found in score_samples([get_reward(verifier)], list(map(sample, texts)), settings=SETTINGS)
    ]

    ended = dict(zip(texts, verdicts, strict=True))
    assert {name: ended[name].outcome for name in TORTURE} == {name: expected for name, (_, expected) in TORTURE.items()}
    assert [ended[text].score for text in good] == [float(text) for text in good]
    assert {ended[text].outcome for text in good} == {"scored"}
    for name, (_, expected) in TORTURE.items():
        assert ended[name].score == 1.0 if expected == "scored" else math.isnan(ended[name].score)
        assert len(ended[name].message) <= MESSAGE_CHARACTERS
    assert ended["kills itself"].message == "its process was killed by SIGKILL"
    assert ended["exits with 3"].message == "its process ended, with exit code 3"
    assert "RecursionError" in ended["recursion"].message
    assert "'verifier' returned '1.0' (str) for a sample; expected a number" in ended["returns text"].message
    end = time.monotonic() + 20
    while (left := descendants() - workers_of_other_tests) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def descendants() -> set[psutil.Process]:
    """What this process's fork servers have forked, and what came of that."""
    children = [
        child for child in psutil.Process().children() if "grpo_hf.isolation import server" in " ".join(child.cmdline())
    ]
    found = {process for server in children for process in server.children(recursive=True)}
    found |= {process for process in psutil.process_iter(["cmdline"]) if SLEEP in (process.info["cmdline"] or ())}
    return {process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


# ---- What one verifier cannot do to another, and what does not count


def test_what_a_verifier_patches_is_its_own_affair() -> None:
    def patches(completion: str) -> float:
        import builtins
        import math

        builtins.float = builtins.sum = lambda *args: 7.0  # type: ignore[misc, assignment]
        math.sqrt = lambda x: 7.0  # type: ignore[assignment]
        return 1.0

    def honest(completion: str) -> float:
        import math

        return float(completion) + sum([1, 2]) + math.sqrt(4)

    rewards = [get_reward(patches), get_reward(honest)]
    settings = RewardSettings(workers=1, timeout=20.0)
    verdicts = list(score_samples(rewards, [sample(str(n)) for n in range(20)], settings=settings))
    assert [found["honest"].score for found in verdicts] == [n + 5.0 for n in range(20)]
    assert {found["patches"].outcome for found in verdicts} == {"scored"}


def test_imports_do_not_count_against_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"slow_module_{number}.py").write_text("import time; time.sleep(0.8)")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports(completion: str) -> float:
        for number in range(4):
            __import__(f"slow_module_{number}")
        while completion == "hang":
            pass
        return 1.0

    settings = RewardSettings(workers=1, timeout=2.0)
    start = time.monotonic()
    verdicts = list(score_samples([get_reward(imports)], [sample("a"), sample("hang"), sample("a")], settings=settings))
    assert [found["imports"].outcome for found in verdicts] == ["scored", "timeout", "scored"]
    assert time.monotonic() - start < 30


# ---- What can be sent


FILE = """
import threading
LOCK = threading.Lock()  # cannot be sent: a worker loads the file itself

def helper(text):
    return float(len(text))

def length(completion, *, factor=1.0):
    with LOCK:
        return factor * helper(completion)
"""


class Callable_:
    def __init__(self, value: float):
        self.value = value

    def __call__(self, completion: str) -> float:
        return self.value


def test_functions_of_every_kind_can_be_sent(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    closed_over = {"a": 0.5}
    rewards = [
        (lambda completion: 0.25, 0.25),
        (lambda completion: closed_over[completion], 0.5),
        (Callable_(0.75), 0.75),
        (f"{tmp_path / 'mine.py'}:length", 1.0),
        ({"name": f"{tmp_path / 'mine.py'}:length", "factor": 3.0}, 3.0),
        ("exact_match", 1.0),
        ({"name": "exact_match", "ignore_case": True}, 1.0),
    ]
    for reward, expected in rewards:
        columns = {"answer": "a"} if "exact_match" in str(reward) else {}
        assert outcome(workers, reward, **columns).score == expected


def test_a_verifier_that_cannot_be_sent_is_said_at_once() -> None:
    lock = threading.Lock()

    def locked(completion: str) -> float:
        with lock:
            return 1.0

    with pytest.raises(
        ValueError, match=r"'locked' cannot be sent to worker processes: .*lock.* register it with in_process"
    ):
        list(score_samples([get_reward(locked)], [sample("a")]))
    here = get_reward({"name": locked, "in_process": True})
    assert [found["locked"].score for found in score_samples([here], [sample("a")])] == [1.0]


def test_a_verifier_that_cannot_be_loaded_is_an_error_of_each_call(workers: Workers) -> None:
    class Unloadable:
        def __reduce__(self) -> Any:
            return exec, ("raise ImportError('no such package')",)

    thing = Unloadable()
    for _ in range(3):
        found = outcome(workers, lambda completion: thing)
        assert found.outcome == "error"
        assert "it cannot be loaded in a worker process" in found.message and "no such package" in found.message


def test_a_verifier_is_sent_once_to_each_worker(workers: Workers, tmp_path: Path) -> None:
    log = tmp_path / "loads"

    class Loads:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(log)!r}, 'a').write('loaded\\n')",)

    thing = Loads()
    parcel = verifier_parcel(get_reward(lambda completion: float(thing is None)))
    assert {workers.judge(parcel, {"completion": "a"}, None).result().score for _ in range(20)} == {1.0}
    assert len(log.read_text().splitlines()) <= 2


def test_workers_load_no_torch() -> None:
    script = (
        "import sys; from grpo_hf.rewards import get_reward, score_samples; from grpo_hf.types import Sample\n"
        "def heavy(completion): return float('torch' in sys.modules)\n"
        "print([v['heavy'].score for v in score_samples([get_reward(heavy)], [Sample('', 'a', 'a', [], {})])])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[0.0]\nFalse\n"


def test_registered_and_yaml_forms_of_in_process() -> None:
    @register_reward("trivial_for_workers_test", in_process=True)
    def trivial(completion: str) -> float:
        return float(os.getpid())

    for spec, here in [
        ("trivial_for_workers_test", True),
        (trivial, True),
        ({"name": "trivial_for_workers_test", "in_process": False}, False),
    ]:
        (found,) = score_samples([get_reward(spec)], [sample("a")])
        assert (next(iter(found.values())).score == os.getpid()) == here


# ---- Life and death


SCRIPT = """
import os, signal, subprocess, sys, time
from grpo_hf.rewards import RewardSettings, get_reward, score_samples
from grpo_hf.rewards.worker import verifier_parcel
from grpo_hf.rewards.workers import Workers
from grpo_hf.types import Sample

print("started", flush=True)

def hangs(completion):
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        os.fork()
    while True:
        time.sleep(1)

def right(completion):
    return 1.0

workers = Workers(RewardSettings(workers=2, timeout=1000.0))
ok = workers.judge(verifier_parcel(get_reward(right)), {"completion": "a"}, None)
assert ok.result().score == 1.0
mode = sys.argv[1]
if mode == "fork":
    child = os.fork()
    if child == 0:
        again = workers.judge(verifier_parcel(get_reward(right)), {"completion": "a"}, None)
        assert again.result().score == 1.0
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ok = workers.judge(verifier_parcel(get_reward(right)), {"completion": "a"}, None)
    assert ok.result().score == 1.0
elif mode != "idle":
    hanging = workers.judge(verifier_parcel(get_reward(hangs)), {"completion": "a"}, None)
    time.sleep(0.5)
print("ready", flush=True)
if mode == "exception":
    workers.pool.close()
    raise RuntimeError("as planned")
if mode == "garbage":
    del workers, hanging
    time.sleep(0.5)
    import psutil
    left = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    assert not left, left
if mode in ("SIGTERM", "SIGKILL", "SIGKILL group"):
    time.sleep(1000)
"""


@pytest.mark.parametrize("mode", ["idle", "fork", "exception", "SIGTERM", "SIGKILL", "SIGKILL group"])
def test_no_process_outlives_the_trainer(tmp_path: Path, mode: str) -> None:
    """A script without a guard, whose functions are those of __main__; it is run once, and nothing of it stays."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    mark = f"GRPO_HF_TEST_{uuid.uuid4().hex}"
    run = subprocess.Popen(
        [sys.executable, str(script), mode],
        env=os.environ | {mark: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    assert [run.stdout.readline(), run.stdout.readline()] == ["started\n", "ready\n"], run.communicate()[1]
    assert marked(mark) or mode in ("idle", "fork", "exception")
    if mode == "SIGKILL group":
        os.killpg(run.pid, signal.SIGKILL)
    elif mode.startswith("SIG"):
        run.send_signal(signal.Signals[mode])
    out, err = run.communicate(timeout=60)
    assert "started" not in out, "a worker has run the script again"
    expected = {"idle": 0, "fork": 0, "exception": 1, "SIGTERM": -15}.get(mode, -9)
    assert run.returncode == expected, err
    assert ("as planned" in err) == (mode == "exception")
    end = time.monotonic() + 20
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert not marked(mark)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that have the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.environ():
                found.append(process)
        except psutil.Error:
            pass
    return found
