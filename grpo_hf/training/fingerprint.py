"""Short digests of what makes a run's numbers and no setting names: code, weights, columns of the data.

Two digests are equal where the code is, comments and docstrings apart, on any machine and in any process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_hf.rewards import Reward

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes: their sum is exact, in whatever order and on whatever device it is taken."""


def digest(value: Any) -> str:
    """Of what JSON can hold; other things by their text."""
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=16).hexdigest()


def digest_of_code(function: Any) -> str:
    """Of a function or callable object as it is now: its code, options, enclosed values, and what of its own package it
    names, all the way down."""
    return digest(_described(function, set()))


def digest_of_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of parameters: their names and shapes, and sums over their bits."""
    return digest([[name, list(values.shape), _sums(values)] for name, values in named])


def digest_of_columns(table: Any, rows: Iterable[int], columns: Iterable[str]) -> str | None:
    """Of these rows of a dataset, as far as these columns go; None without any."""
    known = [name for name in columns if name in table.column_names]
    if not known:
        return None
    state = hashlib.blake2b(digest_size=16)
    for some in table.select_columns(known).select(list(rows)).iter(batch_size=1000):
        state.update(json.dumps(some, default=str, sort_keys=True).encode())
    return state.hexdigest()


@torch.no_grad()
def _sums(values: Tensor) -> list[int] | None:
    if isinstance(values, DTensor) or hasattr(values, "ds_shape"):  # a process has a part of it
        return None
    bits = values.detach().contiguous().view(-1).view(BITS[values.element_size()])
    return [int(part.sum(dtype=torch.int64)) for part in (bits, bits[::2], bits[::3])]


def _described(thing: Any, seen: set[int]) -> Any:
    """As JSON: plain data as it is, code by its syntax tree, other objects by their class and plain attributes."""
    for kinds, describe in KINDS:
        if isinstance(thing, kinds):
            return describe(thing, seen)
    if id(thing) in seen:
        return "said before"
    seen.add(id(thing))
    if isinstance(thing, FunctionType):
        return _function(thing, seen)
    if isinstance(thing, type):
        return [thing.__qualname__, _syntax(thing)]
    attributes = {name: value for name, value in getattr(thing, "__dict__", {}).items() if _is_plain(value)}
    return [type(thing).__qualname__, _syntax(type(thing)), _described(attributes, seen)]


def _all(things: Iterable[Any], seen: set[int]) -> list[Any]:
    return [_described(thing, seen) for thing in things]


KINDS: list[tuple[Any, Callable[[Any, set[int]], Any]]] = [
    ((bool, int, float, str, type(None)), lambda thing, seen: thing),
    ((bytes, re.Pattern, range), lambda thing, seen: repr(thing)),
    ((set, frozenset), lambda thing, seen: sorted(map(repr, thing))),
    ((list, tuple), _all),
    (Mapping, lambda thing, seen: _all(((str(key), item) for key, item in thing.items()), seen)),
    (Reward, lambda thing, seen: _described(thing.function, seen)),
    (functools.partial, lambda thing, seen: _all((thing.func, thing.args, thing.keywords), seen)),
    (MethodType, lambda thing, seen: _all((thing.__func__, thing.__self__), seen)),
    (nn.Module, lambda thing, seen: [type(thing).__qualname__, digest_of_weights(thing.named_parameters())]),
]
"""How each kind of thing is described; the first that fits."""


def _is_plain(value: Any) -> bool:
    """Whether it says the same in every process: no handle, lock or client."""
    return value is None or isinstance(
        value, bool | int | float | str | bytes | list | tuple | dict | nn.Module | FunctionType
    )


def _function(function: FunctionType, seen: set[int]) -> Any:
    enclosed = []
    for cell in function.__closure__ or ():
        try:
            enclosed.append(_described(cell.cell_contents, seen))
        except ValueError:  # not filled yet
            enclosed.append(None)
    named = {}
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__ and (said := _of_its_package(function.__globals__[name], function, seen)):
            named[name] = said
    options = [_described(part, seen) for part in (function.__defaults__, function.__kwdefaults__, vars(function))]
    return [_syntax(function) or _bytes(function.__code__), options, enclosed, named]


def _of_its_package(value: Any, function: FunctionType, seen: set[int]) -> Any:
    """What a function says of a global that it names: code of other packages is left to their versions."""
    if isinstance(value, FunctionType | type):
        here, there = _package(function.__module__), _package(value.__module__)
        return _described(value, seen) if here.startswith(there) or there.startswith(here) else None
    plain = isinstance(value, bool | int | float | str | bytes | list | tuple | set | frozenset | dict | re.Pattern)
    return _described(value, seen) if plain else None


def _package(module: str) -> str:
    return module.rpartition(".")[0] or module if "/" not in module else module


def _names(code: CodeType) -> set[str]:
    """Of globals, in nested functions too."""
    return set(code.co_names).union(*(_names(item) for item in code.co_consts if isinstance(item, CodeType)))


def _syntax(thing: Any) -> str | None:
    """A function's or class's syntax tree without docstrings; None where its source cannot be had or stands in mid-line."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return None
    if getattr(thing, "__name__", "") == "<lambda>":  # the line may hold several
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _bytes(code: CodeType) -> list[Any]:
    constants = [_bytes(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]
