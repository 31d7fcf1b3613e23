"""Tools and environments as an episode sees them: whatever a call does, it ends in time, as one outcome, and alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from grpo_hf.episodes.answers import ended, refused
from grpo_hf.episodes.environments import Environment, Environments, Kind
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.episodes.tools import WAYS, FunctionTool, Tool, Way, by_name, function_tool
from grpo_hf.isolation.pool import Worker
from grpo_hf.rewards.loading import nearest
from grpo_hf.types import ToolCall

COLUMN = "environment"
"""The dataset's column that names a row's environment, where there are several."""
Factory = Callable[[], Any]


class Toolbox:
    """What the model may call: functions in workers, and environments in processes of their own.

    A function runs in a copy of itself: what it changes is seen nowhere else. State belongs in an environment, which is made
    anew for each episode, or in a function marked with ``tools.in_process``. Each call in a process first seeds the global
    generators of `random`, numpy and torch.
    """

    def __init__(
        self,
        tools: Iterable[Callable[..., Any]] | None = None,
        environments: Factory | Mapping[str, Factory] | None = None,
        settings: ToolSettings | None = None,
    ):
        """``environments`` is one factory for all rows, or one by name for rows that choose with their column `environment`.

        Raises:
            ValueError: a tool or an environment cannot be shown to the model, or cannot be sent to a process.
        """
        settings = settings or ToolSettings()
        if callable(tools) or isinstance(tools, str | Mapping):
            raise ValueError(f"tools is a list of functions; got {tools!r}: give [function, ...]")
        self.tools: dict[str, FunctionTool] = by_name([function_tool(tool) for tool in tools or []])
        self.chosen = isinstance(environments, Mapping)
        modules = frozenset({"grpo_hf.episodes.worker", *settings.modules})
        modules = modules.union(*(tool.parcel.modules for tool in self.tools.values() if tool.parcel))
        self.ways: dict[str, Way] = {name: WAYS[name](settings, modules) for name in {t.way for t in self.tools.values()}}
        self.environments: Environments | None = None
        if environments is not None:
            factories = dict(environments) if isinstance(environments, Mapping) else {None: environments}
            if not factories:
                raise ValueError("environment_factory={} names no environment; give {name: factory}, or leave it out")
            if "reset" in self.tools:
                raise ValueError("a tool has the name 'reset', as the environments' resets are logged; give it another")
            self.environments = Environments(factories, settings, modules)
            for kind in self.kinds.values():
                by_name([*self.tools.values(), *kind.tools.values()])
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @property
    def kinds(self) -> dict[Any, Kind]:
        """The kinds of environments, by the name that rows choose them by; None: all rows have this one."""
        return self.environments.kinds if self.environments else {}

    @property
    def names(self) -> list[str]:
        """Of all tools, each once."""
        return list(dict.fromkeys([*self.tools, *(name for kind in self.kinds.values() for name in kind.tools)]))

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """Of all tools: functions as they were given, and methods of environments that all rows have."""
        shared = self.kinds.get(None)
        methods = [getattr(shared.made, name) for name in shared.tools] if shared else []
        return [*(tool.function for tool in self.tools.values()), *methods]

    @property
    def rewards(self) -> list[str]:
        """The classes of environments that have a reward of their own, each once."""
        return list(dict.fromkeys(kind.name for kind in self.kinds.values() if kind.has_reward))

    @property
    def all_schemas(self) -> list[list[dict[str, Any]]]:
        """What episodes of each kind may call, as JSON schemas."""
        own = [list(kind.tools.values()) for kind in self.kinds.values()] or [[]]
        return [[tool.schema for tool in [*self.tools.values(), *more]] for more in own]

    def check(self, rows: Iterable[dict[str, Any]], dataset_name: str = "dataset") -> None:
        """See that each row has its environment, and that reset takes its columns.

        Raises:
            ValueError: naming the row, what it lacks and what there is.
        """
        seen: set[Any] = set()
        for number, row in enumerate(rows if self.kinds else ()):
            name = row.get(COLUMN) if self.chosen else None
            if not isinstance(name, Hashable) or name not in self.kinds:
                raise ValueError(
                    f"row {number} of the {dataset_name} has {COLUMN}={name!r}, which environment_factory does not know; its"
                    f" environments are: {', '.join(map(str, self.kinds))}{nearest(str(name), map(str, self.kinds))}"
                )
            if name not in seen:
                self._check_reset(self.kinds[name], self._columns(row))
                seen.add(name)
            if not self.chosen:
                return

    def _check_reset(self, kind: Kind, columns: dict[str, Any]) -> None:
        try:
            kind.reset.bind(**columns)
        except TypeError as error:
            raise ValueError(
                f"{kind.name}.reset cannot be called with a row's columns ({', '.join(columns)}): {error}; let its"
                " parameters end in **columns, which takes what it does not need"
            ) from error

    def schemas(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """JSON schemas of what a row's episode may call."""
        return [tool.schema for tool in self.usable(row).values()]

    def usable(self, row: dict[str, Any]) -> dict[str, Tool]:
        """What a row's episode may call, by name."""
        kind = self._kind(row)
        return {**self.tools, **(kind.tools if kind else {})}

    def open(self, row: dict[str, Any], seed: int) -> Session:
        """Begin an episode; an environment is made and reset as soon as there is room for its process."""
        kind = self._kind(row)
        environment = Environment(kind, self.environments, self._columns(row), seed) if kind and self.environments else None
        session = Session(self, self.usable(row), environment)
        self.sessions.add(session)
        return session

    def close(self) -> None:
        """End all that runs; what nobody has begun is cancelled. The next call starts new processes."""
        for session in list(self.sessions):
            session.close()
        for way in self.ways.values():
            way.pool.close()
        if self.environments:
            self.environments.pool.close()

    def _kind(self, row: dict[str, Any]) -> Kind | None:
        return self.kinds[row[COLUMN] if self.chosen else None] if self.kinds else None

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """What reset is told of a row: the column that chooses the environment is for us."""
        return {key: value for key, value in row.items() if not (self.chosen and key == COLUMN)}


