"""Calling verifiers: samples in, one float per sample out, in this process."""

from __future__ import annotations

import asyncio
import math
import numbers
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from grpo_hf.rewards.registry import check_columns
from grpo_hf.rewards.signature import BUILT_INS, Reward
from grpo_hf.types import Completion, Group, Prompt, Sample

Log = Callable[..., None]


def score(
    reward: Reward,
    samples: list[Sample],
    *,
    trainer_state: Any = None,
    log_extra: Log | None = None,
    log_metric: Log | None = None,
) -> list[float]:
    """Score samples with one verifier: one float per sample, NaN where it returned None ("does not apply").

    A per-sample function is called once per sample with the completion as text; a batch function is called once, as
    TRL calls it, with a list for every column. Either gets only the keywords that it accepts; with `**kwargs`, all of
    them. The calls of an async function run concurrently. An exception propagates with the verifier's name as a note.

    Raises:
        ValueError: a column is missing, or the verifier returned a wrong number of scores, something that is not a
            number, or an infinite value.
    """
    if not samples:
        return []
    check_columns([reward], samples[0].row)
    shared = {
        "trainer_state": trainer_state,
        "log_extra": log_extra or _no_log,
        "log_metric": log_metric or _no_log,
    }
    if reward.per_sample:
        calls = [_sample_keywords(reward, sample) for sample in samples]
    else:
        calls = [_batch_keywords(reward, samples)]
    calls = [{key: value for key, value in (shared | call).items() if reward.accepts(key)} for call in calls]
    results = _run(_call_async(reward, calls)) if reward.is_async else _call(reward, calls)
    scores = results if reward.per_sample else _checked_list(reward, results[0], len(samples))
    return [_checked_float(reward, value) for value in scores]


def score_group_rewards(
    rewards: list[Reward],
    weights: list[float],
    groups: list[Group],
    *,
    trainer_state: Any = None,
    log_extra: Log | None = None,
    log_metric: Log | None = None,
) -> None:
    """Score every completion of the groups, in place.

    `completion.rewards[name]` is each verifier's score, and `completion.reward = Σ_k weight_k · score_k` over the
    scores that are not NaN; NaN when all are.

    Raises:
        ValueError: not one weight per reward, two rewards of one name, or what `score` raises.
    """
    names = [reward.name for reward in rewards]
    if len(weights) != len(rewards):
        raise ValueError(f"{len(weights)} reward weights for {len(rewards)} rewards ({', '.join(names)}); give one each")
    if len(set(names)) != len(names):
        raise ValueError(f"two rewards have one name: {', '.join(names)}; get_rewards gives them different ones")
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    samples = [_sample(prompt, completion) for prompt, completion in pairs]
    for reward in rewards:
        logs = {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        for (_, completion), value in zip(pairs, score(reward, samples, **logs), strict=True):
            completion.rewards[reward.name] = value
    for _, completion in pairs:
        scores = [completion.rewards[name] for name in names]
        terms = [w * s for w, s in zip(weights, scores, strict=True) if not math.isnan(s)]
        completion.reward = sum(terms) if terms else math.nan


def _sample(prompt: Prompt, completion: Completion) -> Sample:
    """Show a completion as a verifier sees it, in TRL's form for chat prompts."""
    chat = [{"role": "assistant", "content": completion.text}]
    return Sample(
        prompt=prompt.raw,
        completion=completion.text if isinstance(prompt.raw, str) else chat,
        text=completion.text,
        completion_ids=completion.ids,
        row=prompt.row,
    )


def _sample_keywords(reward: Reward, sample: Sample) -> dict[str, Any]:
    """Everything that can be said of one sample, by keyword."""
    columns = {key: value for key, value in sample.row.items() if key not in BUILT_INS}
    return columns | {
        "prompt": sample.prompt,
        "completion": sample.text,
        "completion_ids": sample.completion_ids,
    }


def _batch_keywords(reward: Reward, samples: list[Sample]) -> dict[str, Any]:
    """Everything that can be said of a batch, a list for each keyword."""
    columns = [key for key in samples[0].row if key not in BUILT_INS and reward.accepts(key)]
    return {key: [sample.row[key] for sample in samples] for key in columns} | {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.completion for sample in samples],
        "completion_ids": [sample.completion_ids for sample in samples],
    }


def _call(reward: Reward, calls: list[dict[str, Any]]) -> list[Any]:
    """Make the calls one after the other."""
    results = []
    for index, keywords in enumerate(calls):
        with _named(reward, index, len(calls)):
            results.append(reward.function(**keywords))
    return results


async def _call_async(reward: Reward, calls: list[dict[str, Any]]) -> list[Any]:
    """Make the calls concurrently; the first exception cancels the rest."""

    async def one(index: int, keywords: dict[str, Any]) -> Any:
        with _named(reward, index, len(calls)):
            return await reward.function(**keywords)

    return await asyncio.gather(*(one(index, keywords) for index, keywords in enumerate(calls)))


def _run(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """`asyncio.run`, in a thread of its own where this one already runs a loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


@contextmanager
def _named(reward: Reward, index: int, count: int) -> Iterator[None]:
    """Add the verifier's name to an exception on its way through."""
    try:
        yield
    except Exception as error:
        where = f" at sample {index + 1} of {count}" if reward.per_sample else ""
        error.add_note(f"raised by the verifier {reward.name!r}{where}")
        raise


def _checked_list(reward: Reward, scores: Any, count: int) -> Sequence[Any]:
    """Check that a batch verifier returned one score per completion."""
    listed = isinstance(scores, Sequence) and not isinstance(scores, str | bytes)
    if not (listed or getattr(scores, "ndim", None) == 1):
        raise ValueError(f"the verifier {reward.name!r} returned {_shown(scores)}; expected a list of {count} numbers")
    if len(scores) != count:
        raise ValueError(
            f"the verifier {reward.name!r} returned {len(scores)} scores for {count} completions: {_shown(scores)};"
            " expected one each"
        )
    return scores


def _checked_float(reward: Reward, value: Any) -> float:
    """Turn one score into a float; None becomes NaN."""
    if value is None:
        return math.nan
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, numbers.Real):
        raise ValueError(
            f"the verifier {reward.name!r} returned {_shown(value)} for a sample; expected a number,"
            " or None where it does not apply"
        )
    largest: Any = sys.float_info.max
    if abs(plain) > largest:
        raise ValueError(f"the verifier {reward.name!r} returned {_shown(value)}; expected a finite number")
    return float(plain)


def _shown(value: Any) -> str:
    """A short repr on one line, with the type."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _no_log(*args: Any, **kwargs: Any) -> None:
    """Stand in for `log_extra` and `log_metric` where the caller gave none."""
