"""One call of a verifier, here or in a worker: what it returned or raised becomes a verdict. Needs no other package."""

from __future__ import annotations

import math
import numbers
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo_hf.rewards.outcomes import BadGoldError, NoAnswer

MESSAGE_CHARACTERS = 4000
"""The end of a longer traceback is kept, where the error is."""


@dataclass
class Logged:
    """Keeps what a verifier logs until its call has ended, so that nothing of a failed call is logged."""

    metrics: list[tuple[str, float]] = field(default_factory=list)
    """log_metric's name and value, by call."""
    extra: dict[str, Any] = field(default_factory=dict)
    """log_extra's value by column."""

    def log_metric(self, name: str, value: float) -> None:
        """Add to the mean of a metric."""
        self.metrics.append((name, float(value)))

    def log_extra(self, column: str, value: Any) -> None:
        """Set the sample's value of a column that is saved beside the completions."""
        self.extra[column] = value

    def keywords(self) -> dict[str, Any]:
        """The two, as verifiers take them."""
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}


@dataclass(frozen=True)
class Verdict:
    """How one call of a verifier ended."""

    outcome: str
    """One of OUTCOMES."""
    score: float = math.nan
    """NaN unless it ended as scored or no_answer, and where the verifier does not apply."""
    seconds: float = 0.0
    """From its start to its end."""
    message: str = ""
    """What went wrong, with the traceback where there is one."""
    logged: Logged = field(default_factory=Logged)
    """What the verifier has said with log_metric and log_extra."""


def judged(
    name: str,
    function: Callable[..., Any],
    keywords: dict[str, Any],
    *,
    caught: type[BaseException] | tuple[type[BaseException], ...] = Exception,
) -> Verdict:
    """Call a verifier on one sample."""
    start = time.perf_counter()
    try:
        value = function(**keywords)
        score = checked_score(name, value)
    except caught as error:
        return failed(error, time.perf_counter() - start)
    return Verdict("no_answer" if isinstance(value, NoAnswer) else "scored", score, time.perf_counter() - start)


def failed(error: BaseException, seconds: float, outcome: str | None = None) -> Verdict:
    """The verdict on a call that raised."""
    if outcome is None:
        kinds = {BadGoldError: "bad_gold", MemoryError: "crash"}
        outcome = next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, frames)).strip()
    return Verdict(outcome, seconds=seconds, message=text[-MESSAGE_CHARACTERS:])


def checked_score(name: str, value: Any) -> float:
    """Turn what a verifier returned for a sample into a float; None becomes NaN.

    Raises:
        ValueError: it is not a number, or infinite.
    """
    if value is None:
        return math.nan
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, numbers.Real):
        raise ValueError(
            f"the verifier {name!r} returned {shown(value)} for a sample; expected a number, or None where it does not apply"
        )
    largest: Any = sys.float_info.max
    if abs(plain) > largest:
        raise ValueError(f"the verifier {name!r} returned {shown(value)}; expected a finite number")
    return float(plain)


def shown(value: Any) -> str:
    """A short repr on one line, with the type."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to write it out
        return f"a number of {value.bit_length():,} bits ({type(value).__name__})"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
