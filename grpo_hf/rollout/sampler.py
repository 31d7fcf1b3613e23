"""Prompts -> sampled, decoded and scored groups; the same for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Reward, score_group_rewards
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.types import Group, Prompt


@dataclass
class GroupSampler:
    """An engine, a tokenizer and verifiers, put together."""

    engine: Engine
    """Samples token ids."""
    tokenizer: PreTrainedTokenizerBase
    """Decodes them for the verifiers."""
    rewards: list[Reward]
    """The verifiers."""
    reward_weights: list[float]
    """One a verifier."""
    metrics: Metrics = field(default_factory=Metrics)
    """Where the times go."""
    trainer_state: Callable[[], Any] = lambda: None
    """Gives what verifiers that ask for it are handed: Trainer makes a new state when training starts."""

    def sample(self, prompts: list[Prompt], seeds: list[list[int]], sampling: Sampling) -> list[Group]:
        """One scored group a prompt, with one completion for each of its seeds."""
        groups = [Group(prompt, []) for prompt in prompts]
        with self.metrics.phase("generate"):
            for number, completions in self.engine.sample([prompt.ids for prompt in prompts], seeds, sampling):
                texts = self.tokenizer.batch_decode([item.ids for item in completions], skip_special_tokens=True)
                for completion, text in zip(completions, texts, strict=True):
                    completion.text = text
                groups[number].completions = completions
        with self.metrics.phase("score"):
            score_group_rewards(
                self.rewards,
                self.reward_weights,
                groups,
                trainer_state=self.trainer_state(),
                log_metric=lambda name, value: self.metrics.mean(name, value),
            )
        return groups
