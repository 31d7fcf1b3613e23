"""Verifiers inside a worker process: what it is sent, and their calls. Light to import.

Answers are built of plain types and bytes only, so that whatever a verifier returns, the answer can be sent.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable
from typing import Any

import cloudpickle

from grpo_hf.isolation.inside import guarded, sent
from grpo_hf.isolation.parcel import Parcel, parcel_of
from grpo_hf.rewards.signature import Reward, judge_of, parser_of
from grpo_hf.rewards.verdict import BatchLogged, Logged, Verdict, failed, judged, judged_batch

Answer = tuple[str, float, float, str, bytes]
"""A verdict's outcome, score, seconds and message; pickled: what it logged, or the parsed gold answer."""


def verifier_parcel(reward: Reward) -> Parcel:
    """Pack a verifier, by reference where workers can import it, else by value.

    Raises:
        ValueError: it holds something that cannot be sent to another process.
    """
    try:
        return parcel_of(reward)
    except Exception as error:
        raise ValueError(
            f"the verifier {reward.name!r} cannot be sent to worker processes: {error}. Let it make what it holds when it is"
            " called, or register it with in_process=True, which goes without a deadline and a memory limit"
        ) from error


_states = itertools.count()


def state_parcel(state: Any) -> Parcel:
    """Pack the trainer's state as it is now."""
    return Parcel("trainer_state", str(next(_states)), cloudpickle.dumps(state))


# ---- What is done there; each also says whether its worker is spent


def call(slot: str, arguments: bytes, gold: bytes | None, more: list[str]) -> tuple[Answer, bool]:
    """Judge one sample."""

    def judge() -> list[tuple[Verdict, bytes]]:
        reward: Reward = sent[slot]
        logged = Logged()
        keywords = pickle.loads(arguments) | logged.keywords(reward) | {name: sent[name] for name in more}
        function = reward.function
        if gold is not None:
            keywords[str(reward.gold_column)], function = pickle.loads(gold), judge_of(reward.function)
        verdict = judged(reward.name, lambda: function(**keywords), caught=BaseException)
        return [(verdict, _packed(logged))]

    answers, spent = _answers(judge)
    return answers[0], spent


def batch(slot: str, arguments: bytes, count: int, more: list[str]) -> tuple[list[Answer], bool]:
    """Judge all samples of a rollout; one answer where what it logged could not be sent."""

    def judge() -> list[tuple[Verdict, bytes]]:
        reward: Reward = sent[slot]
        logged = BatchLogged(count=count)
        keywords = pickle.loads(arguments) | logged.keywords(reward) | {name: sent[name] for name in more}
        start = time.perf_counter()
        verdicts = judged_batch(reward.name, lambda: reward.function(**keywords), logged, start, caught=BaseException)
        return [(verdict, _packed(verdict.logged)) for verdict in verdicts]

    return _answers(judge)


def parse_gold(slot: str, values: bytes) -> tuple[list[Answer], bool]:
    """Parse gold answers; each has an answer of its own."""
    reward: Reward = sent[slot]
    parse = parser_of(reward.function)

    def one(value: Any) -> Callable[[], list[tuple[Verdict, bytes]]]:
        return lambda: [(Verdict("scored"), cloudpickle.dumps(parse(value)))]

    found = [_answers(one(value)) for value in pickle.loads(values)]
    return [answer for answers, _ in found for answer in answers], any(spent for _, spent in found)


def _answers(work: Callable[[], list[tuple[Verdict, bytes]]]) -> tuple[list[Answer], bool]:
    found, spent = guarded(work, lambda error, seconds: [(failed(error, seconds), b"")])
    answers = [(verdict.outcome, verdict.score, verdict.seconds, verdict.message, blob) for verdict, blob in found]
    return answers, spent or any(verdict.outcome == "crash" for verdict, _ in found)


def _packed(logged: Logged) -> bytes:
    return cloudpickle.dumps(logged) if logged.metrics or logged.extra else b""
