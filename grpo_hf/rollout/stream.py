"""Which prompts come next, sampled and scored: one rollout at a time, or the next one while this one is trained on.

A `GroupSampler` makes scored groups of prompts, in training as in evaluation; a `RolloutStream` says of which prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_hf.algorithm.advantages import weighted_sum
from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Scorer
from grpo_hf.rewards.faults import Tally, merged
from grpo_hf.rollout.dynamic import Choice, Draw, Memory, chosen, is_informative, pass_rate
from grpo_hf.rollout.engine import Engine, Sampling, sample_groups
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Update, scores_of
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, derived_seed
from grpo_hf.types import Completion, Group, Prompt

SampleFunction = Callable[[list[Prompt], list[int], int, Sampling], Iterator[tuple[int, list[Completion]]]]
"""Prompts, their seeds, completions of each, settings -> (number of the prompt, its completions) as groups finish."""


@dataclass
class PendingGroups:
    """Groups that an engine has been asked for."""

    groups: list[Group]
    """Without completions as yet."""
    completions: Iterable[tuple[int, list[Completion]]]
    """The completions of groups by their number, as they finish."""

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
    episodes: SampleFunction | None = None
    """What makes completions where they are more than one answer of the engine each."""

    def sample(
        self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling, *, trainer_state: Any = None
    ) -> tuple[list[Group], Tally]:
        """One scored group a prompt, and how the verifiers' calls ended, which may ask for the trainer's state."""
        return self.finish(self.start(prompts, seeds, num_generations, sampling), trainer_state=trainer_state)

    def start(self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling) -> PendingGroups:
        """Ask the engine for groups; one that is elsewhere works on them from now on."""
        if self.episodes is not None:
            asked = self.episodes(prompts, seeds, num_generations, sampling)
        else:
            asked = sample_groups(self.engine, [prompt.ids for prompt in prompts], seeds, num_generations, sampling)
        return PendingGroups([Group(prompt, []) for prompt in prompts], asked)

    def finish(self, pending: PendingGroups, *, trainer_state: Any = None) -> tuple[list[Group], Tally]:
        """The groups, decoded; each is scored while others are still sampled, and "score" is the time left after that."""
        groups = pending.groups
        with self.scorer.round(trainer_state) as scoring:
            with self.metrics.phase("generate"):
                scoring.expect(group.prompt.row for group in groups)
                for number, completions in pending.completions:
                    plain = [item for item in completions if item.messages is None]
                    texts = (
                        self.tokenizer.batch_decode([item.ids for item in plain], skip_special_tokens=True) if plain else []
                    )
                    for completion, text in zip(plain, texts, strict=True):
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


@dataclass
class Rollout:
    """One round of sampling and the updates that are made from it."""

    index: int
    """Its number in the run, from 0."""
    version: int
    """Updates that had been finished when the weights were taken that sampled it."""
    groups: list[Group]
    """This process's groups that are trained on."""
    sampled: list[Group]
    """All of this process's groups: with dynamic sampling also those that are not trained on."""
    tally: Tally
    """How the verifiers' calls ended, of all of these."""
    rounds: int | None
    """Rounds of sampling that it took; None without dynamic sampling."""
    skipped: int | None
    """Prompts that were due and left out, over all processes; None without a curriculum."""
    updates: list[Update] = field(default_factory=list)
    """Run in order, `num_iterations` times over."""


@dataclass
class PendingRollout:
    """A rollout that an engine has been asked for."""

    index: int
    """See Rollout."""
    version: int
    """See Rollout."""
    pending: PendingGroups
    """This process's groups of the first round."""
    draw: Draw
    """Which prompts."""


