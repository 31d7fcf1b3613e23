"""The tests of a dataset row, read into the form that `code` runs."""

from __future__ import annotations

import ast
import json
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_hf.rewards.outcomes import BadGoldError
from reward_fns._sandbox_program import CONTAINS, EQUAL, TESTS

FORMS = (
    "text with asserts, a list of such texts, a list of {'input': ..., 'output': ...}, {'inputs': [...], 'outputs': [...]}"
    " or JSON text of these"
)
_GUARDS: dict[type[ast.cmpop], str] = {ast.Eq: EQUAL, ast.In: CONTAINS}
_SETUP = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Asserts:
    """Tests that call the program's functions."""

    tests: tuple[bytes, ...]
    """The marshalled code of each; it passes when it ends without an exception."""
    needs_entry_point: bool
    """True when they only define `check(candidate)`, as HumanEval's do; then `tests` is the code of that."""


@dataclass(frozen=True)
class Pairs:
    """Tests that feed standard input and compare standard output."""

    pairs: tuple[tuple[str, str], ...]


def parse_tests(tests: Any) -> Asserts | Pairs:
    """Read the tests of a row.

    >>> parse_tests('[{"input": "2", "output": "4"}]')
    Pairs(pairs=(('2', '4'),))
    >>> len(parse_tests("assert f(2) == 4\\nx = 3\\nassert f(x) == 9").tests)
    2

    Raises:
        BadGoldError: there is no test in them, or they are none of the forms.
    """
    value = tests
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(tests)
        except json.JSONDecodeError as error:
            raise BadGoldError(f"the tests {_shortened(tests)} start as JSON does and are not: {error}") from error
    if isinstance(value, str):
        return _asserts([value])
    if isinstance(value, Mapping):
        return _pairs(_rows(value))
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        return _asserts(value)
    if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        return _pairs(value)
    raise BadGoldError(f"the tests {_shortened(tests)} are not {FORMS}")


def _rows(columns: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Turn {'inputs': [...], 'outputs': [...]} (or 'input', 'output') into a list of pairs."""
    if columns.get("fn_name"):
        raise BadGoldError(f"the tests call {columns['fn_name']!r} with arguments; write asserts: {_shortened(columns)}")
    given, expected = (columns.get(f"{name}s", columns.get(name)) for name in ("input", "output"))
    lists = all(isinstance(values, Sequence) and not isinstance(values, str) for values in (given, expected))
    if not lists or len(given) != len(expected):
        raise BadGoldError(f"the tests {_shortened(columns)} are not {FORMS}, of one length")
    return [{"input": i, "output": o} for i, o in zip(given, expected, strict=True)]


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Pairs:
    """Check a list of pairs."""
    pairs = []
    for row in rows:
        if row.get("testtype") == "functional":
            raise BadGoldError(f"the test {_shortened(row)} calls a function with arguments; write it as an assert")
        pairs.append((_text(row, "input"), _text(row, "output")))
    if not pairs:
        raise BadGoldError(f"there is no test; give {FORMS}")
    return Pairs(tuple(pairs))


def _text(row: Mapping[str, Any], name: str) -> str:
    """The input or output of a pair: text, or a list of lines."""
    value = row.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise BadGoldError(f"the test {_shortened(row)} needs text as its {name!r}, not {value!r}")
    return value


def _asserts(texts: Sequence[str]) -> Asserts:
    """Compile texts with asserts."""
    try:
        body = [statement for text in texts for statement in _Guard().visit(ast.parse(text)).body]
        parts, needs_entry_point = _cut(body)
        codes = [marshal.dumps(compile(ast.Module(part, []), TESTS, "exec", dont_inherit=True)) for part in parts]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadGoldError(f"the tests {_shortened(texts)} are not Python: {error}") from error
    if not codes:
        raise BadGoldError(f"the tests {_shortened(texts)} test nothing: there is no assert, and no call of their functions")
    return Asserts(tuple(codes), needs_entry_point)


class _Guard(ast.NodeTransformer):
    """Puts the sandbox's own functions in place of `==` and `in`."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        guard = _GUARDS.get(type(node.ops[0]))
        if guard is None or len(node.ops) > 1:
            return node
        call = ast.Call(ast.Name(guard, ast.Load()), [node.left, *node.comparators], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def _cut(body: list[ast.stmt]) -> tuple[list[list[ast.stmt]], bool]:
    """Cut statements into tests, each with the preparations before it; and whether all they do is define `check`."""
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    tests, waiting = list[list[ast.stmt]](), list[ast.stmt]()
    for statement in body:
        waiting.append(statement)
        if _can_fail(statement, functions):
            tests.append(waiting)
            waiting = []
    if not tests:
        for name in sorted(name for name in functions if name.startswith("test")):
            tests.append([*waiting, *ast.parse(f"{name}()").body])
            waiting = []
    if tests:
        tests[-1] += waiting
        return tests, False
    return ([waiting], True) if "check" in functions else ([], False)


def _can_fail(statement: ast.stmt, functions: set[str]) -> bool:
    """Whether a statement asserts something by itself or by a call of one of these functions."""
    return not isinstance(statement, _SETUP) and any(
        isinstance(node, ast.Assert | ast.Raise)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions)
        for node in ast.walk(statement)
    )


def _shortened(value: Any) -> str:
    """The start of a value's repr."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
