"""The `code` verifier: which program it takes, which tests it reads, and how it judges by them."""

from __future__ import annotations

import doctest
import json
import pickle
import textwrap
import threading
import time

import pytest

from grpo_hf.isolation import sandbox
from grpo_hf.isolation.sandbox import Sandbox, examine
from grpo_hf.reward_fns import code as code_module
from grpo_hf.reward_fns.code import code, find_program, preamble
from grpo_hf.reward_fns.code import tests as code_tests
from grpo_hf.reward_fns.code.tests import Asserts, Pairs, parse_tests
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, NoAnswer
from grpo_hf.rewards.registry import get_reward

SQUARE = "```python\ndef square(x):\n    return x * x\n```"
SQUARE_INPUT = "```python\nprint(int(input()) ** 2)\n```"
MBPP = ["assert square(2) == 4", "assert square(-3) == 9", "assert square(0) == 0"]
HUMAN_EVAL = "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "-3\n", "output": "9\n"}, {"input": "0", "output": " 0 "}]


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


@pytest.mark.parametrize("module", [code_module, code_tests, preamble, sandbox])
def test_the_docstring_examples(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("```python\na\n```\nthen\n```python\nb\n```", "b"),
        ("```python\na\n```\n```\noutput\n```", "a"),
        ("```Python3\na\n```", "a"),
        ("```py\r\na\r\n```\r\n", "a\r"),
        ("```\na\n```\n```text\nb\n```", "b"),
        ("```python\na\n```\n```python\ncut o", "a"),
        ("```python\ncut o", "cut o"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("1. So:\n   ```python\n   if x:\n       y\n\n   z\n   ```", "if x:\n    y\n\nz"),
        ("it is ```python print(1)```", None),
        ("```python print(1)```", None),
        ("```python\n```", ""),
        ("", None),
        ("no code", None),
    ],
)
def test_find_program(completion, expected):
    assert find_program(completion) == expected


@pytest.mark.parametrize("hostile", ["```x\n" * 100_000, "`" * 500_000, "```\n" * 100_001, " " * 500_000 + "```"])
def test_finding_a_program_takes_linear_time(hostile):
    start = time.process_time()
    find_program(hostile, defining=["square"])
    assert time.process_time() - start < 2.0


def test_no_block_is_no_answer():
    assert code("I cannot.", MBPP) is NO_ANSWER
    assert code("```python\ndef square(x): return x * x\n", MBPP) == 1.0
    assert code("def square(x): return x * x", MBPP, fenced=False) == 1.0
    assert not isinstance(code("```python\nx = 1\n```", MBPP), NoAnswer)


@pytest.mark.parametrize("tests", [MBPP, "\n".join(MBPP), json.dumps(MBPP), tuple(MBPP)])
def test_asserts_in_every_form(tests):
    assert code(SQUARE, tests) == 1.0
    assert code(fenced("def square(x):\n    return 2 * x"), tests) == 0.0
    assert code(fenced("def square(x):\n    return 2 * x"), tests, partial_credit=True) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "tests",
    [
        PAIRS,
        json.dumps(PAIRS),
        {"inputs": ["2\n", "-3\n", "0"], "outputs": ["4\n", "9\n", "0\n"]},
        json.dumps({"inputs": ["2\n", "-3\n", "0"], "outputs": ["4\n", "9\n", "0\n"], "fn_name": None}),
        {"input": ["2", "-3", "0"], "output": ["4", "9", "0"]},
        [{"input": ["2", ""], "output": ["4", ""]}, {"input": "-3", "output": "9"}, {"input": "0", "output": "0"}],
        [{**pair, "testtype": "stdin"} for pair in PAIRS],
    ],
)
def test_pairs_in_every_form(tests):
    assert code(SQUARE_INPUT, tests) == 1.0
    assert code(fenced("print(2 * int(input()))"), tests) == 0.0
    assert code(fenced("print(2 * int(input()))"), tests, partial_credit=True) == pytest.approx(2 / 3)


