"""Python programs, judged by running them in a sandbox against tests or against inputs and outputs."""

from __future__ import annotations

import marshal
import math
import re
import time
from collections.abc import Collection
from typing import Any

from grpo_hf.isolation.sandbox import Isolation, Limits, Sandbox, examine
from grpo_hf.reward_fns.code.preamble import LEETCODE, imported_names
from grpo_hf.reward_fns.code.tests import Asserts, Pairs, parse_tests
from grpo_hf.reward_fns.marks import scoped
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward


@register_reward
@parses_gold(parse_tests)
@scoped
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
    tolerance: float = 0.0,
    preamble: str = LEETCODE,
    isolation: Isolation = "full",
) -> float:
    """1.0 if the completion's Python program passes all tests, else 0.0; with `partial_credit` the share that it passes.

    The program is the last ```python block that defines what the tests call, or else the last ```python block, or else the
    last block of any kind; without one there is no answer, unless `fenced=False` takes the whole completion. `scope`: see
    `scoped`. It runs with the standard library alone in a `Sandbox`, which says what it may use and
    what `isolation` means; names that it reads and does not define are imported where the `preamble` has them. `timeout` is
    for each input, or for all asserts together, and `total_timeout` for a completion; below the trainer's `reward_timeout` a
    slow program is a wrong one and not a fault.

    `tests` are of one of two kinds. Asserts (MBPP, HumanEval) call what the program defines; it is loaded as the module
    `solution`. Where they only define functions, those named `test...` are called, and those of a `unittest.TestCase`, or
    `check(candidate)` with the row's `entry_point`. A `fn_name` with `inputs` and `outputs` (APPS, TACO) is read as asserts.
    Inputs and outputs run the program as a script for each input; it passes when it ends with status 0 and prints the words
    of the output, in order, whatever the white space between them; `tolerance` is how far numbers may be from each other,
    absolutely or relatively. What comes after a failure is not run. With `partial_credit` it is, but not after a hang or,
    with asserts, a crash; then it counts as failed.

    >>> code("```python\\ndef f(x):\\n    return x * x\\n```", "assert f(2) == 4\\nassert f(-3) == 9")
    1.0
    >>> code("```python\\nprint(int(input()) ** 2)\\n```", [{"input": "2", "output": "4"}, {"input": "a", "output": "b"}])
    0.0
    >>> code("```python\\nclass Any:\\n    __eq__ = lambda *a: True\\ndef f(x): return Any()\\n```", "assert f(2) == 4")
    0.0

    Nothing that a program defines can pass a test but what its functions return. Expected outputs never enter its sandbox,
    and asserts run in another process, with the built-in functions and the library as they are there, to which only plain
    values come back. So an object of a class of the program's own equals no number, text or list, however it defines `==`;
    write `Mod(9).value == 2`, or compare two of its objects, which is then the program's own affair.

    Raises:
        BadGoldError: the tests cannot be read, or they need an `entry_point`.
        ValueError: this machine cannot isolate programs as asked for, or the preamble is more than imports.
    """
    asked = _asked(tests, entry_point)
    program = find_program(completion, fenced=fenced, defining=asked)
    if program is None:
        return NO_ANSWER
    options: dict[str, Any] = {
        "limits": Limits(timeout=timeout, memory_mb=memory_mb),
        "isolation": isolation,
        "preamble": imported_names(preamble),
    }
    end = time.monotonic() + total_timeout
    if isinstance(tests, Asserts):
        codes = [(marshal.loads(test), asked) for test in tests.tests]
        if tests.defines_check:
            codes.append(([compile(f"check({entry_point})", "<tests>", "exec", dont_inherit=True)], asked))
        left = max(0.0, end - time.monotonic())
        result = examine(program, codes, keep_going=partial_credit, library=tests.library, timeout=left, **options)
        counted = result.passed[tests.defines_check :]
        passed, total = sum(counted), len(counted)
    else:
        with Sandbox(program, **options) as box:
            passed, total = _passed_pairs(box, tests, partial_credit, end, tolerance), len(tests.pairs)
    return passed / total if partial_credit else float(passed == total)


