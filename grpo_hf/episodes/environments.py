"""Environments: each lives in a process of its own for one episode, so that one that hangs or dies takes no other along."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import pickle
import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from grpo_hf.episodes import worker
from grpo_hf.episodes.answers import Answer, ended, refused
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.episodes.tools import BROKEN, Tool, by_name, describe, fate, in_time
from grpo_hf.isolation.inside import PRINTED_CHARACTERS
from grpo_hf.isolation.parcel import Courier, Parcel, parcel_of, walls
from grpo_hf.isolation.pool import Lane, Pool, Worker, give_up
from grpo_hf.rewards.signature import name_of, where
from grpo_hf.rewards.verdict import Verdict
from grpo_hf.types import ToolCall

PRINTING = 10
"""Environments whose printing is shown, PRINTED_CHARACTERS of each; each episode has a new one."""
_NO_TOOLS = ("reset", "get_reward")
_KEY = "environment"


@dataclass(frozen=True)
class Kind:
    """The environments that one factory makes."""

    name: str
    """Of their class."""
    made: type
    """Their class."""
    factory: Callable[[], Any]
    """The user's."""
    parcel: Parcel
    """It as processes are sent it."""
    tools: dict[str, Tool]
    """Their public methods, by name, but for reset and get_reward."""
    reset: inspect.Signature
    """What reset takes."""
    has_reward: bool
    """Whether they have get_reward."""


@dataclass(frozen=True)
class Finished:
    """What an environment leaves when its episode has ended."""

    name: str
    """Of its class."""
    verdict: Verdict | None
    """How get_reward ended, with its number; None where there is none."""
    environment: bytes
    """It, pickled; empty where that was not asked for or is not possible."""
    message: str
    """Why it was not possible."""


class Environments:
    """Kinds of environments, and the processes of those that live."""

    def __init__(self, factories: dict[Any, Callable[[], Any]], settings: ToolSettings, modules: frozenset[str]):
        parcels = {name: _packed(factory) for name, factory in factories.items()}
        modules = modules.union(*(parcel.modules for parcel in parcels.values()))
        made = itertools.count()
        raise_walls = walls(settings.memory_gb, lambda: PRINTED_CHARACTERS if next(made) < PRINTING else 0)
        self.settings, self.courier = settings, Courier()
        self.pool = Pool(settings.environments, modules, raise_walls)
        self.kinds: dict[Any, Kind] = {}
        for name, factory in factories.items():
            made_class = factory if isinstance(factory, type) else self._class(factory, parcels[name], modules)
            self.kinds[name] = _kind(made_class, factories[name], parcels[name])

    def _class(self, factory: Callable[[], Any], parcel: Parcel, modules: frozenset[str]) -> type:
        """The class of what a factory makes: one is made in a process of its own; here too where no module has its class."""
        probe = Worker(modules)
        try:
            walls(self.settings.memory_gb)(probe)
            asked = worker.class_of, parcel.slot
            module, name, problem = self.courier.ask(probe, [parcel], self.settings.timeout, *asked)
        except BROKEN as error:
            problem = fate(error, self.settings.timeout)[1]
        finally:
            probe.end()
        if problem:
            raise ValueError(f"the environment factory {where(factory)} has made no environment: {problem}")
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, type) else type(factory())


def _packed(factory: Callable[[], Any]) -> Parcel:
    if not callable(factory):
        raise ValueError(
            f"environment_factory is a class or a function that makes an environment, or a dict of these; got {factory!r}"
        )
    if needs := _needs(factory):
        raise ValueError(
            f"environment_factory is called without arguments, but {where(factory)} is {needs}; give defaults or a"
            " functools.partial"
        )
    try:
        return parcel_of(factory)
    except Exception as error:
        raise ValueError(
            f"the environment factory {name_of(factory)!r} ({where(factory)}) cannot be sent to a process: {error}. Let it"
            " make what it holds when it is called: each environment has a process of its own"
        ) from error


def _needs(factory: Callable[[], Any]) -> str:
    """Which argument a factory lacks; nothing where it needs none, or does not say."""
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        return str(error)
    except ValueError:  # a class may have no signature
        pass
    return ""


def _kind(cls: type, factory: Callable[[], Any], parcel: Parcel) -> Kind:
    functions = dict(inspect.getmembers(cls, lambda item: inspect.isfunction(item) or inspect.ismethod(item)))
    if "reset" not in functions:
        raise ValueError(f"the environment {where(cls)} has no method `reset(self, **row)`, which begins an episode")
    bound = {name: not isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod) for name in functions}
    tools = [
        describe(function, name, of=f"{cls.__name__}.", bound=bound[name])
        for name, function in functions.items()
        if name not in _NO_TOOLS and not name.startswith("_")
    ]
    reset = inspect.signature(functions["reset"])
    reset = reset.replace(parameters=list(reset.parameters.values())[bound["reset"] :])
    return Kind(cls.__name__, cls, factory, parcel, by_name(tools), reset, "get_reward" in functions)


