"""The last steps before a program under test, in its own process: what it sees, how it ends, and how it answers tests.

Runs inside the sandbox only. The program may change any module and any built-in, so this file keeps what it needs from
before (its own `__builtins__` is a copy, see `sandbox.py`).
"""

from __future__ import annotations

import atexit
import builtins
import os
import sys
from types import CodeType, ModuleType

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROGRAM = "<program>"
OUT_OF_MEMORY = b"MemoryError\n"  # the end of standard error after one that nobody caught
_TREE_ONLY = 0x400  # ast.PyCF_ONLY_AST

_hook = sys.__excepthook__


def run_script(job: dict[str, Any]) -> int:
    """Run it as Python runs a script, with its threads and exit functions; the exit status."""
    status = attempt(_execute, job, _main_module("__main__"))
    ended = attempt(_finish)
    return status or ended or 0


def serve(job: dict[str, Any]) -> int:
    """Run it as the module `solution`, then do what the tests ask, until they end; the exit status."""
    from grpo_hf.isolation import foreign, wire

    namespace = _main_module("solution")
    stopped = attempt(_execute, job, namespace)
    if stopped is not None:
        return stopped

    def answer(verb: str, *arguments: Any, **options: Any) -> Any:
        try:
            return namespace[arguments[0]] if verb == "global" else foreign.VERBS[verb](*arguments, **options)
        finally:
            _flush()

    wire.Link((3, 4), answer, lambda value: True, trusts=True).serve()
    return 0


def open_streams() -> None:
    """Make new standard streams on the descriptors 0, 1 and 2."""
    errors = {"stdin": "surrogateescape", "stdout": "surrogateescape", "stderr": "backslashreplace"}
    for place, (name, handler) in enumerate(errors.items()):
        stream = open(place, "w" if place else "r", 1 if place == 2 else -1, "utf-8", handler, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def attempt(action: Callable[..., Any], *arguments: Any) -> int | None:
    """None if the action returned, or else the exit status that its exception means."""
    try:
        action(*arguments)
    except SystemExit as stop:
        return stop.code & 0xFF if isinstance(stop.code, int) else int(stop.code is not None)
    except MemoryError:
        os.write(2, OUT_OF_MEMORY)
        return 1
    except BaseException:
        _hook(*sys.exc_info())
        return 1
    return None


def add_missing(code: CodeType, tree: Callable[[], Any], namespace: dict[str, Any], preamble: dict[str, Any]) -> None:
    """Import those names of the preamble that a text reads and neither it nor Python defines."""
    codes, mentioned = [code], set[str]()
    while codes:
        code = codes.pop()
        mentioned.update(code.co_names)
        codes += [value for value in code.co_consts if isinstance(value, CodeType)]
    wanted = {name for name in mentioned if name in preamble and not hasattr(builtins, name)}
    if wanted:
        for name in wanted & set(_read_names(tree())):
            module, attribute = preamble[name]
            loaded = __import__(module, fromlist=[""])
            namespace[name] = getattr(loaded, attribute) if attribute else loaded


def _read_names(tree: Any) -> list[str]:
    """Every name that a syntax tree reads as a variable."""
    nodes, names = [tree], []
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "Name" and type(node.ctx).__name__ == "Load":
            names.append(node.id)
        for field in node._fields:
            value = getattr(node, field, None)
            nodes += [item for item in (value if isinstance(value, list) else [value]) if hasattr(item, "_fields")]
    return names


def _main_module(name: str) -> dict[str, Any]:
    """The names of a new module that stands in for the main one; ours can no longer be imported."""
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("grpo_hf")]:
        del sys.modules[loaded]
    sys.argv = ["solution.py"]
    sys.modules["__main__"] = sys.modules[name] = module = ModuleType(name)
    module.__dict__["__builtins__"] = builtins  # or else exec would hand over this file's own
    for stop in ("exit", "quit"):  # which the module `site` would have made
        setattr(builtins, stop, _stop)
    return module.__dict__


def _stop(code: Any = None) -> None:
    raise SystemExit(code)


def _execute(job: dict[str, Any], namespace: dict[str, Any]) -> None:
    program = job["program"]
    code = compile(program, PROGRAM, "exec", dont_inherit=True)
    add_missing(code, lambda: compile(program, PROGRAM, "exec", _TREE_ONLY, True), namespace, job["preamble"])
    exec(code, namespace)


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
