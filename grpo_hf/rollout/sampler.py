"""Prompts -> sampled, decoded and scored groups; the same for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Scorer
from grpo_hf.rewards.faults import Tally
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.types import Completion, Group, Prompt


@dataclass
class Sampled:
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
    trainer_state: Callable[[], Any] = lambda: None
    """Gives what verifiers that ask for it are handed: Trainer makes a new state when training starts."""
    tally: Tally = field(default_factory=dict)
    """How the verifiers' calls of the last groups ended."""

    def sample(self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling) -> list[Group]:
        """One scored group a prompt."""
        return self.finish(self.start(prompts, seeds, num_generations, sampling))

    def start(self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling) -> Sampled:
        """Ask the engine for groups; one that is elsewhere works on them from now on."""
        ids = [prompt.ids for prompt in prompts]
        return Sampled([Group(prompt, []) for prompt in prompts], self.engine.sample(ids, seeds, num_generations, sampling))

    def finish(self, sampled: Sampled) -> list[Group]:
        """The groups, decoded, and scored from the moment that each is there; "score" is what is left of that at the end."""
        groups = sampled.groups
        with self.scorer.round(self.trainer_state()) as scoring:
            with self.metrics.phase("generate"):
                scoring.expect(group.prompt.row for group in groups)
                for number, completions in sampled.completions:
                    texts = self.tokenizer.batch_decode([item.ids for item in completions], skip_special_tokens=True)
                    for completion, text in zip(completions, texts, strict=True):
                        completion.text = text
                    groups[number].completions = completions
                    scoring.add_group(number, groups[number])
            with self.metrics.phase("score"):
                self.tally = self.scorer.settle(groups, list(scoring.verdicts()), self.metrics.mean)
        return groups
