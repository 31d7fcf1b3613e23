"""What a verifier's signature says about how to call it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BUILT_INS = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "messages",
    "environment",
    "environments",
    "trainer_state",
    "log_extra",
    "log_metric",
)
FORMS = (
    "a verifier is either `def f(completion, COLUMNS) -> float`, called once per sample,"
    " or `def f(completions, COLUMNS, **kwargs) -> list[float]`, called once per batch, whose **kwargs may hold completions"
)


@dataclass(frozen=True)
class Reward:
    """A verifier, and what its signature says about how to call it."""

    name: str
    """What metrics and saved rollouts call it."""
    function: Callable[..., Any]
    """The user's function, with its options bound."""
    per_sample: bool
    """True for a function of `completion`, False for a function of `completions`, be it among its `**kwargs`."""
    columns: tuple[str, ...]
    """Parameters without a default: columns that the dataset must have."""
    optional_columns: tuple[str, ...]
    """Parameters with a default: a column of that name fills them, an option binds them."""
    built_ins: tuple[str, ...]
    """Parameters that the caller fills: the completion, the prompt, `trainer_state` and so on."""
    bound: tuple[str, ...]
    """Keywords that options have fixed; a column of that name does not change them."""
    takes_all: bool
    """True when it has `**kwargs` and so gets every column."""
    is_async: bool
    """True when its calls are awaited."""
    in_process: bool = False
    """True when it is called in this process though it could go to a worker."""
    gold_column: str | None = None
    """The column that its parse_gold reads, once a prompt; None where it has none."""
    of_environment: bool = False
    """True where environments of this name judge themselves, with get_reward, when their episode ends."""

    @property
    def in_worker(self) -> bool:
        """Whether its calls go to worker processes, which deadlines and memory limits need."""
        return not (self.is_async or self.in_process or self.of_environment)

    @property
    def takes_state(self) -> bool:
        """Whether it is told the trainer's state: it names that, or is a batch form that takes everything, as in TRL."""
        return "trainer_state" in self.built_ins or (not self.per_sample and self.accepts("trainer_state"))

    @property
    def takes_environments(self) -> bool:
        """Whether it is shown the environments of episodes: it names them, or is a batch form that takes everything."""
        named = "environment" in self.built_ins or "environments" in self.built_ins
        return not self.of_environment and (named or (not self.per_sample and self.accepts("environments")))

    def accepts(self, name: str) -> bool:
        """Say whether the keyword `name` is to be passed to the function."""
        named = name in self.built_ins + self.columns + self.optional_columns
        return named or (self.takes_all and name not in self.bound)


def describe(name: str, function: Callable[..., Any]) -> Reward:
    """Read a verifier's signature."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    per_sample = "completion" in named
    if per_sample == ("completions" in named) and (per_sample or not takes_all):
        have = "both" if per_sample else "neither"
        raise ValueError(f"the verifier {name!r} has {have} of the parameters completion and completions; {FORMS}")
    misfit = "prompts" if per_sample else "prompt"
    if misfit in named and named[misfit].default is inspect.Parameter.empty:
        raise ValueError(f"the verifier {name!r} mixes the two forms: nothing fills its parameter {misfit!r}; {FORMS}")
    bound = tuple(function.keywords) if isinstance(function, functools.partial) else ()
    free = {key: p for key, p in named.items() if key not in bound}
    inner = _inner(function)
    gold_column = getattr(inner, "gold_column", None)
    columns = {key: p for key, p in free.items() if key not in BUILT_INS}
    return Reward(
        name=name,
        function=function,
        per_sample=per_sample,
        columns=tuple(key for key, p in columns.items() if p.default is p.empty),
        optional_columns=tuple(key for key, p in columns.items() if p.default is not p.empty),
        built_ins=tuple(key for key in free if key in BUILT_INS),
        bound=bound,
        takes_all=takes_all,
        is_async=is_async(function),
        in_process=getattr(inner, "in_process", False),
        gold_column=gold_column if per_sample and gold_column in free else None,
    )


def judge_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What judges by a parsed gold answer, in a verifier that parses one; its options stay bound."""
    if isinstance(function, functools.partial):
        return functools.partial(judge_of(function.func), *function.args, **function.keywords)
    return function.judge  # type: ignore[attr-defined]


def parser_of(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """What parses a gold answer, in a verifier that does."""
    return _inner(function).parse_gold  # type: ignore[attr-defined]


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """The function's own name, or the class name of a callable object."""
    function = _inner(function)
    return getattr(function, "__name__", type(function).__name__)


def where(function: Callable[..., Any]) -> str:
    """Where a verifier was written, as `module:qualified_name`."""
    function = _inner(function)
    place = function if hasattr(function, "__qualname__") else type(function)
    return f"{place.__module__}:{place.__qualname__}"


def is_async(function: Callable[..., Any]) -> bool:
    """Say whether a call gives something to await; a callable object is judged by its `__call__`."""
    inner = _inner(function)
    inner = getattr(inner, "judge", inner)
    return any(map(inspect.iscoroutinefunction, (inner, getattr(inner, "__call__", None))))  # noqa: B004
