"""The tests of a dataset row, read into the form that `code` runs."""

from __future__ import annotations

import ast
import builtins
import json
import marshal
import re
import symtable
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_hf.reward_fns.code.preamble import LIBRARY_CLASSES
from grpo_hf.rewards.outcomes import BadGoldError

FORMS = (
    "text with asserts, a list of such texts, a list of {'input': ..., 'output': ...}, {'inputs': [...], 'outputs': [...]}"
    " (with 'fn_name' where they are arguments and results of that function) or JSON text of these"
)
_SETUP = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
_AGREES = """
def _agrees(got, expected):
    def plain(value):
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
    got, expected = plain(got), plain(expected)
    return got == expected or [got] == expected
"""


@dataclass(frozen=True)
class Asserts:
    """Tests that call the program's functions."""

    tests: tuple[bytes, ...]
    """The marshalled codes of each one's statements; it passes when they end without an exception."""
    asked: tuple[str, ...]
    """Names that they take from the program."""
    library: dict[str, tuple[str, str | None]]
    """Names of the standard library that they use without importing them, and what they stand for, as in a preamble."""
    defines_check: bool
    """True when they only define `check(candidate)`, as HumanEval's do; then `tests` is the code of that."""


@dataclass(frozen=True)
class Pairs:
    """Tests that feed standard input and compare standard output."""

    pairs: tuple[tuple[str, str], ...]


def parse_tests(tests: Any) -> Asserts | Pairs:
    """Read the tests of a row.

    >>> parse_tests('[{"input": "2", "output": "4"}]')
    Pairs(pairs=(('2', '4'),))
    >>> parse_tests("assert f(2) == 4\\nx = 3\\nassert f(x) == 9").asked
    ('f',)

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
        return _calls(value, str(value["fn_name"])) if value.get("fn_name") else _pairs(_rows(value))
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        return _asserts(value)
    if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        return _pairs(value)
    raise BadGoldError(f"the tests {_shortened(tests)} are not {FORMS}")


def _rows(columns: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Turn {'inputs': [...], 'outputs': [...]} (or 'input', 'output') into a list of pairs."""
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
            raise BadGoldError(f"the test {_shortened(row)} calls a function; write {{'fn_name': ..., 'inputs': ...}}")
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


def _calls(columns: Mapping[str, Any], name: str) -> Asserts:
    """Functional tests (APPS, TACO, LiveCodeBench): arguments and results of a function, or of `Solution`'s method.

    Arguments are a list, or a text with one JSON value a line; a result may be wrapped in a list, as in APPS.
    """
    rows = _rows(columns)
    if not rows or not name.isidentifier():
        raise BadGoldError(f"the tests {_shortened(columns)} have no input, or no name of a function")
    lines = [_AGREES, f"_target = lambda: {name} if {name!r} in globals() else Solution().{name}"]
    for row in rows:
        try:
            texts = isinstance(row["input"], str)
            given = [json.loads(line) for line in row["input"].splitlines() if line.strip()] if texts else list(row["input"])
            expected = json.loads(row["output"]) if texts else row["output"]
        except (ValueError, TypeError) as error:
            raise BadGoldError(f"the test {_shortened(row)} does not hold arguments and a result: {error}") from error
        lines.append(f"assert _agrees(_target()(*{given!r}), {expected!r})")
    return _asserts(["\n".join(lines)], (name, "Solution"))