class Session:
    """One episode's tools. ``finish`` it as soon as the episode has ended: other episodes may wait for its process."""

    def __init__(self, toolbox: Toolbox, usable: dict[str, Tool], environment: Environment | None):
        self.toolbox, self.usable, self.environment = toolbox, usable, environment
        self.observation = environment.observation if environment else _done(ToolCall("reset", {}, outcome="ok"))
        self.waiting: set[Future[ToolCall]] = set()
        self.running: set[Worker] = set()
        self.dropped = weakref.finalize(self, environment.close) if environment else None
        if self.dropped:
            self.dropped.atexit = False  # all processes end then

    def call(self, call: ToolCall, seed: int) -> Future[ToolCall]:
        """Have a call done; it comes back with its outcome, content, seconds and message, whatever happens to it.

        The calls of functions run side by side, those of an environment one after another.
        """
        tool = self.usable.get(call.name)
        problem = tool.misfit(call) if tool else self._unknown(call.name)
        if problem:
            return _done(ended(call, refused("error", problem)))
        if not isinstance(tool, FunctionTool):
            assert self.environment is not None
            return self.environment.call(call, seed)
        future = self.toolbox.ways[tool.way].submit(tool, call, seed, self.running)
        self.waiting.add(future)
        future.add_done_callback(self.waiting.discard)
        return future

    def _unknown(self, name: str) -> str:
        known = ", ".join(self.usable)
        return f"there is no tool {name[:80]!r}; the tools are: {known}{nearest(name[:80], self.usable)}"

    def finish(self, wanted: bool) -> Future[Any]:
        """A Finished: the environment's own reward, and it, pickled, if that is ``wanted``; None without environment."""
        if self.environment is None:
            return _done(None)
        if self.dropped:
            self.dropped.detach()  # what is asked of it is done, whoever still holds the session
        return self.environment.finish(wanted)

    @property
    def lost(self) -> bool:
        """Whether the environment has hung or died, and its episode with it."""
        return self.environment is not None and self.environment.lost is not None

    def close(self) -> None:
        """End what still runs, and cancel what has not begun; only calls in this process run on."""
        for future in list(self.waiting):
            future.cancel()
        for worker in list(self.running):
            worker.end()
        if self.environment:
            self.environment.close()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
