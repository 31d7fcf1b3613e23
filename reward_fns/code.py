"""Python programs, judged by running them in a sandbox against tests or against inputs and outputs."""

from __future__ import annotations

import marshal
import time
from types import CodeType
from typing import Any

from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward
from reward_fns._code_tests import Asserts, Pairs, parse_tests
from reward_fns._sandbox_program import TESTS
from reward_fns.sandbox import Isolation, Limits, Sandbox


@register_reward
@parses_gold(parse_tests)
def code(
    completion: str,
    tests: Any,
    entry_point: str | None = None,
    *,
    timeout: float = 5.0,
    total_timeout: float = 8.0,
    memory_mb: int = 512,
    partial_credit: bool = False,
    fenced: bool = True,
    isolation: Isolation = "full",
) -> float:
    """1.0 if the completion's Python program passes all tests, else 0.0; with `partial_credit` the share that it passes.

    The program is the last closed ```python block, or else the last closed block of any kind; without one there is no
    answer, unless `fenced=False` takes the whole completion. It runs with the standard library alone in a `Sandbox`, which
    says what it may use and what `isolation` means. `timeout` is for each input, or for all asserts together, and
    `total_timeout` for a completion; below the trainer's `reward_timeout` a slow program is a wrong one and not a fault.

    `tests` are of one of two kinds. Asserts (MBPP, HumanEval) run in the program's own namespace, where it has been loaded
    as the module `solution`. Where they only define functions, those named `test...` are called, or `check(candidate)` with
    the row's `entry_point`. Inputs and outputs (APPS, TACO, LiveCodeBench) run the program as a script for each input; it
    passes when it ends with status 0 and prints the words of the output, in order, whatever the white space between them.
    What comes after a failure is not run. With `partial_credit` it is, but not after a hang or, with asserts, a crash; then
    it counts as failed.

    >>> code("```python\\ndef f(x):\\n    return x * x\\n```", "assert f(2) == 4\\nassert f(-3) == 9")
    1.0
    >>> code("```python\\nprint(int(input()) ** 2)\\n```", [{"input": "2", "output": "4"}, {"input": "a", "output": "b"}])
    0.0
    >>> code("```python\\nimport os; os._exit(0)\\n```", "assert f(2) == 4")
    0.0

    A program cannot pass by printing, nor by ending the process: expected outputs never enter the sandbox, and each assert
    that has passed hands back a ticket that lies unread until then. In asserts `==` and `in` do not take an object whose
    equality the program wrote for a plain value, and the built-in functions are Python's own, whatever the program did to
    them. But asserts run in the program's interpreter, and a program written to cheat can read its caller's frame, open
    descriptors and memory, or change what the tests import. Inputs and outputs have no such weakness.

    Raises:
        BadGoldError: the tests cannot be read, or they need an `entry_point`.
        ValueError: this machine cannot isolate programs as asked for.
    """
    program = find_program(completion, fenced=fenced)
    if program is None:
        return NO_ANSWER
    limits = Limits(timeout=timeout, memory_mb=memory_mb)
    end = time.monotonic() + total_timeout
    with Sandbox(program, limits=limits, isolation=isolation) as box:
        if isinstance(tests, Pairs):
            passed, total = _passed_pairs(box, tests, partial_credit, end), len(tests.pairs)
        else:
            passed, total = _passed_asserts(box, tests, entry_point, partial_credit, end)
    return passed / total if partial_credit else float(passed == total)


def find_program(completion: str, *, fenced: bool = True) -> str | None:
    """The last closed ```python block of a text, or else its last closed block; with `fenced=False`, or else the text.

    >>> find_program("```python\\nx = 1\\n```\\nIt prints:\\n```\\n1\\n```")
    'x = 1'
    >>> find_program("x = 1"), find_program("x = 1", fenced=False)
    (None, 'x = 1')
    """
    found: dict[bool, str] = {}
    fence, is_python, indent, lines = "", False, 0, list[str]()
    for line in completion.split("\n"):
        bare = line.strip()
        if fence and bare.startswith(fence) and not bare.strip("`"):
            found[is_python], fence = "\n".join(lines), ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
        elif bare.startswith("```") and "`" not in (language := bare.lstrip("`")):
            fence, lines, indent = bare[: len(bare) - len(language)], [], len(line) - len(line.lstrip(" "))
            is_python = language.strip().lower() in ("python", "python3", "py")
    return found.get(True, found.get(False, None if fenced else completion))


def _passed_pairs(box: Sandbox, tests: Pairs, keep_going: bool, end: float) -> int:
    """How many inputs give their outputs."""
    passed = 0
    for given, expected in tests.pairs:
        result = box.run(given, timeout=end - time.monotonic())
        if result.status == "ok" and result.stdout.split() == expected.split():
            passed += 1
        elif not keep_going or result.status == "timeout":
            break
    return passed


def _passed_asserts(box: Sandbox, tests: Asserts, entry_point: str | None, keep_going: bool, end: float) -> tuple[int, int]:
    """How many tests pass, of how many."""
    codes: list[CodeType] = [marshal.loads(test) for test in tests.tests]
    if not tests.needs_entry_point:
        return sum(box.test(codes, keep_going=keep_going, timeout=end - time.monotonic()).passed), len(codes)
    if not entry_point:
        raise BadGoldError("the tests define check(candidate) but never call it; the row needs a column 'entry_point'")
    try:
        check = compile(f"check({entry_point})", TESTS, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise BadGoldError(f"the entry_point {entry_point!r} is not the name of a function") from error
    return sum(box.test([*codes, check], timeout=end - time.monotonic()).passed[1:]), 1
