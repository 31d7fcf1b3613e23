"""The last steps before a program under test, in its own process: what it sees, how it ends, and the tests that judge it.

Runs inside the sandbox only. The program may change any module and any built-in, so this file keeps what it needs from
before (its own `__builtins__` is a copy, see `sandbox.py`).
"""

from __future__ import annotations

import atexit
import builtins
import marshal
import os
import sys
from types import FunctionType, ModuleType

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROGRAM, TESTS = "<program>", "<tests>"
EQUAL, CONTAINS = "__equal__", "__contains__"
OUT_OF_MEMORY = 99  # the exit status after a MemoryError
TICKET = 16

_read, _write, _hook = os.read, os.write, sys.__excepthook__
_parents, _attributes = type.__dict__["__mro__"].__get__, type.__dict__["__dict__"].__get__
_library = os.path.dirname(os.__file__) + os.sep
_HELD: dict[type, Callable[[Any], Any]] = {
    **{kind: kind.__iter__ for kind in (list, tuple, set, frozenset)},
    dict: lambda value: [*dict.keys(value), *dict.values(value)],
}
_PLAIN = {int, float, complex, bool, str, bytes, type(None)}
_mocks = f"{_library}unittest{os.sep}"


def run_script(program: str) -> int:
    """Run it as Python runs a script, with its threads and exit functions; the exit status."""
    status = _attempt(_execute, program, _main_module("__main__"))
    ended = _attempt(_finish)
    return status or ended or 0


def run_tests(program: str, tests: int, tickets: int, passed: int) -> int:
    """Run it as the module `solution`, then each test in that module; the exit status.

    For each test that passes one ticket moves from the file of tickets, where it lies unread until then, to the file of
    passed ones. So nothing that the program prints, nor any way to end the process, passes a test.
    """
    pristine = {**vars(builtins), EQUAL: _equal, CONTAINS: _contains}
    namespace = _main_module("solution")
    stopped = _attempt(_execute, program, namespace)
    if stopped is not None:
        return stopped
    namespace["__builtins__"] = pristine
    status = 0
    codes, keep_going = marshal.loads(_whole(tests))
    for test in codes:
        failed = _attempt(exec, test, namespace)
        ticket = _read(tickets, TICKET)
        if failed is None:
            _write(passed, ticket)
            continue
        status = status or failed
        if not keep_going:
            break
    _attempt(_flush)
    return status


def open_streams() -> None:
    """Make new standard streams on the descriptors 0, 1 and 2."""
    errors = {"stdin": "surrogateescape", "stdout": "surrogateescape", "stderr": "backslashreplace"}
    for place, (name, handler) in enumerate(errors.items()):
        stream = open(place, "w" if place else "r", 1 if place == 2 else -1, "utf-8", handler, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _main_module(name: str) -> dict[str, Any]:
    """The names of a new module that stands in for the main one; ours can no longer be imported."""
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("reward_fns")]:
        del sys.modules[loaded]
    sys.argv = ["solution.py"]
    sys.modules["__main__"] = sys.modules[name] = module = ModuleType(name)
    module.__dict__["__builtins__"] = builtins  # or else exec would hand over this file's own
    return module.__dict__


def _execute(program: str, namespace: dict[str, Any]) -> None:
    exec(compile(program, PROGRAM, "exec", dont_inherit=True), namespace)


def _attempt(action: Callable[..., Any], *arguments: Any) -> int | None:
    """None if the action returned, or else the exit status that its exception means."""
    try:
        action(*arguments)
    except SystemExit as stop:
        return stop.code & 0xFF if isinstance(stop.code, int) else int(stop.code is not None)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        _hook(*sys.exc_info())
        return 1
    return None


def _finish() -> None:
    """What Python does at the end of a script."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()


def _flush() -> None:
    for stream in {id(stream): stream for stream in (sys.stdout, sys.__stdout__)}.values():
        if stream is not None and not stream.closed:
            stream.flush()


def _whole(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _equal(left: Any, right: Any) -> Any:
    """`left == right`, but what holds an object whose equality the program wrote equals nothing that does not."""
    result = left == right
    return False if result and _declares(left) != _declares(right) else result


def _contains(item: Any, items: Any) -> bool:
    """`item in items`, likewise."""
    return item in items and (not _declares(item) or _declares(items))


def _declares(value: Any) -> bool:
    """Whether a value, or one in the lists, tuples, sets and dicts that make it up, has an equality that is not trusted."""
    values, seen = [value], set()
    while values:
        value = values.pop()
        if not _trusted(type(value)):
            return True
        held = [item for kind, items in _HELD.items() if isinstance(value, kind) for item in items(value)]
        if held and id(value) not in seen:
            seen.add(id(value))
            values += [item for item in held if type(item) not in _PLAIN]
    return False


def _trusted(kind: type) -> bool:
    """Whether the equality of a class is Python's, the standard library's (mocks apart) or the tests'."""
    equality = next(names["__eq__"] for names in map(_attributes, _parents(kind)) if "__eq__" in names)
    if type(equality) is FunctionType:
        file = equality.__code__.co_filename
        return file == TESTS or (file.startswith(_library) and not file.startswith(_mocks))
    return type(equality) is type(object.__eq__) and equality.__name__ == "__eq__"
