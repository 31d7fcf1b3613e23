"""The training dataloader: hands Trainer one update at a time and samples a rollout when it has none left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Plan, Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, derived_seed
from grpo_hf.rollout.sampler import GroupSampler, Sampled
from grpo_hf.types import Group


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


@dataclass
class Ahead:
    """A rollout that is being sampled while the one before it is trained on."""

    index: int
    """Its number in the run."""
    version: int
    """See Rollout."""
    sampled: Sampled
    """What the engine has been asked for."""


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
    ):
        """``rollout_ahead=1`` asks for the next rollout before the current one is trained on, unless ``max_updates``
        will have been reached by then."""
        self.prompts, self.order, self.sampler, self.sampling = prompts, order, sampler, sampling
        self.num_generations, self.plan, self.num_iterations = num_generations, plan, num_iterations
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.finished_updates, self.on_rollout, self.peers = finished_updates, on_rollout, peers
        self.rollout_ahead, self.max_updates = rollout_ahead, max_updates
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
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead.index != index:
            ahead = self._ask_for(index)
        groups = self.sampler.finish(ahead.sampled)
        after = self.finished_updates() + self.steps_per_rollout
        if self.rollout_ahead and after < self.max_updates():
            self.ahead = self._ask_for(index + 1)
        rollout = Rollout(index, groups, self.plan.updates(groups, self.peers), ahead.version)
        self.on_rollout(rollout)
        return rollout

    def _ask_for(self, index: int) -> Ahead:
        prompts, seeds = self.draw(index)
        with self.sampler.metrics.phase("sync"):
            self.sampler.engine.sync_weights()
        version = self.finished_updates()
        return Ahead(index, version, self.sampler.start(prompts, seeds, self.num_generations, self.sampling))

    def draw(self, index: int) -> tuple[list, list[int]]:
        """This process's prompts of a rollout, and a seed for each group that does not depend on the processes."""
        rows = self.order.prompts(index)
        share = len(rows) // self.peers.count
        mine = range(self.peers.rank * share, (self.peers.rank + 1) * share)
        return [self.prompts[rows[n]] for n in mine], [derived_seed(self.order.seed, "sample", index, n) for n in mine]

    def settle(self) -> None:
        """Wait for what is being sampled ahead: before the engine gets other weights, and before it is saved."""
        if self.ahead is not None:
            self.ahead.sampled.wait()

    def reset(self) -> None:
        """Forget the rollouts of an earlier run."""
        self.settle()
        self.rollout = self.ahead = None

    def state_dict(self) -> dict[str, Any]:
        """The rollout that is being trained on, when a checkpoint falls between its updates, and the one ahead of it."""
        self.settle()
        inside = self.finished_updates() % self.steps_per_rollout
        return {"rollout": self.rollout if inside else None, "ahead": self.ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rollouts of a checkpoint."""
        self.rollout, self.ahead = state["rollout"], state["ahead"]
