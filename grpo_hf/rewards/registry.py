"""The reward registry: from what a user wrote (a name, a path, a function) to a described verifier.

Names come from `@register_reward` and from the entry-point group `grpo_hf.rewards` of any installed package.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

from grpo_hf.rewards.loading import load_function, nearest
from grpo_hf.rewards.signature import BUILT_INS, Reward, describe, name_of, parser_of, where

ENTRY_POINT_GROUP = "grpo_hf.rewards"

RewardSpec: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | Reward
Function = TypeVar("Function", bound=Callable[..., Any])

_registry: dict[str, Reward] = {}
_combinators: dict[str, Callable[..., Callable[..., Any]]] = {}


@overload
def register_reward(name: Function) -> Function: ...
@overload
def register_reward(name: str | None = None, *, in_process: bool = False) -> Callable[[Function], Function]: ...
def register_reward(name: Any = None, *, in_process: bool = False) -> Any:
    """Give a verifier a name: `@register_reward`, or `@register_reward("name")`.

    The name is the function's own when none is given. Registering the same function again (a reload) replaces it.
    ``in_process`` is for trivial functions: they are called in the training process, where nothing can end a call that
    hangs, and not in a worker.

    Raises:
        ValueError: another function, or another package's entry point, has the name; or the signature is neither of
            the two accepted forms.
    """
    if callable(name):
        return register_reward(None, in_process=in_process)(name)

    def register(function: Function) -> Function:
        if in_process:
            function.in_process = True  # type: ignore[attr-defined]
        reward = describe(name or name_of(function), function)
        _refuse_taken_name(reward)
        _registry[reward.name] = reward
        return function

    return register


def register_combinator(build: Function) -> Function:
    """Let a mapping name a function that makes a verifier: `{name: gate, option: value}` is `gate(option=value)`.

    Raises:
        ValueError: a verifier or another combinator has the name.
    """
    name = build.__name__
    if name in _registry or where(_combinators.get(name, build)) != where(build):
        raise ValueError(f"the reward name {name!r} is taken; {where(build)} needs another name")
    _combinators[name] = build
    return build


def known_rewards() -> list[str]:
    """List the names that `get_reward` finds, sorted; nothing is imported for it."""
    return sorted({*_registry, *_combinators, *(point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))})


def get_reward(spec: RewardSpec) -> Reward:
    """Find and describe one verifier.

    `spec` is a registered or entry-point name, `package.module:function`, `path/file.py:function` (a file is loaded
    once per process), a callable, a `Reward`, a sequence-classification model or its folder or hub name, or a mapping
    `{"name": <any of these>, option: value, ...}` whose options are bound as keywords; `in_process: true` among them has
    it called in this process and not in a worker.

    Raises:
        ValueError: an unknown name (with the known ones and the nearest), a missing file, module or attribute, an
            unknown option, or a signature that is neither of the two accepted forms.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, Mapping):
        return _with_options(spec)
    if isinstance(spec, str):
        return _from_text(spec)
    if "transformers" in sys.modules and isinstance(spec, sys.modules["transformers"].PreTrainedModel):
        return _reward_model(spec)
    if callable(spec):
        return describe(name_of(spec), spec)
    raise ValueError(f"a reward is a name, a mapping with a name, or a function; got {spec!r}")


def get_rewards(specs: RewardSpec | Sequence[RewardSpec]) -> list[Reward]:
    """Find several verifiers (or one); a repeated name gets a suffix: the second `exact_match` is `exact_match_2`."""
    if not isinstance(specs, Sequence) or isinstance(specs, str):
        specs = [specs]
    rewards: dict[str, Reward] = {}
    for reward in map(get_reward, specs):
        name, count = reward.name, 1
        while name in rewards:
            count += 1
            name = f"{reward.name}_{count}"
        rewards[name] = replace(reward, name=name)
    return list(rewards.values())


def check_columns(rewards: Iterable[Reward], columns: Iterable[str], dataset_name: str = "dataset") -> None:
    """Check that the dataset has every column that the verifiers ask for.

    Raises:
        ValueError: naming the verifier, the column, the columns that exist and the nearest of them.
    """
    columns = list(columns)
    for reward in rewards:
        for column in reward.columns:
            if column not in columns:
                option = f"; one value for all rows is an option: {{name: {reward.name}, {column}: ...}}"
                raise ValueError(
                    f"the verifier {reward.name!r} asks for the column {column!r}, which the {dataset_name} lacks;"
                    f" its columns are: {', '.join(columns) or 'none'}{nearest(column, columns) or option}"
                )


