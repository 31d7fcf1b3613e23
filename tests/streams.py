"""An engine with canned answers, and rollout streams over it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from grpo_hf.rewards import Scorer, get_rewards
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.prompts import PromptOrder, load_prompts
from grpo_hf.rollout.stream import GroupSampler, Rollout, RolloutStream
from grpo_hf.types import Completion
from tests.tiny_models import tiny_tokenizer

STOP = 90
SAMPLING = Sampling(max_completion_length=3, stop_token_ids=(STOP,))
Answer = Callable[[list[int], int, int], list[int]]
"""(prompt, its seed, number of the completion) -> the completion's ids."""


class FakeEngine:
    """Answers as it is told to, its groups in any order, and remembers what it was asked."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.synced: list[int] = []
        """The version of each sync."""
        self.asked: list[list[int]] = []
        """The first token of each prompt, by round of sampling."""
        self.seeds: list[list[int]] = []
        self.answered = 0
        """Groups."""

    def sync_weights(self, version: int) -> None:
        self.synced.append(version)

    @contextmanager
    def requests(self, sampling: Sampling) -> Iterator[FakeRequests]:
        self.asked.append([])
        self.seeds.append([])
        yield FakeRequests(self)

    def abort(self) -> None:
        """Nothing to give up."""


class FakeRequests:
    """The last that was asked for is answered first, one at a time."""

    patience = 0.0

    def __init__(self, engine: FakeEngine):
        self.engine, self.waiting = engine, []

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        self.engine.asked[-1].append(ids[0])
        self.engine.seeds[-1].append(seed)
        self.waiting.append((key, ids, seed, count))

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        key, ids, seed, count = self.waiting.pop()
        self.engine.answered += 1
        return [(key, [Completion(self.engine.answer(ids, seed, n), truncated=False) for n in range(count)])]


def make_stream(
    prompts: list[str], reward: Callable[..., float], engine: Any, *, prompts_per_rollout: int = 2, **options: Any
) -> RolloutStream:
    """A stream of groups of four."""
    tokenizer = tiny_tokenizer()
    return RolloutStream(
        prompts=load_prompts([{"prompt": prompt} for prompt in prompts], tokenizer),
        order=PromptOrder(len(prompts), prompts_per_rollout, seed=0),
        sampler=GroupSampler(engine, tokenizer, Scorer(get_rewards(reward))),
        sampling=SAMPLING,
        num_generations=4,
        **options,
    )


def shown(rollout: Rollout) -> tuple[int, list[tuple[int, list[list[int]]]]]:
    """What identifies a rollout: its number, and of each group the prompt and the completions' ids."""
    return rollout.index, [(group.prompt.index, [item.ids for item in group.completions]) for group in rollout.groups]