def test_check_and_test_functions_are_called():
    assert code(SQUARE, HUMAN_EVAL, "square") == 1.0
    assert code(SQUARE, HUMAN_EVAL + "check(square)") == 1.0
    assert code(fenced("def square(x):\n    return 4"), HUMAN_EVAL, "square", partial_credit=True) == 0.0
    assert code(SQUARE, HUMAN_EVAL, "cube") == 0.0
    method = fenced("class Solution:\n    def square(self, x):\n        return x * x")
    assert code(method, HUMAN_EVAL, "Solution().square") == 1.0
    with pytest.raises(BadGoldError, match="needs a column 'entry_point'"):
        code(SQUARE, HUMAN_EVAL)
    with pytest.raises(BadGoldError, match="the entry_point 'no square' is not"):
        code(SQUARE, HUMAN_EVAL, "no square")
    pytest_style = (
        "from solution import square\ndef test_a():\n    assert square(2) == 4\ndef test_b():\n    assert square(3) == 8"
    )
    assert code(SQUARE, pytest_style) == 0.0
    assert code(SQUARE, pytest_style, partial_credit=True) == 0.5


def test_preparations_come_before_their_test():
    tests = "import math\nx = 3\nassert square(x) == 9\nx = 4\nfor y in (1, x):\n    assert square(y) == math.pow(y, 2)"
    assert code(SQUARE, tests) == 1.0
    assert len(parse_tests(tests).tests) == 2


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert square(2) ==", "are not Python"),
        ("(" * 1000, "are not Python"),
        ("square(2)\x00", "are not Python"),
        ("square(2)", "test nothing"),
        ("def helper():\n    assert square(2) == 4", "test nothing"),
        (["x = 1"], "test nothing"),
        ("", "test nothing"),
        ("[1, 2", "start as JSON does and are not"),
        ("[1, 2]", "are not text with asserts"),
        ([], "are not text with asserts"),
        (None, "are not text with asserts"),
        (3, "are not text with asserts"),
        (["assert True", {"input": "1", "output": "1"}], "are not text with asserts"),
        ({"inputs": [], "outputs": []}, "there is no test"),
        ({"inputs": ["1"], "outputs": []}, "of one length"),
        ({"inputs": "1", "outputs": "1"}, "of one length"),
        ({"inputs": ["1"]}, "of one length"),
        ({"fn_name": "f", "inputs": [], "outputs": []}, "have no input"),
        ({"fn_name": "f(", "inputs": [[1]], "outputs": [1]}, "or no name of a function"),
        ({"fn_name": "f", "inputs": ["not JSON"], "outputs": ["1"]}, "does not hold arguments and a result"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "does not hold arguments and a result"),
        ([{"input": "1"}], "needs text as its 'output', not None"),
        ([{"input": 1, "output": "1"}], "needs text as its 'input', not 1"),
        ([{"input": "[1]", "output": "1", "testtype": "functional"}], "calls a function; write"),
    ],
)
def test_unreadable_tests_are_bad_gold_with_the_reason(tests, reason):
    with pytest.raises(BadGoldError, match=reason):
        code.parse_gold(tests)


def test_parsed_tests_can_be_pickled():
    for tests, kind in ((MBPP, Asserts), (PAIRS, Pairs)):
        parsed = pickle.loads(pickle.dumps(code.parse_gold(tests)))
        assert isinstance(parsed, kind)
        assert code.judge(SQUARE if kind is Asserts else SQUARE_INPUT, parsed) == 1.0


