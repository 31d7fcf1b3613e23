"""Functions of the user's, from `package.module:function`, `path/file.py:function` or as they are."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from grpo_hf.isolation.by_path import module_from_file


def choose(setting: str, spec: str | Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """The entry of `known` with that name, or a function: given, or as `package.module:function` or `path/file.py:function`.

    Raises:
        ValueError: an unknown name, or a function that a checkpoint cannot name: a lambda, or one inside another.
    """
    if callable(spec):
        if not isinstance(spec, FunctionType) or "<" in spec.__qualname__:
            raise ValueError(f"{setting}={spec!r}: checkpoints keep it by its name; give a function at the top of a file")
        return spec
    if spec in known:
        return known[spec]
    place, colon, name = str(spec).rpartition(":")
    if not colon:
        hint = nearest(str(spec), known)
        raise ValueError(f"{setting}={spec!r} is not one of {', '.join(known)}{hint}, nor path/file.py:function")
    return load_function(place, name, str(spec))


def load_function(place: str, attribute: str, spec: str) -> Callable[..., Any]:
    """Take the callable `attribute` out of a module or, where `place` ends in .py, of a file.

    `spec` is what the user wrote, for the errors. An exception that the module itself raises propagates.

    Raises:
        ValueError: there is no such file, module or attribute, or it cannot be called.
    """
    module = module_from_file(place, spec) if place.endswith(".py") else _module(place, spec)
    if not hasattr(module, attribute):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{spec!r}: {place} has no attribute {attribute!r}{nearest(attribute, names)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"{spec!r} is not a function but {function!r}")
    return function


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint with the nearest known name, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {found[0]})" if found else ""


def _module(name: str, spec: str) -> ModuleType:
    """Import a module by name; an import that fails inside it propagates."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{spec!r}: there is no module {error.name!r} on the Python path; for a file write path/file.py:function"
        ) from error