def _asserts(texts: Sequence[str], names: tuple[str, ...] = ()) -> Asserts:
    """Compile texts with asserts; without ``names`` they ask the program for what they read and do not define.

    Tests that reach the program in another way, by an `entry_point` or the module `solution`, take no built-in name from it.
    """
    try:
        trees = [_Completed().visit(ast.parse(text)) for text in texts]
        body = [statement for tree in trees for statement in tree.body if not _runs_all(statement)]
        parts, defines_check = _cut(body)
        codes = [[compile(ast.Module([statement], []), "<tests>", "exec", 0, True) for statement in part] for part in parts]
        reads = _reads("\n".join(texts))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadGoldError(f"the tests {_shortened(texts)} are not Python: {error}") from error
    if not codes:
        raise BadGoldError(f"the tests {_shortened(texts)} test nothing: there is no assert, and no call of their functions")
    calls = (node.func for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call))
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    otherwise = defines_check or any(re.search(r"\bsolution\b", text) for text in texts)
    asked = tuple(sorted(names or programs_names(reads, set() if otherwise else called)))
    known = LIBRARY_CLASSES | {name: (name, None) for name in sys.stdlib_module_names}
    library = {name: known[name] for name in sorted(reads - set(asked)) if name in known}
    return Asserts(tuple(map(marshal.dumps, codes)), asked, library, defines_check)


def programs_names(reads: set[str], called: set[str]) -> set[str]:
    """Of the names that tests read and do not define, those that they take from the program.

    Python's built-in functions and the library's classes are not among them, whatever a program defines; but tests that read
    no other name mean the program's function where they call one built-in function.

    >>> programs_names({"f", "set"}, {"f", "set"}), programs_names({"sum"}, {"sum"}), programs_names({"abs"}, set())
    ({'f'}, {'sum'}, set())
    """
    known = vars(builtins).keys() | LIBRARY_CLASSES.keys() | (sys.stdlib_module_names - called)
    return reads - known or (reads & called if len(reads & called) == 1 else set())


class _Completed(ast.NodeTransformer):
    """Has a `with` fail whose asserts were not all reached: the program's context manager may swallow what they raise."""

    def visit_With(self, node: ast.With) -> ast.stmt:
        self.generic_visit(node)
        meant = re.search("raises|suppress", " ".join(map(ast.unparse, node.items)), re.IGNORECASE)
        asserts = [place for place, part in enumerate(node.body, 1) if any(map(_asserts_something, ast.walk(part)))]
        if meant or not asserts:
            return node
        passed = f"_passed_{node.lineno}_{node.col_offset}"
        before, here, after = (
            ast.parse(text).body for text in (f"{passed} = False", f"{passed} = True", f"assert {passed}")
        )
        node.body[asserts[-1] : asserts[-1]] = here
        return ast.fix_missing_locations(ast.copy_location(ast.If(ast.Constant(True), [*before, node, *after], []), node))


def _asserts_something(node: ast.AST) -> bool:
    """Whether it is an assert, or calls one of unittest's."""
    is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return isinstance(node, ast.Assert) or (is_method and node.func.attr.startswith("assert"))  # type: ignore[attr-defined]


def _reads(text: str) -> set[str]:
    """Names that a text reads as global ones and does not bind."""
    top = symtable.symtable(text, "<tests>", "exec")
    tables, read, bound = [top], set[str](), set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                binds = symbol.is_assigned() or symbol.is_imported()
                (bound if binds else read).add(symbol.get_name())
    return read - bound


def _runs_all(statement: ast.stmt) -> bool:
    """Whether it is `unittest.main()`."""
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith(("unittest.main(", "main("))


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
        calls = [f"{name}()" for name in sorted(functions) if name.startswith("test")]
        for call in calls + [call for node in body if isinstance(node, ast.ClassDef) for call in _methods(node)]:
            tests.append([*waiting, *ast.parse(call).body])
            waiting = []
    if tests:
        tests[-1] += waiting
        return tests, False
    return ([waiting], True) if "check" in functions else ([], False)


def _methods(node: ast.ClassDef) -> Iterator[str]:
    """Calls of a unittest.TestCase's tests, each with its preparations."""
    if any(ast.unparse(base).endswith("TestCase") for base in node.bases):
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and method.name.startswith("test"):
                yield f"__import__('unittest').TestSuite([{node.name}({method.name!r})]).debug()"


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
