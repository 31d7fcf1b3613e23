"""Calling a verifier directly, in this process: for tests of one, and for looking into it with a debugger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from grpo_hf.rewards.calls import asked_for, checked_list
from grpo_hf.rewards.judging import Logged, checked_score
from grpo_hf.rewards.registry import check_columns
from grpo_hf.rewards.samples import batch_keywords, sample_keywords
from grpo_hf.rewards.signature import Reward
from grpo_hf.types import Sample

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
    them. The calls of an async function run concurrently. An exception propagates with the verifier's name as a note:
    outcomes, deadlines and memory limits are `score_samples`'s.

    Raises:
        ValueError: a column is missing, or the verifier returned a wrong number of scores, something that is not a
            number, or an infinite value.
    """
    if not samples:
        return []
    check_columns([reward], samples[0].row)
    logs = {"log_extra": log_extra, "log_metric": log_metric}
    shared = asked_for(reward, Logged(), trainer_state)
    shared |= {key: log for key, log in logs.items() if log is not None and key in shared}
    if reward.per_sample:
        calls = [shared | sample_keywords(reward, sample) for sample in samples]
    else:
        calls = [shared | batch_keywords(reward, samples)]
    results = _run(_call_async(reward, calls)) if reward.is_async else _call(reward, calls)
    scores = results if reward.per_sample else checked_list(reward.name, results[0], len(samples))
    return [checked_score(reward.name, value) for value in scores]


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
