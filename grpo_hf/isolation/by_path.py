"""Modules of files that no package holds: loaded by their path, here and in each process that is sent something of them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_modules: dict[Path, ModuleType] = {}


def module_from_file(file: str, spec: str) -> ModuleType:
    """Load a Python file, once per process, as a module whose name is its path; ``spec`` is what errors call it.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(file).expanduser().resolve()
    if path not in _modules:
        if not path.is_file():
            raise ValueError(f"{spec!r}: there is no file {path}")
        module_spec = importlib.util.spec_from_file_location(str(path), path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module.__name__] = module
        module_spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


def place_in_file(thing: Any) -> tuple[str, str] | None:
    """Path and qualified name of a function or class that a file loaded by its path holds; None for any other thing."""
    file, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not (isinstance(file, str) and isinstance(name, str) and Path(file) in _modules):
        return None
    return (file, name) if _attribute(_modules[Path(file)], name) is thing else None


def from_file(file: str, name: str) -> Any:
    """What has that qualified name in a file, which is loaded where it is not yet."""
    return _attribute(module_from_file(file, file), name)


def _attribute(module: ModuleType, name: str) -> Any:
    return functools.reduce(lambda thing, part: getattr(thing, part, None), name.split("."), module)  # type: ignore