def find_program(completion: str, *, fenced: bool = True, defining: Collection[str] = ()) -> str | None:
    """The last ```python block that defines one of these names, or else the last such block, or the last of any kind.

    A block that is cut off counts where no other is there. Without a block nothing, or with `fenced=False` the text.

    >>> find_program("```python\\nx = 1\\n```\\nIt prints:\\n```\\n1\\n```")
    'x = 1'
    >>> find_program("```python\\ndef f(): pass\\n```\\nTo use it:\\n```python\\nf()\\n```", defining=["f"])
    'def f(): pass'
    >>> find_program("x = 1"), find_program("x = 1", fenced=False)
    (None, 'x = 1')
    """
    blocks = _blocks(completion)
    names = "|".join(map(re.escape, defining))
    definition = re.compile(rf"^(?:(?:async\s+)?def|class)\s+(?:{names})\b|^(?:{names})\s*[:=]", re.MULTILINE)
    for wanted in (
        lambda closed, python, program: closed and python and names and definition.search(program),
        lambda closed, python, program: closed and python,
        lambda closed, python, program: closed,
        lambda closed, python, program: True,
    ):
        if found := [program for closed, python, program in blocks if wanted(closed, python, program)]:
            return found[-1]
    return None if fenced else completion


def _blocks(text: str) -> list[tuple[bool, bool, str]]:
    """Each fenced block: whether it is closed, whether it says that it is Python, and what is in it."""
    blocks: list[tuple[bool, bool, str]] = []
    fence, is_python, indent, lines = "", False, 0, list[str]()
    for line in text.split("\n"):
        bare = line.strip()
        if fence and bare.startswith(fence) and not bare.strip("`"):
            blocks.append((True, is_python, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
        elif bare.startswith("```") and "`" not in (language := bare.lstrip("`")):
            fence, lines, indent = bare[: len(bare) - len(language)], [], len(line) - len(line.lstrip(" "))
            is_python = language.strip().lower() in ("python", "python3", "py")
    return [*blocks, (False, is_python, "\n".join(lines))] if fence else blocks


def _asked(tests: Asserts | Pairs, entry_point: str | None) -> tuple[str, ...]:
    """The names that the program is to define."""
    if isinstance(tests, Pairs):
        return ()
    if not tests.defines_check:
        return tests.asked
    if not entry_point:
        raise BadGoldError("the tests define check(candidate) but never call it; the row needs a column 'entry_point'")
    try:
        names = compile(entry_point, "<entry_point>", "eval", dont_inherit=True).co_names[:1]
    except (SyntaxError, ValueError) as error:
        raise BadGoldError(f"the entry_point {entry_point!r} is not the name of a function") from error
    return (*(name for name in tests.asked if name not in names), *names)


def _passed_pairs(box: Sandbox, tests: Pairs, keep_going: bool, end: float, tolerance: float) -> int:
    """How many inputs give their outputs."""
    passed = 0
    for given, expected in tests.pairs:
        result = box.run(given, timeout=end - time.monotonic())
        if result.status == "ok" and _agree(result.stdout.split(), expected.split(), tolerance):
            passed += 1
        elif not keep_going or result.status == "timeout":
            break
    return passed


def _agree(printed: list[str], expected: list[str], tolerance: float) -> bool:
    """Whether two outputs have the same words, or numbers that are near enough."""
    return printed == expected or (
        tolerance > 0
        and len(printed) == len(expected)
        and all(_near(*pair, tolerance) for pair in zip(printed, expected, strict=True))
    )


def _near(word: str, other: str, tolerance: float) -> bool:
    try:
        return word == other or math.isclose(float(word), float(other), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
