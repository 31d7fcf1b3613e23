"""Prompts -> sampled, decoded and scored groups; the same for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_hf.algorithm.advantages import weighted_sum
from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Scorer
from grpo_hf.rewards.faults import Tally
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.types import Completion, Group, Prompt


@dataclass
class PendingGroups:
    """Groups that an engine has been asked for."""

    groups: list[Group]
    """Without completions as yet."""
    completions: Iterable[tuple[int, list[Completion]]]
    """See Engine.sample: the completions of groups by their number, as they finish."""

    def wait(self) -> None:
        """Until all completions are there, so that the engine may be given other weights."""
        self.completions = list(self.completions)


@dataclass
class GroupSampler:
    """An engine, a tokenizer and verifiers, put together."""

    engine: Engine
    """Samples token ids."""
    tokenizer: PreTrainedTokenizerBase
    """Decodes them for the verifiers."""
    scorer: Scorer
    """The verifiers, and what runs them."""
    metrics: Metrics = field(default_factory=Metrics)
    """Where the times go."""

    def sample(
        self,
        prompts: list[Prompt],
        seeds: list[int],
        num_generations: int,
        sampling: Sampling,
        *,
        trainer_state: Any = None,
    ) -> tuple[list[Group], Tally]:
        """One scored group a prompt, and how the verifiers' calls ended, which may ask for the trainer's state."""
        return self.finish(self.start(prompts, seeds, num_generations, sampling), trainer_state=trainer_state)

    def start(self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling) -> PendingGroups:
        """Ask the engine for groups; one that is elsewhere works on them from now on."""
        asked = self.engine.sample([prompt.ids for prompt in prompts], seeds, num_generations, sampling)
        return PendingGroups([Group(prompt, []) for prompt in prompts], asked)

    def finish(self, pending: PendingGroups, *, trainer_state: Any = None) -> tuple[list[Group], Tally]:
        """The groups, decoded; each is scored while others are still sampled, and "score" is the time left after that."""
        groups = pending.groups
        with self.scorer.round(trainer_state) as scoring:
            with self.metrics.phase("generate"):
                scoring.expect(group.prompt.row for group in groups)
                for number, completions in pending.completions:
                    texts = self.tokenizer.batch_decode([item.ids for item in completions], skip_special_tokens=True)
                    for completion, text in zip(completions, texts, strict=True):
                        completion.text = text
                    groups[number].completions = completions
                    scoring.add_group(number, groups[number])
            with self.metrics.phase("score"):
                tally = self.scorer.settle(groups, list(scoring.verdicts()), self.metrics.mean)
        set_rewards(groups, self.scorer.weights)
        return groups, tally


def set_rewards(groups: Iterable[Group], weights: list[float]) -> None:
    """`completion.reward` = the weighted sum of its scores, which is what is logged and looked at."""
    completions = [item for group in groups for item in group.completions]
    if completions:
        scores = torch.tensor([[scores_of(item)] for item in completions], dtype=torch.float64)
        rewards = weighted_sum(scores, torch.tensor(weights, dtype=torch.float64))
        for completion, (reward,) in zip(completions, rewards.tolist(), strict=True):
            completion.reward = reward


def scores_of(completion: Completion) -> list[float]:
    """Its scores, in the order of the rewards; NaN where a verifier's outcome leaves the completion out."""
    return [score if completion.valid else math.nan for score in completion.rewards.values()]