class Environment:
    """One environment: what it is asked is done in order, by a thread that lives as long as it does."""

    def __init__(self, kind: Kind, host: Environments, row: dict[str, Any], seed: int):
        self.kind, self.settings, self.courier = kind, host.settings, host.courier
        self.worker: Worker | None = None
        self.lost: Answer | None = None  # to all that it is asked once it has ended before its time
        self.over = self.closed = False
        self.jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.observation: Future[ToolCall] = self._later(lambda: self._reset(row, seed))
        self.life = host.pool.submit(self._live)

    def call(self, call: ToolCall, seed: int) -> Future[ToolCall]:
        """Call a method."""

        def job() -> ToolCall:
            if self.lost:
                _, content, message, _ = self.lost
                return ended(call, ("error", content, message, 0.0))
            return ended(call, self._answer(call.name, worker.call_method, call.name, call.arguments, seed))

        return self._later(job)

    def finish(self, wanted: bool) -> Future[Finished]:
        """Pack it if it is ``wanted``, then ask for its reward; its process ends, and another's may begin."""
        future = self._later(lambda: self._finish(wanted))
        self.over = True
        self.jobs.put(None)
        return future

    def close(self) -> None:
        """End its process at once, whatever it does; what it has not been asked yet is cancelled."""
        self.over = self.closed = True
        self.jobs.put(None)
        if self.life.cancel():
            self._give_up()
        elif self.worker is not None:
            self.worker.end()

    def _later(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.over:
            give_up(future)
        else:
            self.jobs.put((job, future))
        return future

    def _live(self, lane: Lane) -> None:
        """Do what it is asked until it is finished or closed."""
        self.lane = lane
        try:
            while (item := self.jobs.get()) is not None:
                job, future = item
                if self.closed:
                    give_up(future)
                elif future.set_running_or_notify_cancel():
                    try:
                        future.set_result(job())
                    except BaseException as error:
                        future.set_exception(error)
        finally:
            self._give_up()
            if self.worker is not None:
                self.worker.end()
                self.worker.connection.close()  # hundreds of files would be open else

    def _give_up(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self.jobs.get_nowait()) is not None:
                    give_up(item[1])

    def _reset(self, row: dict[str, Any], seed: int) -> ToolCall:
        answer = self._answer("reset", worker.open_environment, self.kind.parcel.slot, row, seed)
        if answer[0] == "error":
            self._lose("reset", answer)
        return ended(ToolCall("reset", {}), answer)

    def _answer(self, name: str, function: Callable[..., Any], what: str, arguments: dict[str, Any], seed: int) -> Answer:
        """What one of its methods answers; the environment has ended where that runs over or dies."""

        def ask() -> Answer:
            answer: Answer = self._ask(function, what, pickle.dumps(arguments), seed, self.settings.result_chars)
            return answer

        answer = in_time(ask, self.settings.timeout)
        if answer[0] in ("timeout", "crash"):
            self._lose(name, answer)
        return answer

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.worker is None:
            self.worker = self.lane.worker(_KEY)  # a new one: that of the lane's last environment has ended
            if self.closed:
                self.worker.end()
        return self.courier.ask(self.worker, [self.kind.parcel], self.settings.timeout, function, *arguments)

    def _lose(self, name: str, answer: Answer) -> None:
        outcome, _, message, _ = answer
        why = f"the environment has ended: {name} ended in {outcome}"
        self.lost = refused(outcome, why, f"{why}: {message}")
        if self.worker is not None:
            self.worker.end()

    def _finish(self, wanted: bool) -> Finished:
        blob, problem = self._packed() if wanted else (b"", "")
        return Finished(self.kind.name, self._reward() if self.kind.has_reward else None, blob, problem)

    def _packed(self) -> tuple[bytes, str]:
        if self.lost is not None:
            return b"", self.lost[2]
        try:
            blob, problem = self._ask(worker.packed_environment)
            return blob, problem
        except BROKEN as error:
            outcome, why = fate(error, self.settings.timeout)
            self._lose("packing it", (outcome, "", why, 0.0))
            return b"", why

    def _reward(self) -> Verdict:
        if self.lost is not None:
            return Verdict(self.lost[0], message=self.lost[2])
        start = time.perf_counter()
        try:
            return Verdict(*self._ask(worker.reward, f"{self.kind.name}.get_reward"))
        except BROKEN as error:
            outcome, why = fate(error, self.settings.timeout)
            return Verdict(outcome, seconds=time.perf_counter() - start, message=why)
