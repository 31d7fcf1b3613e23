"""A user's mistake is one message, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MISTAKES = (ValueError, OSError, ImportError)
"""What is raised for bad input: a wrong value, a file or name that is not there, a package that is not installed."""


@contextmanager
def as_sentences(arguments: list[str]) -> Iterator[None]:
    """End the process with the message of a mistake; `--traceback`, which is taken out of the arguments, lets it through."""
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        yield
        return
    try:
        yield
    except MISTAKES as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}\n(--traceback shows where in the code)", file=sys.stderr)
        raise SystemExit(2) from None
