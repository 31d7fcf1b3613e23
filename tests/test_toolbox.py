"""Tools and environments: whatever a call does, it ends in time as what it was, others are untouched, nothing is left."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_hf.episodes import tools as ways
from grpo_hf.episodes.metrics import record_calls
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.episodes.toolbox import Session, Toolbox
from grpo_hf.isolation import server
from grpo_hf.metrics import Metrics
from grpo_hf.types import Completion, Group, Prompt, ToolCall, Turn

SETTINGS = ToolSettings(timeout=1.5, memory_gb=0.25, workers=4, environments=6)
LIMIT = SETTINGS.result_chars


def forever() -> None:
    while True:
        time.sleep(100)


def hoard() -> None:
    kept = []
    while True:
        kept.append(bytes(10**6))


def flood() -> str:
    for _ in range(100):
        print("x" * 10**6)
        os.write(1, b"y" * 10**6)
    return "flooded"


def fail(error: BaseException) -> None:
    raise error


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Odd(str):
    def __str__(self) -> Odd:
        return self


DEEDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "hangs": (forever, "timeout", '{"error": "it ran past its deadline of 1.5 s and was killed"}'),
    "raises": (lambda: fail(KeyError("no such\npage")), "error", '{"error": "KeyError: \'no such\\\\npage\'"}'),
    "leaves": (lambda: sys.exit(3), "error", '{"error": "SystemExit: 3"}'),
    "raises at length": (lambda: fail(ValueError("x" * 10**7)), "error", '{"error": "ValueError: ' + 488 * "x" + '..."}'),
    "exits": (lambda: os._exit(3), "crash", '{"error": "its process ended, with exit code 3"}'),
    "kills itself": (lambda: os.kill(os.getpid(), 9), "crash", '{"error": "its process was killed by SIGKILL"}'),
    "hoards": (hoard, "crash", '{"error": "MemoryError"}'),
    "unprintable": (Unprintable, "error", '{"error": "RuntimeError: no text"}'),
    "an image": (lambda: [{"type": "image", "image": 0}], "error", None),  # type: ignore[dict-item]
    "floods": (flood, "ok", "flooded"),
    "10 MB": (
        lambda: "é" * 10**7,
        "ok",
        "é" * LIMIT + "\n[cut: these are the first 100,000 of 10,000,000 characters]",
    ),
    "half a character": (lambda: "a\ud800b", "ok", "a?b"),
    "text of its own": (lambda: Odd("odd"), "ok", "odd"),
    "blocks": (lambda: [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ok", "ab"),
    "records": (lambda: [{"type": "book"}], "ok", "[{'type': 'book'}]"),
    "nothing": (lambda: None, "ok", "None"),
}


def deed(name: str) -> Any:
    """Do something.

    Args:
        name: What to do.
    """
    return DEEDS[name][0]()


def double(number: int, times: int = 1) -> int:
    """Double a number.

    Args:
        number: It.
        times: How often (choices: [1, 2])
    """
    return number * 2**times


async def triple(number: int) -> int:
    """Triple a number.

    Args:
        number: It; below zero it takes for ever.
    """
    await asyncio.sleep(1000 if number < 0 else 0)
    if number == 0:
        raise ValueError("zero")
    return number * 3


def draw(library: str) -> str:
    """Draw a random number.

    Args:
        library: What draws it.
    """
    if library == "numpy":
        import numpy

        return repr(numpy.random.random())
    return f"{random.random()} {os.urandom(0)!r} {set('abcdefgh')}"


def peek(packed: str) -> int:
    """Look into an environment as a verifier does.

    Args:
        packed: It.
    """
    return pickle.loads(bytes.fromhex(packed)).calls


SEEN: list[str] = []


@ways.in_process
def note(text: str) -> int:
    """Note a text.

    Args:
        text: It.
    """
    SEEN.append(text)
    return len(SEEN)


class Base:
    def count(self) -> int:
        """Count calls."""
        self.calls += 1  # type: ignore[attr-defined]
        return int(self.calls)


class World(Base):
    """A place where everything can happen."""

    def __init__(self) -> None:
        self.calls = 0

    def reset(self, wish: str, **columns: Any) -> Any:
        self.wish, self.drawn = wish, random.random()
        if wish.startswith("reset: "):
            return DEEDS[wish.removeprefix("reset: ")][0]()
        return None if wish == "silent" else f"You wish for {wish}."

    async def wait_for(self, deed: str) -> Any:
        """Wait, then do something.

        Args:
            deed: What to do.
        """
        self.loop = getattr(self, "loop", asyncio.get_running_loop())
        assert self.loop is asyncio.get_running_loop()
        await asyncio.sleep(0)
        return self._do(deed)

    def drawing(self) -> str:
        """What chance says."""
        return f"{self.drawn} {random.random()}"

    def _do(self, deed: str) -> Any:
        return DEEDS[deed][0]()

    def get_reward(self) -> Any:
        scores = {"nan": lambda: float("nan"), "no score": lambda: None, "raises": lambda: fail(ValueError("no reward"))}
        if self.wish == "hangs in the end":
            forever()
        return scores.get(self.wish, lambda: self.calls / 2)()

    def __getstate__(self) -> dict[str, Any]:
        if self.wish == "no pickle":
            raise TypeError("never")
        return {key: value for key, value in self.__dict__.items() if key != "loop"} | (
            {"ballast": bytes(17 * 2**20)} if self.wish == "fat" else {}
        )


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    made = Toolbox([deed, double, triple, draw, peek, note], World, SETTINGS)
    yield made
    made.close()


@pytest.fixture
def session(toolbox: Toolbox) -> Iterator[Session]:
    made = toolbox.open({"wish": "luck", "prompt": "?"}, seed=1)
    yield made
    made.close()


def ask(session: Session, name: str, seed: int = 0, **arguments: Any) -> ToolCall:
    return session.call(ToolCall(name, arguments), seed).result(60)


# ---- Whatever a call does


def test_each_call_ends_as_what_it_was_beside_two_hundred_good_ones(toolbox: Toolbox) -> None:
    session = toolbox.open({"wish": "luck"}, seed=1)
    asked = {name: session.call(ToolCall("deed", {"name": name}), 0) for name in DEEDS}
    good = [session.call(ToolCall("double" if n % 2 else "triple", {"number": n + 1}), n) for n in range(200)]
    hanging = session.call(ToolCall("triple", {"number": -1}), 0)
    found = {name: future.result(60) for name, future in asked.items()}
    assert {name: call.outcome for name, call in found.items()} == {name: outcome for name, (_, outcome, _) in DEEDS.items()}
    for name, (_, outcome, content) in DEEDS.items():
        call = found[name]
        assert call.content == content or (content is None and "type 'image'" in call.content)
        assert call.name == "deed" and call.arguments == {"name": name} and (call.message == "") == (outcome == "ok")
        assert len(call.message) <= 4000 and call.seconds < 20
    assert found["hangs"].seconds >= 1.5 and "Traceback" in found["raises"].message
    done = [future.result(60) for future in good]
    assert {call.outcome for call in done} == {"ok"}
    assert [call.content for call in done] == [str((n + 1) * (2 if n % 2 else 3)) for n in range(200)]
    assert hanging.result(60).outcome == "timeout"
    session.close()


def test_a_call_that_cannot_be_made_says_why(session: Session) -> None:
    for name, arguments, told in [
        ("dobule", {"number": 1}, "there is no tool 'dobule'; the tools are: deed, double, triple"),
        ("dobule", {"number": 1}, "(nearest: double)"),
        ("_do", {}, "there is no tool '_do'"),
        ("reset", {}, "there is no tool 'reset'"),
        ("double", {}, "double: missing a required argument: 'number'"),
        ("double", {"number": 1, "digits": 2}, "double: got an unexpected keyword argument 'digits'"),
        ("wait_for", {"what": 1}, "wait_for: missing a required argument: 'deed'"),
        ("double", [1], "double: "),
        ("triple", {"number": 0}, "ValueError: zero"),
        ("triple", {"number": "a"}, "TypeError: '<' not supported"),
    ]:
        call = session.call(ToolCall(name, arguments), 0).result(60)  # type: ignore[arg-type]
        assert (call.outcome, told in json.loads(call.content)["error"]) == ("error", True), call


# ---- Environments


def test_an_environment_keeps_its_state_for_its_episode_alone(toolbox: Toolbox) -> None:
    sessions = [toolbox.open({"wish": wish}, seed=1) for wish in ("luck", "silent") * 6]  # twice as many as may live
    assert sessions[0].observation.result(60) == ToolCall(
        "reset", {}, "ok", "You wish for luck.", sessions[0].observation.result().seconds
    )
    assert sessions[1].observation.result(60).content == ""
    finished = []
    for number, session in enumerate(sessions):
        counted = [session.call(ToolCall("count", {}), 0) for _ in range(number)]
        assert [future.result(60).content for future in counted] == [str(n + 1) for n in range(number)]
        assert ask(session, "wait_for", deed="blocks").content == "ab" == ask(session, "wait_for", deed="blocks").content
        finished.append(session.finish(wanted=number % 2 == 0))
    found = [future.result(60) for future in finished]
    assert [(one.name, one.verdict.outcome, one.verdict.score) for one in found] == [
        ("World", "scored", number / 2) for number in range(12)
    ]
    assert [bool(one.environment) for one in found] == [True, False] * 6
    session = toolbox.open({"wish": "luck"}, 1)
    assert [ask(session, "peek", packed=one.environment.hex()).content for one in found[::2]] == [
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
    ]
    session.close()
    assert {one.message for one in found} == {""}


@pytest.mark.parametrize(
    ("wish", "outcome", "score", "message"),
    [
        ("nan", "error", None, "World.get_reward' returned nan"),
        ("raises", "error", None, "ValueError: no reward"),
        ("no score", "scored", None, ""),
        ("hangs in the end", "timeout", None, "ran past its deadline of 1.5 s"),
        ("no pickle", "scored", 0.0, "TypeError: never"),
        ("fat", "scored", 0.0, "and 16,777,216 are allowed"),
    ],
)
def test_how_an_episode_ends(toolbox: Toolbox, wish: str, outcome: str, score: float | None, message: str) -> None:
    found = toolbox.open({"wish": wish}, seed=1).finish(wanted=True).result(60)
    verdict = found.verdict
    assert (verdict.outcome, None if verdict.score != verdict.score else verdict.score) == (outcome, score)
    assert message in verdict.message + found.message
    assert bool(found.environment) == (wish not in ("no pickle", "fat"))


def test_an_environment_that_breaks_ends_alone_and_says_so(toolbox: Toolbox, session: Session) -> None:
    endings = {"hangs": "timeout", "exits": "crash", "hoards": "crash"}
    broken = {name: toolbox.open({"wish": "luck"}, 1) for name in endings}
    broken |= {f"reset: {name}": toolbox.open({"wish": f"reset: {name}"}, 1) for name in ("hangs", "raises", "kills itself")}
    last = {name: one.call(ToolCall("wait_for", {"deed": name}), 0) for name, one in broken.items()}
    for name, one in broken.items():
        ended = endings.get(name) or {"hangs": "timeout", "raises": "error"}.get(name.removeprefix("reset: "), "crash")
        said = one.observation if name.startswith("reset") else last[name]
        assert said.result(60).outcome == ended
        later = ask(one, "count")
        assert later.outcome == "error" and f"ended in {ended}" in json.loads(later.content)["error"]
        found = one.finish(wanted=True).result(60)
        assert (found.verdict.outcome, found.environment) == (ended, b"")
        assert "the environment has ended" in found.verdict.message and "the environment has ended" in found.message
    assert ask(session, "wait_for", deed="raises").outcome == "error"
    assert ask(session, "count").content == "1"


def test_a_number_that_is_no_text_cannot_begin_an_episode(toolbox: Toolbox) -> None:
    session = toolbox.open({"wish": "reset: records"}, seed=1)
    assert "reset returned a list; expected text" in session.observation.result(60).content
    session.close()


# ---- Exact


def test_equal_seeds_draw_equal_numbers_in_another_process(toolbox: Toolbox) -> None:
    def drawn(box: Toolbox, seed: int) -> list[str]:
        session = box.open({"wish": "luck"}, seed)
        calls = [("draw", {"library": "random"}), ("draw", {"library": "numpy"}), ("drawing", {})]
        found = [ask(session, name, seed, **arguments) for name, arguments in calls for _ in range(2)]
        session.close()
        assert {call.outcome for call in found} == {"ok"}
        assert [call.content for call in found[::2]] == [call.content for call in found[1::2]]
        return [call.content for call in found]

    other = Toolbox([draw], World, ToolSettings(workers=1, modules=("colorsys",)))  # of another server process
    assert drawn(toolbox, 5) == drawn(other, 5)
    assert not set(drawn(toolbox, 5)) & set(drawn(toolbox, 6))
    other.close()


def test_tools_of_this_process_are_called_here_one_after_another(session: Session) -> None:
    SEEN.clear()
    calls = [session.call(ToolCall("note", {"text": str(n)}), 0) for n in range(20)]
    assert [call.result(60).content for call in calls] == [str(n + 1) for n in range(20)]
    assert [str(n) for n in range(20)] == SEEN


# ---- What the model is shown


class Adder:
    def __init__(self, number: int):
        self.number = number

    def __call__(self, number: int) -> int:
        """Add.

        Args:
            number: To what.
        """
        return self.number + number

    add = __call__


class Silent:
    def reset(self) -> None:
        pass


def local_game() -> Any:
    class Game(Silent):
        pass

    return Game()


def test_schemas_and_tools_of_every_kind() -> None:
    shallow = functools.partial(double, times=2)
    box = Toolbox([shallow, Adder(3), triple], {"world": lambda: World(), "silent": local_game}, SETTINGS)
    names = [schema["function"]["name"] for schema in box.schemas({"environment": "world"})]
    assert names == ["double", "Adder", "triple", "count", "drawing", "wait_for"] == box.names
    assert [schema["function"]["name"] for schema in box.schemas({"environment": "silent"})] == names[:3]
    parameters = box.schemas({"environment": "silent"})[0]["function"]["parameters"]
    assert parameters == {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "It."}},
        "required": ["number"],
    }
    assert box.rewards == ["World"]
    session = box.open({"environment": "silent"}, seed=0)
    assert [ask(session, name, number=1).content for name in ("double", "Adder", "triple")] == ["4", "4", "3"]
    assert session.observation.result(60).content == "" and session.finish(True).result(60).verdict is None
    assert "there is no tool 'count'" in ask(session, "count").content
    box.check([{"environment": "world", "wish": "a"}, {"environment": "silent"}])
    with pytest.raises(
        ValueError, match=r"row 1 of the dataset has environment='wrold', .*: world, silent \(nearest: world"
    ):
        box.check([{"environment": "world", "wish": "a"}, {"environment": "wrold"}])
    with pytest.raises(ValueError, match=r"Game.reset cannot be called .*\(prompt\): got an unexpected"):
        box.check([{"environment": "silent", "prompt": "?"}])
    alone = Toolbox([Adder(5).add])
    assert alone.schemas({})[0]["function"]["name"] == "__call__"
    assert alone.open({}, 0).finish(True).result(60) is None
    box.close()


def unhinted(number):  # type: ignore[no-untyped-def]
    """Nothing."""


def positional(number: int, /) -> None:
    """Take.

    Args:
        number: It.
    """


def reset() -> None:
    """Begin anew."""


class Shared:
    """With a method of its class."""

    def reset(self, **row: Any) -> None:
        """Begin."""

    @classmethod
    def twice(cls, number: int) -> int:
        """Double a number.

        Args:
            number: It.
        """
        return 2 * number


def test_methods_of_the_class_are_tools_too() -> None:
    box = Toolbox([], lambda: Shared(), SETTINGS)
    assert box.names == ["twice"] and [tool.__name__ for tool in box.functions] == ["twice"]
    session = box.open({}, seed=0)
    assert ask(session, "twice", number=2).content == "4"
    box.close()


@pytest.mark.parametrize("value", [["a"], 2, None])
def test_a_row_may_choose_by_any_value_but_not_by_a_list(value: Any) -> None:
    box = Toolbox([], {1: Shared, "b": Shared}, SETTINGS)
    with pytest.raises(ValueError, match=r"row 0 of the dataset has environment=.*its environments are: 1, b"):
        box.check([{"environment": value}])


def test_what_cannot_be_used_is_refused_at_the_start() -> None:
    lock = threading.Lock()

    def locked() -> None:
        """Lock."""
        lock.acquire()

    class Locked(World):
        taken = lock

    class Many(World):
        def __init__(self, size: int):
            pass

    class Mute(World):
        def double(self, number: int) -> int:
            """Another.

            Args:
                number: It.
            """
            return number

    for tools, environments, told in [
        ([unhinted], None, r"the tool 'unhinted' \(tests.test_toolbox:unhinted\) cannot be shown .*type hint"),
        ([positional], None, "takes 'number', but a model gives arguments by name"),
        ([double, double], None, "two tools have the name 'double'"),
        ([locked], None, r"'locked' .*cannot be sent to worker processes: .*lock.*in_process"),
        (["double"], None, "tools are functions; got 'double'"),
        (double, None, r"tools is a list of functions; got <function double .*: give \[function, ...\]"),
        ("double", None, "tools is a list of functions; got 'double'"),
        ([reset], World, "a tool has the name 'reset', as the environments' resets"),
        ([], Locked, r"factory 'Locked' .*cannot be sent to a process: .*lock"),
        ([], Many, r"called without arguments, but .*Many is missing a required argument: 'size'"),
        ([], Base, r"Base has no method `reset"),
        ([double], Mute, "two tools have the name 'double'"),
        ([], lambda: fail(OSError("no game here")), "has made no environment: .*OSError: no game here"),
        ([], "World", "is a class or a function"),
        ([], {}, "names no environment"),
    ]:
        with pytest.raises(ValueError, match=rf"(?s){told}"):
            Toolbox(tools, environments, SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tool_timeout=inf, but tool_timeout < inf is needed"):
        ToolSettings(timeout=float("inf"))
    with pytest.raises(ValueError, match=r"tool_timeout=0, but tool_timeout > 0 is needed"):
        ToolSettings(timeout=0)


# ---- What is logged


def test_metrics() -> None:
    calls = [
        ToolCall("a", {}, "ok", seconds=1.0),
        ToolCall("a", {}, "error", seconds=3.0),
        ToolCall("b", {}, "timeout", seconds=2.0),
        ToolCall("made/up", {}, "error"),
    ]
    metrics = Metrics()
    turns = [Turn(3, False, calls=[call]) for call in calls]
    first = Completion([], truncated=False, turns=turns, reset=ToolCall("reset", {}, "crash", seconds=5.0))
    group = Group(Prompt(0, "", [], {}), [first, *(Completion([], truncated=False) for _ in range(7))])
    record_calls(metrics, [group], ["a", "b"])
    found = {
        name: value for name, value in metrics.flush(lambda own: [own], steps=1).items() if "time/" not in name and value
    }
    assert found == {
        "tools/turns": 0.5,
        "tools/call_frequency": 0.5,
        "tools/failure_frequency": 0.75,
        "tools/a/outcomes/ok": 0.5,
        "tools/a/outcomes/error": 0.5,
        "tools/a/seconds/mean": 2.0,
        "tools/a/seconds/max": 3.0,
        "tools/b/outcomes/timeout": 1.0,
        "tools/b/seconds/mean": 2.0,
        "tools/b/seconds/max": 2.0,
        "tools/unknown/outcomes/error": 1.0,
        "tools/reset/outcomes/crash": 1.0,
        "tools/reset/seconds/mean": 5.0,
        "tools/reset/seconds/max": 5.0,
    }
    record_calls(metrics, [replace(group, completions=group.completions[1:])], [])
    values = metrics.flush(lambda own: [own], steps=1)
    assert values["tools/call_frequency"] == values["tools/failure_frequency"] == 0.0, "as in TRL"


# ---- Life and death


def descendants() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {process.pid for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


def gone(pids: set[int]) -> bool:
    end = time.monotonic() + 20
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_closed_toolbox_leaves_no_process_and_works_again(toolbox: Toolbox) -> None:
    slow = ToolSettings(timeout=1000, workers=1, environments=2)
    box = Toolbox([deed, double], World, slow)
    ask(before := box.open({"wish": "luck"}, 1), "double", number=1)
    before.close()
    servers = descendants()
    sessions = [box.open({"wish": "luck"}, 1) for _ in range(4)]
    futures = [one.call(ToolCall("wait_for", {"deed": "hangs"}), 0) for one in sessions]
    futures += [sessions[0].call(ToolCall("deed", {"name": "hangs"}), 0) for _ in range(2)]
    dropped = box.open({"wish": "luck"}, 1).observation  # nobody holds this session
    sessions[0].observation.result(60), sessions[1].observation.result(60)
    time.sleep(0.3)
    assert len(descendants() - servers) >= 2
    box.close()
    assert wait(futures, timeout=20).not_done == set() and dropped.cancelled()
    assert {future.cancelled() or future.result().outcome for future in futures} <= {True, "crash"}
    assert gone(descendants() - servers)
    again = box.open({"wish": "luck"}, 1)
    assert (ask(again, "double", number=1).content, ask(again, "count").content) == ("2", "1")
    box.close()


def test_where_no_process_can_be_started_those_that_run_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(os, "fork", none_left)  # as root has no limit to run into
    with ours:
        assert server._fork(ours, theirs.detach(), set()) == -errno.EAGAIN
        assert ours.recv(1) == b""  # its file is closed


SCRIPT = """
import signal
import time
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.episodes.toolbox import Toolbox
from grpo_hf.types import ToolCall

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background has inherited to ignore it

def hang():
    '''Hang.'''
    while True:
        time.sleep(1)

class World:
    def reset(self):
        pass

    def hang(self):
        '''Hang.'''
        hang()

    def get_reward(self):
        return 1.0

def stuck():
    '''Hang.'''
    hang()

box = Toolbox([stuck], World, ToolSettings(timeout=1000))
sessions = [box.open({}, 0) for _ in range(3)]
futures = [session.call(ToolCall(name, {}), 0) for session in sessions for name in ("hang", "stuck")]
for session in sessions:
    assert session.observation.result(60).outcome == "ok", session.observation.result()
time.sleep(0.3)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("mode", ["SIGINT", "SIGKILL"])
def test_no_process_outlives_the_trainer(tmp_path: Path, mode: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None and run.stdout.readline() == "ready\n", run.communicate()[1]
    pids = {process.pid for process in psutil.Process(run.pid).children(recursive=True)}
    assert len(pids) >= 7  # a server, three environments, three workers
    run.send_signal(signal.Signals[mode])
    assert run.wait(timeout=60) == -signal.Signals[mode]
    assert gone(pids)
