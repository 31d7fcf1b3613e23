"""Tools: what the model is shown of a function, and the ways in which one is called."""

from __future__ import annotations

import functools
import inspect
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from transformers.utils import get_json_schema

from grpo_hf.episodes import worker
from grpo_hf.episodes.answers import Answer, answered, ended, raised, refused, text_of
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.isolation.parcel import Courier, Parcel, UnloadableError, parcel_of, walls
from grpo_hf.isolation.pool import DiedError, Lane, LateError, Pool, Worker, default_count
from grpo_hf.rewards.event_loop import EventLoop
from grpo_hf.rewards.signature import is_async, name_of, where
from grpo_hf.rewards.verdict import Verdict
from grpo_hf.types import ToolCall

Function = TypeVar("Function", bound=Callable[..., Any])
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def in_process(tool: Function) -> Function:
    """Have a tool called in the training process, one call after another: it shares its state with the script, and goes
    without a deadline, a memory limit and seeds."""
    tool.in_process = True  # type: ignore[attr-defined]
    return tool


@dataclass(frozen=True)
class Tool:
    """What the model may call."""

    name: str
    """What the model calls it by."""
    schema: dict[str, Any]
    """What the model is shown of it."""
    signature: inspect.Signature
    """What it takes."""

    def misfit(self, call: ToolCall) -> str:
        """Why it cannot be called so; nothing where it can."""
        try:
            self.signature.bind(**call.arguments)
        except TypeError as error:
            return f"{self.name}: {error}"
        return ""


def describe(function: Callable[..., Any], name: str | None = None, *, of: str = "", bound: bool = False) -> Tool:
    """Read a function's name, type hints and docstring; ``bound`` leaves out the first parameter, and ``of`` is its class.

    Raises:
        ValueError: it does not say enough of itself.
    """
    name = name or name_of(function)
    title = f"the tool {of}{name!r} ({where(function)})"
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
        schema = get_json_schema(_documented(function))
    except Exception as error:
        raise ValueError(
            f"{title} cannot be shown to the model: {' '.join(str(error).split())}. Give each parameter a type hint, and the"
            " function a docstring in Google style: what it does, then `Args:` with a line `name: meaning` for each"
        ) from error
    for parameter in parameters:
        if parameter.kind not in _BY_NAME:
            raise ValueError(f"{title} takes {parameter.name!r}, but a model gives arguments by name: use named parameters")
    free = {parameter.name: parameter for parameter in parameters if parameter.name not in fixed}
    shown = schema["function"]
    shown["name"] = name
    shown["parameters"]["properties"] = {k: v for k, v in shown["parameters"]["properties"].items() if k in free}
    if "required" in shown["parameters"]:
        shown["parameters"]["required"] = [key for key in shown["parameters"]["required"] if key in free]
    return Tool(name, schema, inspect.Signature(list(free.values())))


def _documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """What has the hints and the docstring: the function in a partial, the `__call__` of an object."""
    if isinstance(function, functools.partial):
        return _documented(function.func)
    return function if inspect.isroutine(function) else function.__call__  # type: ignore[operator]


# ---- Ways to call a function


@dataclass(frozen=True)
class FunctionTool(Tool):
    """A function on its own."""

    function: Callable[..., Any]
    """The user's."""
    way: str
    """How it is called: a name of WAYS."""
    parcel: Parcel | None
    """It as workers are sent it, where it goes there."""


def function_tool(function: Callable[..., Any]) -> FunctionTool:
    """Describe a function and pack it.

    Raises:
        ValueError: it does not say enough of itself, or cannot be sent to workers.
    """
    if not callable(function):
        raise ValueError(f"tools are functions; got {function!r} ({type(function).__name__})")
    tool = describe(function)
    way = "async" if is_async(function) else "in_process" if getattr(function, "in_process", False) else "worker"
    try:
        parcel = parcel_of(function) if way == "worker" else None
    except Exception as error:
        raise ValueError(
            f"the tool {tool.name!r} ({where(function)}) cannot be sent to worker processes: {error}. Let it make what it"
            " holds when it is called, make it async, or mark it with @grpo_hf.episodes.tools.in_process, which goes without"
            " a deadline and a memory limit"
        ) from error
    return FunctionTool(tool.name, tool.schema, tool.signature, function, way, parcel)