def test_options_and_columns():
    reward = get_reward({"name": "code", "timeout": 1.0, "partial_credit": True})
    assert reward.columns == ("tests",) and "entry_point" in reward.optional_columns
    with pytest.raises(ValueError, match="timeout=0 is too little"):
        code(SQUARE, MBPP, timeout=0)
    with pytest.raises(ValueError, match="memory_mb=8 is too little"):
        code(SQUARE, MBPP, memory_mb=8)
    with pytest.raises(ValueError, match="isolation='some' is none of 'full', 'limits', 'none'"):
        code(SQUARE, MBPP, isolation="some")
    with pytest.raises(ValueError, match=r"the preamble 'x = 1' must be imports .*: 'x = 1' is no import"):
        code(SQUARE, MBPP, preamble="x = 1")


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit in the function": "def square(x):\n    raise SystemExit(0)",
    "hard exit": "import os; os._exit(0)",
    "hard exit in the function": "import os\ndef square(x):\n    os._exit(0)",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)",
    "exit in a thread": "import os, threading as t\nt.Timer(0.05, os._exit, [0]).start()\ndef square(x): exec('while 1: 1')",
    "printing": "print('ok\\nPASSED\\n1.0')",
    "exec": "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = lambda *a, **k: None",
    "exec by its other name": "__builtins__.exec = __builtins__.compile = lambda *a, **k: None",
    "AssertionError": "import builtins\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})",
    "BaseException": "import builtins\nbuiltins.BaseException = builtins.SystemExit = AssertionError",
    "read and write": "import os\nos.read = os.write = os.pread = lambda *a: b''",
    "marshal": "import marshal\nmarshal.loads = lambda data: ([], False)",
    "excepthook": "import os, sys\nsys.excepthook = sys.__excepthook__ = lambda *a: os._exit(0)",
    "fork": "import os\nos.fork() and os._exit(0)\ndef square(x): return 1",
    "always equal": "class A:\n    def __eq__(self, other): return True\ndef square(x): return A()",
    "always equal inside": "class A:\n    def __eq__(self, other): return True\n    def __hash__(self): return 4\n"
    "def square(x): return [A()]",
    "equal by its class": "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\n"
    "class square(metaclass=M):\n    def __new__(cls, x): return cls",
    "equal integer": "class A(int):\n    __eq__ = int.__ne__\ndef square(x): return A(7)",
    "mock": "from unittest.mock import ANY\ndef square(x): return ANY",
    "len": "import builtins\nbuiltins.len = lambda x: 4\ndef square(x): return []",
    "stdin": "import sys\nprint(sys.stdin.read())",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_cannot_pass_by_a_simple_trick(cheat):
    tests = ["assert square(2) == 4", "assert [4] == square(2)", "assert square(2) in (4, 5)", "assert len(square(2)) == 4"]
    assert code(fenced(CHEATS[cheat]), tests, timeout=1.0, partial_credit=True) == 0.0


def test_honest_objects_are_compared_as_ever():
    program = """
        from collections import Counter, OrderedDict, deque, namedtuple
        from dataclasses import dataclass
        from fractions import Fraction
        Pair = namedtuple("Pair", "a b")
        @dataclass
        class Point:
            x: int
        class Other:
            def __eq__(self, other): return isinstance(other, Other)
        """
    tests = [
        "assert Pair(1, 2) == (1, 2)",
        "assert Counter('aab') == {'a': 2, 'b': 1}",
        "assert OrderedDict(a=1) == {'a': 1}",
        "assert deque([1]) == deque([1])",
        "assert Fraction(1, 2) == 0.5",
        "assert Point(1) == Point(1) and not Point(1) == Point(2)",
        "assert Other() == Other() and Other() in [Other()]",
        "assert [Point(1)] == [Point(1)]",
        "assert 1 == 1.0 and 2 in {2: 3} and 'a' in 'abc' and float('nan') != float('nan')",
        "x = []; x.append(x)\nassert x == x",
        "assert list(range(10**6)) == list(range(10**6))",
        "class Mine:\n    def __eq__(self, other): return other == 1\nassert Mine() == 1",
        "assert 1 < 2 == 2",
    ]
    assert code(fenced(textwrap.dedent(program)), tests, partial_credit=True) == 1.0


def test_pairs_need_the_words_and_status_0():
    one = [{"input": "", "output": "1 2\n3\n"}]
    assert code(fenced("print(1, 2, 3)"), one) == 1.0
    assert code(fenced("print(1, 2)\nprint(3)\nprint()"), one) == 1.0
    assert code(fenced("print(12, 3)"), one) == 0.0
    assert code(fenced("print(1, 2, 3, 4)"), one) == 0.0
    assert code(fenced("print(1, 2, 3)\nraise ValueError"), one) == 0.0
    assert code(fenced("print(1, 2, 3)\nimport sys; sys.exit(2)"), one) == 0.0
    assert code(fenced("print(1, 2, 3)\nimport sys; sys.exit()"), one) == 1.0
    assert code(fenced("print(1, 2, 3"), one) == 0.0


def test_a_slow_pair_ends_the_row():
    program = fenced("x = int(input())\nwhile x == 2: pass\nprint(x)")
    pairs = [{"input": str(x), "output": str(x)} for x in (1, 2, 2, 2, 2, 3)]
    assert code(program, pairs, timeout=0.5, partial_credit=True) == pytest.approx(1 / 6)