def _with_options(spec: Mapping[str, Any]) -> Reward:
    """Bind a mapping's options to the verifier that it names."""
    if "name" not in spec:
        raise ValueError(f"a reward given as a mapping needs the key 'name'; got the keys {list(spec)}")
    if "in_process" in spec:
        rest = {key: value for key, value in spec.items() if key != "in_process"}
        return replace(_with_options(rest), in_process=bool(spec["in_process"]))
    options = {key: value for key, value in spec.items() if key != "name"}
    if build := _combinator(spec["name"]):
        return _combined(spec["name"], build, options)
    reward = get_reward(spec["name"])
    known = reward.columns + reward.optional_columns + reward.bound
    for option, value in options.items():
        if option in BUILT_INS or (option not in known and not reward.takes_all):
            raise ValueError(
                f"the verifier {reward.name!r} has no option {option!r}; its options are:"
                f" {', '.join(known) or 'none'}{nearest(option, known)}"
            )
        if option == reward.gold_column:
            parser_of(reward.function)(value)  # a bad one is an error now, and not at the first sample
    return describe(reward.name, functools.partial(reward.function, **options)) if options else reward


def _combinator(name: Any) -> Callable[..., Callable[..., Any]] | None:
    """Find the combinator of that name; an entry point is loaded to see whether it is one."""
    if not isinstance(name, str) or name in _registry:
        return None
    if name not in _combinators and (point := _entry_point(name)):
        load_function(point.module, point.attr, name)
    return _combinators.get(name)


def _combined(name: str, build: Callable[..., Callable[..., Any]], options: dict[str, Any]) -> Reward:
    """Make the verifier that a combinator's options describe."""
    parameters = inspect.signature(build).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(
                f"the combinator {name!r} has no option {option!r}; its options are:"
                f" {', '.join(parameters)}{nearest(option, parameters)}"
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise ValueError(
            f"the combinator {name!r} needs the options {', '.join(missing)}: {{name: {name}, {missing[0]}: ...}}"
        )
    return describe(name, build(**options))


def _from_text(spec: str) -> Reward:
    """Find a verifier by registered name, entry-point name, module or file."""
    if spec in _registry:
        return _registry[spec]
    if build := _combinator(spec):
        return _combined(spec, build, {})
    if point := _entry_point(spec):
        return describe(spec, load_function(point.module, point.attr, spec))
    place, colon, attribute = spec.rpartition(":")
    if colon:
        function = load_function(place, attribute, spec)
        return describe(name_of(function), function)
    if spec.endswith(".py"):
        raise ValueError(f"reward {spec!r} names a file but no function; write {spec}:function")
    if "/" in spec or Path(spec, "config.json").is_file():
        return _reward_model(spec)
    names = known_rewards()
    raise ValueError(f"unknown reward {spec!r}; known are: {', '.join(names)}{nearest(spec, names)}")


def _reward_model(model: Any) -> Reward:
    """Describe a sequence-classification model; importing what runs it takes a while."""
    from grpo_hf.rewards.reward_model import RewardModel

    verifier = RewardModel(model)
    return describe(verifier.__name__, verifier)


def _entry_point(name: str) -> metadata.EntryPoint | None:
    """Find the entry point of that name; two packages that claim one name are an error."""
    points = {point.value: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)}
    if len(points) > 1:
        raise ValueError(f"several packages provide a reward {name!r}; write one of them in full: {', '.join(points)}")
    return next(iter(points.values()), None)


def _refuse_taken_name(reward: Reward) -> None:
    """Raise if another function holds the name, be it registered or an entry point that is not loaded yet."""
    here, old = where(reward.function), _registry.get(reward.name)
    takers = [point.value for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=reward.name)]
    takers = [taker for taker in takers if _package(taker) != _package(here)]
    takers += [where(_combinators[reward.name])] if reward.name in _combinators else []
    if old is not None and old.function is not reward.function:
        reloaded = hasattr(reward.function, "__qualname__") and where(old.function) == here
        takers += [] if reloaded else [where(old.function)]
    if takers:
        raise ValueError(f"the reward name {reward.name!r} is taken by {takers[0]}; {here} needs another name")


def _package(place: str) -> str:
    """The top-level package of `module:name`."""
    return place.partition(":")[0].partition(".")[0]