class Way(Protocol):
    """Calls functions, several at a time."""

    pool: Pool

    def submit(self, tool: FunctionTool, call: ToolCall, seed: int, running: set[Worker]) -> Future[ToolCall]:
        """Call a function; the worker that does it is among the ``running`` until it has."""
        ...


class InWorkers:
    """Plain functions: each call in a worker process, with a deadline and a memory limit."""

    def __init__(self, settings: ToolSettings, modules: frozenset[str]):
        self.settings, self.courier = settings, Courier()
        self.pool = Pool(settings.workers or max(8, default_count()), modules, walls(settings.memory_gb))

    def submit(self, tool: FunctionTool, call: ToolCall, seed: int, running: set[Worker]) -> Future[ToolCall]:
        """Call a function in the next worker that is free; the deadline counts from there."""
        assert tool.parcel is not None
        parcel, timeout = tool.parcel, self.settings.timeout

        def job(lane: Lane) -> ToolCall:
            def ask() -> Answer:
                asked = worker.call, parcel.slot, pickle.dumps(call.arguments), seed, self.settings.result_chars
                running.add(made := lane.worker(parcel.slot))
                try:
                    return self.courier.ask(made, [parcel], timeout, *asked)
                finally:
                    running.discard(made)

            return ended(call, in_time(ask, timeout))

        return self.pool.submit(job)


class OnEventLoop:
    """Async functions: in this process, many at a time, with a deadline."""

    def __init__(self, settings: ToolSettings, modules: frozenset[str]):
        self.settings = settings
        self.loop = EventLoop(concurrency=settings.concurrency, timeout=settings.timeout)
        self.pool = Pool(settings.concurrency)  # of threads that wait

    def submit(self, tool: FunctionTool, call: ToolCall, seed: int, running: set[Worker]) -> Future[ToolCall]:
        """Await a function when fewer than ``concurrency`` others are; the deadline counts from there."""
        settings = self.settings

        def answer(result: Callable[[], Any], start: float) -> Answer:
            outcome, content, message, _ = answered(result, lambda value: text_of(value, settings.result_chars))
            return outcome, content, message, time.perf_counter() - start

        def job(lane: Lane) -> ToolCall:
            found = self.loop.call(lambda: tool.function(**call.arguments), answer, settings.timeout, 1)()
            late = isinstance(found, Verdict)
            return ended(call, refused("timeout", found.message, seconds=found.seconds) if late else found)

        return self.pool.submit(job)


class InProcess:
    """Functions that share this process's state: in a thread, one after another, for as long as they take."""

    def __init__(self, settings: ToolSettings, modules: frozenset[str]):
        self.settings = settings
        self.pool = Pool(1)

    def submit(self, tool: FunctionTool, call: ToolCall, seed: int, running: set[Worker]) -> Future[ToolCall]:
        """Call a function when those before it have ended."""
        tell = functools.partial(text_of, limit=self.settings.result_chars)
        return self.pool.submit(
            lambda lane: ended(call, answered(lambda: worker.finished(tool.function(**call.arguments)), tell))
        )


WAYS: dict[str, Callable[[ToolSettings, frozenset[str]], Way]] = {
    "worker": InWorkers,
    "async": OnEventLoop,
    "in_process": InProcess,
}


BROKEN = (UnloadableError, LateError, DiedError)
"""What is raised where a process gives no answer."""


def fate(error: BaseException, timeout: float) -> tuple[str, str]:
    """The outcome that one of BROKEN stands for, and what happened."""
    if isinstance(error, LateError):
        return "timeout", f"it ran past its deadline of {timeout:g} s and was killed"
    return "crash" if isinstance(error, DiedError) else "error", str(error)


def in_time(ask: Callable[[], Answer], timeout: float) -> Answer:
    """What a process answers, or what became of it."""
    start = time.perf_counter()
    try:
        return ask()
    except BROKEN as error:
        outcome, why = fate(error, timeout)
        return refused(outcome, why.rpartition("\n")[2], why, time.perf_counter() - start)
    except Exception as error:  # its arguments cannot be packed
        return raised(error, time.perf_counter() - start)


def by_name(tools: Sequence[Tool]) -> dict[str, Any]:
    """Tools by their names.

    Raises:
        ValueError: two have one name.
    """
    found: dict[str, Any] = {}
    for tool in tools:
        if tool.name in found:
            raise ValueError(f"two tools have the name {tool.name!r}; the model calls tools by name, so give one another")
        found[tool.name] = tool
    return found
