"""An engine with canned answers, and rollout streams over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def sync_weights(self, version: int) -> None:
        self.synced.append(version)

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.asked.append([ids[0] for ids in prompts])
        self.seeds.append(seeds)
        for number in reversed(range(len(prompts))):
            answers = (self.answer(prompts[number], seeds[number], n) for n in range(num_generations))
            yield number, [Completion(ids, truncated=False) for ids in answers]

    def abort(self) -> None:
        """Nothing to give up."""


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
