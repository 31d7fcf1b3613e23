"""How a call of a verifier can end, and what a verifier says it with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

OUTCOMES = ("scored", "no_answer", "timeout", "crash", "error", "bad_gold")
"""scored: it returned a number, or None where it does not apply. no_answer: it found nothing to judge. timeout: it ran past
its deadline. crash: its process died or took too much memory. error: it raised. bad_gold: the dataset's own answer cannot
be read."""

FAULTS = ("timeout", "crash", "error", "bad_gold")
"""Outcomes that say nothing about the completion."""


class NoAnswer(float):
    """A score that also says that the completion held no answer to judge; elsewhere it is a plain float."""


NO_ANSWER = NoAnswer(0.0)
"""What a verifier returns for a completion without an answer."""


class BadGoldError(ValueError):
    """The dataset's own answer cannot be read, so no completion can be judged by it."""


def parses_gold(parse: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a verifier of a function that judges by an answer in parsed form.

    ``parse`` turns the dataset's column of its one parameter's name into that form, or raises BadGoldError. Called by hand
    the verifier parses at every call; scoring parses once a prompt and then calls ``judge``, and checks a dataset by
    ``parse_gold`` alone.

    >>> def number(answer): return int(answer)
    >>> @parses_gold(number)
    ... def equals(completion, answer): return float(int(completion) == answer)
    >>> equals("7", answer="7"), equals.judge("7", answer=7), equals.gold_column
    (1.0, 1.0, 'answer')
    """
    (column,) = inspect.signature(parse).parameters

    def decorate(judge: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(judge)

        @functools.wraps(judge)
        def verifier(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.arguments[column] = parse(bound.arguments[column])
            return judge(*bound.args, **bound.kwargs)

        verifier.judge, verifier.parse_gold, verifier.gold_column = judge, parse, column  # type: ignore[attr-defined]
        return verifier

    return decorate
