"""The training dataloader: hands Trainer one update at a time and samples a rollout when it has none left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo_hf.rewards.faults import merged
from grpo_hf.rollout.dynamic import Choice, Draw, Feedback, Memory, chosen, gathered, is_informative, record_dynamic
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Plan, Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, derived_seed
from grpo_hf.rollout.sampler import GroupSampler, Sampled
from grpo_hf.types import Group, Prompt


@dataclass
class Rollout:
    """One round of sampling and the updates that are made from it."""

    index: int
    """Its number in the run, from 0."""
    groups: list[Group]
    """This process's groups."""
    updates: list[Update]
    """Run in order, `num_iterations` times over."""
    version: int
    """Updates that had been finished when the weights were taken that sampled it."""
    feedback: Feedback | None = None
    """What it has shown of its prompts, for the choice of later ones."""


@dataclass
class Ahead:
    """A rollout that is being sampled while the one before it is trained on."""

    index: int
    """Its number in the run."""
    version: int
    """See Rollout."""
    sampled: Sampled
    """What the engine has been asked for."""
    draw: Draw
    """For which prompts."""


class RolloutStream:
    """One pass over the prompts as a dataloader of updates.

    Trainer draws `gradient_accumulation_steps` items for an optimizer step. An update is planned as a whole, so the last
    of them carries it and the others are empty. Which rollout comes next follows from the number of finished updates
    alone, so a resumed run goes on where the killed one was.
    """

    def __init__(
        self,
        *,
        prompts: PromptSet,
        order: PromptOrder,
        sampler: GroupSampler,
        sampling: Sampling,
        num_generations: int,
        plan: Plan,
        num_iterations: int = 1,
        gradient_accumulation_steps: int = 1,
        finished_updates: Callable[[], int] = lambda: 0,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        peers: Peers = ALONE,
        rollout_ahead: int = 0,
        max_updates: Callable[[], int] = lambda: sys.maxsize,
        choice: Choice | None = None,
    ):
        """``rollout_ahead=1`` asks for the next rollout before the current one is trained on, unless ``max_updates``
        will have been reached by then; ``choice`` by what earlier rollouts have shown is then impossible."""
        self.prompts, self.order, self.sampler, self.sampling = prompts, order, sampler, sampling
        self.num_generations, self.plan, self.num_iterations = num_generations, plan, num_iterations
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.finished_updates, self.on_rollout, self.peers = finished_updates, on_rollout, peers
        self.rollout_ahead, self.max_updates = rollout_ahead, max_updates
        self.choice, self.memory = choice or Choice(), Memory()
        self.rollout: Rollout | None = None
        self.ahead: Ahead | None = None

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.plan.updates_per_rollout * self.num_iterations

    def __len__(self) -> int:
        return self.order.rollouts_per_epoch * self.steps_per_rollout * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index, place = divmod(self.finished_updates(), self.steps_per_rollout)
        last = (index // self.order.rollouts_per_epoch + 1) * self.order.rollouts_per_epoch
        for number in range(index, last):
            if self.rollout is None or self.rollout.index != number:
                self.rollout = self.make(number)
            for step in range(place if number == index else 0, self.steps_per_rollout):
                yield from [{}] * (self.gradient_accumulation_steps - 1)
                yield {"update": self.rollout.updates[step % self.plan.updates_per_rollout], "rollout": number}

    def make(self, index: int) -> Rollout:
        """Sample, score and plan one rollout, and ask for the next when that is to be sampled ahead."""
        self._learn(index)
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead.index != index:
            ahead = self._ask_for(index)
        groups = kept = self.sampler.finish(ahead.sampled)
        if self.choice.dynamic_sampling:
            groups, kept = self._until_informative(ahead, groups)
        after = self.finished_updates() + self.steps_per_rollout
        if self.rollout_ahead and after < self.max_updates():
            self.ahead = self._ask_for(index + 1)
        updates = self.plan.updates(kept, self.peers)
        rollout = Rollout(index, kept, updates, ahead.version, self._feedback(ahead.draw, groups))
        self.on_rollout(rollout)
        return rollout

    def _ask_for(self, index: int) -> Ahead:
        draw = self._first_round(index)
        with self.sampler.metrics.phase("sync"):
            self.sampler.engine.sync_weights()
        version = self.finished_updates()
        return Ahead(index, version, self._start(index, draw, draw.places[self.peers.rank]), draw)

    def _until_informative(self, ahead: Ahead, groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """All groups sampled until each process has its share of informative ones, and those to train on.

        Every process runs every round, be it with no prompts: an engine may have to wait for all of them.
        """
        share = self.order.prompts_per_rollout // self.peers.count
        rounds, tallies = 1, [self.sampler.tally]
        while rounds < self.choice.max_rounds:
            missing = max(0, share - sum(map(is_informative, groups)))
            asked = self.peers.gather(self.memory.oversampled(missing))
            new = self.choice.extend(ahead.draw, self.order, ahead.index, self.memory, asked)
            if not any(new):  # nothing is missing, or no prompt is left
                break
            groups = groups + self.sampler.finish(self._start(ahead.index, ahead.draw, new[self.peers.rank]))
            rounds += 1
            tallies.append(self.sampler.tally)
        self.sampler.tally = merged(tallies)
        kept = chosen(groups, share)
        record_dynamic(self.sampler.metrics, groups, kept, rounds)
        return groups, kept

    def draw(self, index: int) -> tuple[list[Prompt], list[int]]:
        """This process's prompts of a rollout, and a seed for each group that does not depend on the processes."""
        draw = self._first_round(index)
        return self._requests(index, draw, draw.places[self.peers.rank])

    def _first_round(self, index: int) -> Draw:
        return self.choice.first_round(self.order, index, self.memory, self.peers.count)

    def _requests(self, index: int, draw: Draw, places: list[int]) -> tuple[list[Prompt], list[int]]:
        prompts = [self.prompts[draw.rows[place]] for place in places]
        return prompts, [derived_seed(self.order.seed, "sample", index, place) for place in places]

    def _start(self, index: int, draw: Draw, places: list[int]) -> Sampled:
        return self.sampler.start(*self._requests(index, draw, places), self.num_generations, self.sampling)

    def _feedback(self, draw: Draw, groups: list[Group]) -> Feedback | None:
        """None where nothing is chosen by it."""
        if not (self.choice.dynamic_sampling or self.choice.curricula):
            return None
        if self.choice.curricula:
            self.sampler.metrics.mean("dynamic/skipped", len(draw.skipped), self.order.prompts_per_rollout)
        mine = self.choice.feedback(draw, zip(draw.places[self.peers.rank], groups, strict=True))
        return gathered(self.peers.gather(mine), draw, histories=bool(self.choice.curricula))

    def _learn(self, before: int) -> None:
        """From the rollout at hand, when it is one before this: one that is sampled again must not have taught already."""
        if self.rollout is not None and self.rollout.feedback is not None and self.rollout.index < before:
            self.memory.learn(self.rollout.index, self.rollout.feedback)

    def settle(self) -> None:
        """Wait for what is being sampled ahead: before the engine gets other weights, and before it is saved."""
        if self.ahead is not None:
            self.ahead.sampled.wait()

    def reset(self) -> None:
        """Forget the rollouts of an earlier run."""
        self.settle()
        self.rollout = self.ahead = None
        self.memory = Memory()

    def state_dict(self) -> dict[str, Any]:
        """The rollout that is being trained on, when a checkpoint falls between its updates, the one ahead of it, and what
        those before have shown of the prompts."""
        self.settle()
        number, inside = divmod(self.finished_updates(), self.steps_per_rollout)
        self._learn(number)
        return {"rollout": self.rollout if inside else None, "ahead": self.ahead, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rollouts of a checkpoint."""
        self.rollout, self.ahead, self.memory = state["rollout"], state["ahead"], state["memory"]
