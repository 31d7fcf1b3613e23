"""Runs tests against a program that lives in another process, whose names and objects the tests use as if they were here.

Runs inside the sandbox, in an interpreter that never runs a line of the program. What the program returns comes as a plain
value, or as a `Foreign`; so neither a class nor a built-in of the program's making takes part in a comparison.
"""

from __future__ import annotations

import io
import marshal
import os
import sys
from types import BuiltinMethodType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType

from grpo_hf.isolation import foreign, wire
from grpo_hf.isolation.program import attempt

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from typing import Any

_ASKED, _ANSWERED, _PASSED, _PRINTED = 3, 4, 5, 6
_STREAMS = (io.StringIO, io.BytesIO)


def main(job: dict[str, Any]) -> int:
    """Run the tests that standard input holds; say of each on a file of its own whether it passed; the exit status."""
    tests, modules, keep_going = marshal.loads(os.pread(0, os.fstat(0).st_size, 0))
    module = sys.modules["tests"] = ModuleType("tests")
    program = _Program()
    sys.modules["solution"] = _Solution(program)
    for name, (place, attribute) in modules.items():
        loaded = __import__(place, fromlist=[""])
        setattr(module, name, getattr(loaded, attribute) if attribute else loaded)
    status = 0
    for statements, names in tests:
        failed = attempt(_test, program, statements, names, module.__dict__)
        os.write(_PASSED, b"\0" if failed is not None else b"\1")
        status = status or failed or 0
        if failed is not None and not keep_going:
            break
    return status


def _test(program: _Program, statements: list[CodeType], names: list[str], namespace: dict[str, Any]) -> None:
    """Run a test, with the program's names as they are before each of its statements."""
    for statement in statements:
        for name in names:
            try:
                namespace[name] = program.ask("global", name)
            except KeyError:
                namespace.pop(name, None)
                if len(names) == 1:  # or else Python's own would do for it
                    raise NameError(f"the program defines no {name!r}") from None
        exec(statement, namespace)


class _Program(wire.Link):
    """The link to the program; the tests end where it does."""

    def __init__(self) -> None:
        super().__init__((_ASKED, _ANSWERED), self._answer, _is_ours, trusts=False)
        self.shown = 0
        self.steps: list[Any] = []

    def ask(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """Have the program do something; StopIteration, which ends a `map` of the test's, comes from iterators alone."""
        try:
            value = super().ask(verb, *arguments, **options)
            if verb == "getattr" and arguments[1] in ("send", "throw", "__next__"):
                self.steps.append(value)
            return value
        except StopIteration as error:
            if arguments[0] == "__next__" or any(arguments[0] is step for step in self.steps):
                raise
            raise RuntimeError("the program raised StopIteration") from error
        except wire.LinkError as error:  # which no `except` of a test gets to see
            print(error, file=sys.__stderr__, flush=True)
            os._exit(1)
        finally:
            self._show()

    def _answer(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """Do for the program what it may have done with an object that a test has handed it: no more than use it."""
        lent = arguments[1] if verb in ("special", "isinstance", "issubclass") else arguments[0]
        if not any(lent is mine for mine in self.lent):
            raise TypeError(f"this is not an object of the tests: {lent!r}")
        if verb.endswith("attr") and not _may_touch(verb, *arguments):
            raise AttributeError(f"a program cannot {verb} {arguments[1]!r} of a {type(lent).__name__}")
        return foreign.VERBS[verb](*arguments, **options)

    def _show(self) -> None:
        """Print what the program has printed, where a test has put something in place of standard output."""
        size = os.fstat(_PRINTED).st_size
        if size > self.shown and sys.stdout is not sys.__stdout__:
            sys.stdout.write(os.pread(_PRINTED, size - self.shown, self.shown).decode(errors="replace"))
        self.shown = size


class _Solution(ModuleType):
    """What `import solution` gives a test."""

    def __init__(self, program: _Program):
        super().__init__("solution")
        self.__dict__["_program"] = program
        self.__dict__["__all__"] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_program"].ask("global", name)
        except KeyError:
            raise AttributeError(f"the program defines no {name!r}") from None


def _is_ours(value: Any) -> bool:
    """Whether the program may be given a value to ask: functions and classes of the tests, and what these make."""
    if isinstance(value, MethodType | BuiltinMethodType):
        return _is_ours(value.__self__)
    if isinstance(value, FunctionType | type):
        return value.__module__ == "tests"
    return type(value).__module__ == "tests" or type(value) in (GeneratorType, *_STREAMS)


def _may_touch(verb: str, lent: Any, name: str, *value: Any) -> bool:
    """Whether the program may read or set an attribute: a public one, and no method is replaced."""
    if isinstance(lent, FunctionType | MethodType | GeneratorType) or name.startswith("_"):
        return False
    return verb == "getattr" or not (isinstance(lent, type) or callable(getattr(type(lent), name, None)))