class RolloutStream:
    """Samples the rollouts of a run, each a function of the weights, the seed and its number.

    It holds no finished rollout; its state is what rollouts have shown of their prompts, and one that is sampled ahead.
    """

    def __init__(
        self,
        *,
        prompts: PromptSet,
        order: PromptOrder,
        sampler: GroupSampler,
        sampling: Sampling,
        num_generations: int,
        peers: Peers = ALONE,
        choice: Choice | None = None,
    ):
        self.prompts, self.order, self.sampler, self.sampling = prompts, order, sampler, sampling
        self.num_generations, self.peers, self.choice = num_generations, peers, choice or Choice()
        self.memory = Memory()
        self.ahead: PendingRollout | None = None
        """The rollout that is being sampled while the one before it is trained on."""

    def make(self, index: int, *, version: int, ahead: bool = False, trainer_state: Any = None) -> Rollout:
        """Sample and score one rollout from the weights after ``version`` updates; ``ahead``: then ask for the next."""
        asked, self.ahead = self.ahead, None
        if asked is None or asked.index != index:
            asked = self._ask_for(index, version)
        groups, tally = self.sampler.finish(asked.pending, trainer_state=trainer_state)
        tallies, kept, rounds = [tally], groups, None
        if self.choice.dynamic_sampling:
            groups, kept, more = self._until_informative(asked, groups, trainer_state)
            tallies, rounds = tallies + more, 1 + len(more)
        if ahead:
            self.ahead = self._ask_for(index + 1, version)
        self._learn(index, asked.draw, groups)
        skipped = len(asked.draw.skipped) if self.choice.curricula else None
        return Rollout(index, asked.version, kept, groups, merged(tallies), rounds, skipped)

    def _ask_for(self, index: int, version: int) -> PendingRollout:
        draw = self.choice.first_round(self.order, index, self.memory, self.peers.count)
        with self.sampler.metrics.phase("sync"):
            self.sampler.engine.sync_weights(version)
        return PendingRollout(index, version, self._start(index, draw, draw.places[self.peers.rank]), draw)

    def _start(self, index: int, draw: Draw, places: list[int]) -> PendingGroups:
        return self.sampler.start(*self._requests(index, draw, places), self.num_generations, self.sampling)

    def _requests(self, index: int, draw: Draw, places: list[int]) -> tuple[list[Prompt], list[int]]:
        prompts = [self.prompts[draw.rows[place]] for place in places]
        return prompts, [derived_seed(self.order.seed, "sample", index, place) for place in places]

    def _until_informative(
        self, asked: PendingRollout, groups: list[Group], trainer_state: Any
    ) -> tuple[list[Group], list[Group], list[Tally]]:
        """All groups sampled until each process has its share of informative ones, those to train on, and a tally a round.

        Every process runs every round, be it with no prompts: an engine may have to wait for all of them.
        """
        share = self.order.prompts_per_rollout // self.peers.count
        tallies: list[Tally] = []
        while len(tallies) + 1 < self.choice.max_rounds:
            missing = max(0, share - sum(map(is_informative, groups)))
            wanted = self.peers.gather(self.memory.oversampled(missing))
            new = self.choice.extend(asked.draw, self.order, asked.index, self.memory, wanted)
            if not any(new):  # nothing is missing, or no prompt is left
                break
            pending = self._start(asked.index, asked.draw, new[self.peers.rank])
            more, tally = self.sampler.finish(pending, trainer_state=trainer_state)
            groups, tallies = groups + more, [*tallies, tally]
        return groups, chosen(groups, share), tallies

    def _learn(self, index: int, draw: Draw, groups: list[Group]) -> None:
        """What the groups have shown of their prompts; nothing where nothing is chosen by it."""
        if self.choice.dynamic_sampling or self.choice.curricula:
            rows = [draw.rows[place] for place in draw.places[self.peers.rank]]
            solved = self.choice.solved_reward
            mine = [(row, pass_rate(group, solved), is_informative(group)) for row, group in zip(rows, groups, strict=True)]
            everyone = [item for part in self.peers.gather(mine) for item in part]
            self.memory.learn(index, everyone, draw.skipped, histories=bool(self.choice.curricula))

    def settle(self) -> None:
        """Wait for what is being sampled ahead: before the engine gets other weights, and before it is saved."""
        if self.ahead is not None:
            self.ahead.pending.wait()

    def reset(self) -> None:
        """Forget the rollouts of an earlier run."""
        self.settle()
        self.memory, self.ahead = Memory(), None

    def state_dict(self) -> dict[str, Any]:
        """The rollout that is sampled ahead, and what those before have shown of the prompts."""
        self.settle()
        return {"ahead": self.ahead, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with those of a checkpoint."""
        self.ahead, self.memory = state["ahead"], state["memory"]