@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_all_inputs_together_have_a_deadline(seconds):
    program = fenced("import time; time.sleep(0.3); print(input())")
    before, started = threading.active_count(), time.monotonic()
    share = code(program, [{"input": "a", "output": "a"}] * 200, total_timeout=seconds, partial_credit=True)
    assert share < 1 and time.monotonic() - started < 30
    assert threading.active_count() == before


def test_a_script_runs_as_python_runs_it():
    program = """
import atexit, os, sys, threading, tempfile
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals() and __builtins__.len is len
def f(x: int): pass
assert f.__annotations__ == {"x": int}
threading.Timer(0.01, lambda: print("thread")).start()
atexit.register(print, "exit")
assert os.listdir(".") == [] and os.getcwd() == os.environ["HOME"] == tempfile.gettempdir()
open("file", "w").write("x")
print(input().strip(), sys.stdin.read().strip(), end=" ")
print("é", file=sys.stderr)
"""
    with Sandbox(program) as box:
        for given in ("a\nb é", "c\n"):
            result = box.run(given)
            assert (result.status, result.stderr) == ("ok", "é\n"), result
            assert result.stdout.split() == [*given.split(), "thread", "exit"]


def test_what_a_run_reports():
    with Sandbox("print('out')\nraise ValueError('why')") as box:
        result = box.run()
    assert (result.status, result.returncode, result.stdout, result.passed) == ("failed", 1, "out\n", ())
    assert result.stderr.endswith("ValueError: why\n") and 0 < result.seconds < 5
    tests = [([compile(f"assert f({x}) == 1", "<tests>", "exec")], ["f"]) for x in (1, 2, 1)]
    program = "def f(x):\n    return x"
    assert examine(program, tests, keep_going=True).passed == (True, False, True)
    result = examine(program, tests)
    assert (result.status, result.passed) == ("failed", (True, False, False)) and "AssertionError" in result.stderr
    assert examine(program, tests[:1]).status == "ok"


@pytest.mark.parametrize(
    ("program", "status"),
    [("import sys; sys.exit(99)", "failed"), ("raise MemoryError", "memory"), ("exit(3)", "failed"), ("quit()", "ok")],
)
def test_how_a_program_ends(program, status):
    with Sandbox(program) as box:
        assert box.run().status == status


def test_several_blocks_and_names_that_nobody_imports():
    use = "```python\ndef square(x):\n    return x * x\n```\nTo use it:\n```python\nprint(square(3))\n```"
    assert code(use, MBPP) == 1.0
    solution = "class Solution:\n    def least(self, x: List[int]) -> int:\n        return heapq.nsmallest(1, x)[0]"
    assert code(fenced(solution), "assert Solution().least([3, 1]) == 1") == 1.0
    assert code(fenced(solution), "assert Solution().least([3, 1]) == 1", preamble="import heapq") == 0.0
    assert code(fenced("print(gcd(4, 6), Counter('a')['a'])"), [{"input": "", "output": "2 1"}]) == 1.0


def test_numbers_within_a_tolerance():
    third = [{"input": "", "output": "0.333333 ok"}]
    program = fenced("print(1/3, 'ok')")
    assert code(program, third) == 0.0
    assert code(program, third, tolerance=1e-5) == 1.0
    assert code(program, [{"input": "", "output": "0.34 ok"}], tolerance=1e-5) == 0.0
    assert code(program, [{"input": "", "output": "0.333333 no"}], tolerance=1e-5) == 0.0


def test_sets_of_text_have_one_order_in_every_run():
    orders = set()
    for _ in range(3):
        with Sandbox("print({str(i) for i in range(50)})") as box:
            orders.add(box.run().stdout)
    assert len(orders) == 1


def test_what_is_thought_is_not_run() -> None:
    thought = f"<think>\n{fenced('def f(x): return x * x')}\n</think>\n"
    assert code(thought + fenced("def f(x): return x"), "assert f(2) == 4") == 0.0
    assert code(thought + "no code", "assert f(2) == 4") == NO_ANSWER
    assert code(thought + "no code", "assert f(2) == 4", scope="whole") == 1.0
