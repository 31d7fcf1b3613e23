"""The imports that LeetCode and LiveCodeBench put before a program, so that `List` or `deque` need none."""

from __future__ import annotations

import ast
import functools
import importlib

from grpo_hf.isolation.job import Preamble

LEETCODE = """
from string import *
from operator import *
from random import *
from statistics import *
from itertools import *
from functools import *
from math import *
from bisect import *
from heapq import *
from collections import *
from datetime import *
from copy import *
from re import *
from typing import *
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math
import operator, random, re, statistics, string, sys
"""


@functools.cache
def imported_names(preamble: str) -> Preamble:
    """For each name that imports define, the module that has it and its name there (None: it is the module).

    >>> imported_names("import math\\nfrom collections import deque as d")
    {'math': ('math', None), 'd': ('collections', 'deque')}

    Raises:
        ValueError: it is not made of imports of the standard library alone.
    """
    names: dict[str, tuple[str, str | None]] = {}
    try:
        for statement in ast.parse(preamble).body:
            if isinstance(statement, ast.Import):
                names |= {alias.asname or alias.name: (alias.name, None) for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                for alias in statement.names:
                    found = _public(statement.module) if alias.name == "*" else [alias.name]
                    names |= {alias.asname or name: (statement.module, name) for name in found}
            else:
                raise ValueError(f"{ast.unparse(statement)!r} is no import")
    except (SyntaxError, ImportError, ValueError) as error:
        raise ValueError(f"the preamble {preamble!r} must be imports of the standard library: {error}") from error
    return names


def _public(module: str) -> list[str]:
    """What `from module import *` gives."""
    loaded = importlib.import_module(module)
    return list(getattr(loaded, "__all__", None) or (name for name in vars(loaded) if not name.startswith("_")))


LIBRARY_CLASSES = {
    name: place
    for name, place in imported_names(LEETCODE).items()
    if place[0] == "collections" or (place[0] == "typing" and name[0].isupper())
}
"""What tests may use without an import, as no function of a program is called so."""
