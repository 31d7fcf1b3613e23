"""One call of a verifier: what it is called with, and how what it returned or raised becomes a verdict."""

from __future__ import annotations

import math
import numbers
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_hf.isolation.inside import described
from grpo_hf.rewards.outcomes import BadGoldError, NoAnswer
from grpo_hf.rewards.signature import BUILT_INS, Reward
from grpo_hf.types import Completion, Prompt, Sample


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

    def keywords(self, reward: Reward, trainer_state: Any = None) -> dict[str, Any]:
        """What the trainer says to a verifier beside its sample, as far as it accepts it."""
        known = {"log_metric": self.log_metric, "log_extra": self.log_extra, "trainer_state": trainer_state}
        return {key: value for key, value in known.items() if reward.accepts(key)}


@dataclass
class BatchLogged(Logged):
    """Columns of a batch: log_extra adds to a list, one value for each sample in the end, as in TRL."""

    count: int = 0

    def log_extra(self, column: str, value: Any) -> None:
        """Add values to a column."""
        self.extra.setdefault(column, []).extend(value)

    def by_sample(self) -> list[Logged]:
        """Each sample's own values, and the metrics with the first.

        Raises:
            ValueError: a column has more or fewer values than there are samples.
        """
        for column, values in self.extra.items():
            if len(values) != self.count:
                raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {self.count} completions")
        own = [Logged(extra={name: values[n] for name, values in self.extra.items()}) for n in range(self.count)]
        own[0].metrics = self.metrics
        return own


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


Caught = type[BaseException] | tuple[type[BaseException], ...]


def judged(name: str, call: Callable[[], Any], *, caught: Caught = Exception) -> Verdict:
    """Call a verifier on one sample."""
    start = time.perf_counter()
    try:
        value = call()
        score = checked_score(name, value)
    except caught as error:
        return failed(error, time.perf_counter() - start)
    return Verdict("no_answer" if isinstance(value, NoAnswer) else "scored", score, time.perf_counter() - start)


def judged_batch(
    name: str, call: Callable[[], Any], logged: BatchLogged, start: float, *, caught: Caught = Exception
) -> list[Verdict]:
    """Call a verifier on all samples; where the call raises, the verdict is the same for all."""
    try:
        values = checked_list(name, call(), logged.count)
        own = logged.by_sample()
    except caught as error:
        return [failed(error, (time.perf_counter() - start) / logged.count)] * logged.count
    seconds = (time.perf_counter() - start) / logged.count
    return [
        replace(judged(name, lambda value=value: value, caught=caught), seconds=seconds, logged=mine)  # type: ignore[misc]
        for value, mine in zip(values, own, strict=True)
    ]


def failed(error: BaseException, seconds: float, outcome: str | None = None) -> Verdict:
    """The verdict on a call that raised."""
    if outcome is None:
        kinds = {BadGoldError: "bad_gold", MemoryError: "crash"}
        outcome = next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")
    return Verdict(outcome, seconds=seconds, message=described(error))


def checked_score(name: str, value: Any) -> float:
    """Turn what a verifier returned for a sample into a float; None becomes NaN.

    Raises:
        ValueError: it is not a number, or NaN or infinite.
    """
    if value is None:
        return math.nan
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, numbers.Real):
        raise ValueError(
            f"the verifier {name!r} returned {shown(value)} for a sample; expected a number, or None where it does not apply"
        )
    largest: Any = sys.float_info.max
    if not abs(plain) <= largest:
        raise ValueError(
            f"the verifier {name!r} returned {shown(value)}; expected a finite number, or None where it does not apply"
        )
    return float(plain)


def checked_list(name: str, scores: Any, count: int) -> Sequence[Any]:
    """What a batch verifier returned, if it is one score a completion.

    Raises:
        ValueError: it is not a list, or of another length.
    """
    listed = isinstance(scores, Sequence) and not isinstance(scores, str | bytes)
    if not (listed or getattr(scores, "ndim", None) == 1):
        raise ValueError(f"the verifier {name!r} returned {shown(scores)}; expected a list of {count} numbers")
    if len(scores) != count:
        raise ValueError(
            f"the verifier {name!r} returned {len(scores)} scores for {count} completions: {shown(scores)};"
            " expected one each"
        )
    return scores


def shown(value: Any) -> str:
    """A short repr on one line, with the type."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to write it out
        return f"a number of {value.bit_length():,} bits ({type(value).__name__})"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def sample_of(prompt: Prompt, completion: Completion) -> Sample:
    """Show a completion as a verifier sees it, in TRL's form for chat prompts."""
    chat = [{"role": "assistant", "content": completion.text}] if completion.messages is None else completion.messages
    return Sample(
        prompt=prompt.raw if completion.prompt_messages is None else completion.prompt_messages,
        completion=completion.text if isinstance(prompt.raw, str) else chat,
        text=completion.text,
        completion_ids=completion.ids,
        row=prompt.row | completion.columns if completion.columns else prompt.row,
        environment=completion.environment,
    )


@dataclass(frozen=True)
class Packed:
    """An environment, pickled, which arrives unpacked in the process that it is sent to."""

    blob: bytes
    """It; empty where it could not be pickled."""
    message: str = ""
    """Why not."""

    def unpack(self) -> Any:
        """The environment. Raises ValueError where there is none."""
        if not self.blob:
            raise ValueError(f"the environment cannot be shown to verifiers: {self.message}")
        return pickle.loads(self.blob)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.blob, self.message)


def _unpack(blob: bytes, message: str) -> Any:
    return Packed(blob, message).unpack()


def unpacked(keywords: dict[str, Any]) -> dict[str, Any]:
    """The same with environments as they are, for a verifier that is called here."""
    found = dict(keywords)
    if "environment" in found:
        found["environment"] = found["environment"].unpack()
    if "environments" in found:
        found["environments"] = [item.unpack() for item in found["environments"]]
    return found


def packed_environment(sample: Sample) -> Packed:
    """The sample's environment, as it is sent to verifiers."""
    ended = sample.environment
    return Packed(ended.environment, ended.message) if ended else Packed(b"", "its episode has none")


def sample_keywords(reward: Reward, sample: Sample) -> dict[str, Any]:
    """What a per-sample verifier accepts of what can be said of one sample."""
    columns = {key: value for key, value in sample.row.items() if key not in BUILT_INS}
    known = columns | {"prompt": sample.prompt, "completion": sample.text, "completion_ids": sample.completion_ids}
    known |= {"messages": sample.completion if isinstance(sample.completion, list) else None}
    if "environment" in reward.built_ins:
        known["environment"] = packed_environment(sample)
    return {key: value for key, value in known.items() if reward.accepts(key)}


def batch_keywords(reward: Reward, samples: Sequence[Sample]) -> dict[str, Any]:
    """The same of a batch, as TRL calls it: a list for each keyword."""
    columns = [key for key in samples[0].row if key not in BUILT_INS and reward.accepts(key)]
    known = {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.completion for sample in samples],
        "completion_ids": [sample.completion_ids for sample in samples],
    }
    environments = [packed_environment(sample) for sample in samples] if reward.takes_environments else []
    if "environments" in reward.built_ins or all(item.blob for item in environments):  # who asks is told why there is none
        known["environments"] = environments
    listed = {key: [sample.row[key] for sample in samples] for key in columns}
    return listed | {key: value for key, value in known.items() if reward.accepts(key)}
