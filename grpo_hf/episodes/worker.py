"""Tools and an environment inside a process of theirs. Light to import.

Answers are built of plain types and bytes only; each also says whether its process is spent.
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

from grpo_hf.episodes.answers import Answer, answered, observation_of, raised, text_of
from grpo_hf.isolation.inside import described, guarded, sent
from grpo_hf.isolation.parcel import parcel_of
from grpo_hf.rewards.verdict import failed, judged

LARGEST = 16 * 2**20
"""Bytes of a packed environment; a rollout has hundreds."""
Score = tuple[str, float, float, str]
"""A verdict's outcome, score, seconds and message."""
_ENVIRONMENT = "environment"


# ---- Functions


def call(slot: str, arguments: bytes, seed: int, limit: int) -> tuple[Answer, bool]:
    """Call a function."""

    def work() -> Answer:
        keywords = pickle.loads(arguments)
        seed_generators(seed)
        return answered(lambda: finished(sent[slot](**keywords)), lambda result: text_of(result, limit))

    answer, spent = guarded(work, raised)
    return answer, spent or answer[0] == "crash"


# ---- An environment; what it leaves behind is its own affair until its process ends


def class_of(slot: str) -> tuple[tuple[str, str, str], bool]:
    """Make an environment and say the module and the name of its class, or why that fails."""

    def work() -> tuple[str, str, str]:
        made = type(sent[slot]())
        return made.__module__, made.__qualname__, ""

    return guarded(work, lambda error, _: ("", "", described(error)))[0], True


def open_environment(slot: str, row: bytes, seed: int, limit: int) -> tuple[Answer, bool]:
    """Make an environment and reset it."""

    def work() -> Answer:
        columns = pickle.loads(row)
        seed_generators(seed)
        sent[_ENVIRONMENT] = environment = sent[slot]()
        return answered(lambda: finished(environment.reset(**columns)), lambda result: observation_of(result, limit))

    return _lives_on(guarded(work, raised)[0])


def call_method(name: str, arguments: bytes, seed: int, limit: int) -> tuple[Answer, bool]:
    """Call a method of the environment."""

    def work() -> Answer:
        keywords = pickle.loads(arguments)
        seed_generators(seed)
        method = getattr(sent[_ENVIRONMENT], name)
        return answered(lambda: finished(method(**keywords)), lambda result: text_of(result, limit))

    return _lives_on(guarded(work, raised)[0])


def reward(name: str) -> tuple[Score, bool]:
    """Ask the environment for its reward; ``name`` is what errors call it."""
    verdict, _ = guarded(
        lambda: judged(name, lambda: finished(sent[_ENVIRONMENT].get_reward()), caught=BaseException), failed
    )
    return (verdict.outcome, verdict.score, verdict.seconds, verdict.message), False


def packed_environment() -> tuple[tuple[bytes, str], bool]:
    """The environment as bytes, or why there are none."""

    def work() -> tuple[bytes, str]:
        blob = parcel_of(sent[_ENVIRONMENT]).blob
        if len(blob) > LARGEST:
            return (
                b"",
                f"it packs into {len(blob):,} bytes, and {LARGEST:,} are allowed; leave some out in __getstate__",
            )
        return blob, ""

    found, _ = guarded(work, lambda error, _: (b"", described(error)))
    return found, False


def _lives_on(answer: Answer) -> tuple[Answer, bool]:
    return answer, answer[0] == "crash"


def finished(result: Any) -> Any:
    """What a call returned, awaited where it is to be; all awaiting in a process is done on one event loop."""
    return _event_loop().run_until_complete(result) if inspect.isawaitable(result) else result


@functools.cache
def _event_loop() -> Any:
    import asyncio  # only where something is awaited

    return asyncio.new_event_loop()


# ---- Random numbers

_SEEDERS: dict[str, Callable[[Any, int], Any]] = {
    "numpy": lambda numpy, seed: numpy.random.seed(seed % 2**32),
    "torch": lambda torch, seed: torch.manual_seed(seed % 2**63),
}


def seed_generators(seed: int) -> None:
    """Seed the global generators of `random`, numpy and torch; where one is not imported yet, as soon as it is."""
    random.seed(seed)
    for name, seeder in _SEEDERS.items():
        if name in sys.modules:
            seeder(sys.modules[name], seed)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Seeds)]
    sys.meta_path.insert(0, _Seeds(seed))


class _Seeds:
    """Finds the modules that have a global generator, and seeds it once they are loaded."""

    def __init__(self, seed: int):
        self.seed = seed

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in _SEEDERS else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_seed(module: Any) -> None:
                load(module)
                _SEEDERS[name](module, self.seed)

            spec.loader.exec_module = load_and_seed  # type: ignore[method-assign]
        return spec
