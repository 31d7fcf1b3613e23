"""The training dataloader: hands Trainer one update at a time and samples a rollout when it has none left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.planning import ALONE, Peers, Plan, Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, derived_seed
from grpo_hf.rollout.sampler import GroupSampler
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
    ):
        self.prompts, self.order, self.sampler, self.sampling = prompts, order, sampler, sampling
        self.num_generations, self.plan, self.num_iterations = num_generations, plan, num_iterations
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.finished_updates, self.on_rollout, self.peers = finished_updates, on_rollout, peers
        self.rollout: Rollout | None = None

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
        """Sample, score and plan one rollout from the current weights."""
        prompts, seeds = self.draw(index)
        with self.sampler.metrics.phase("sync"):
            self.sampler.engine.sync_weights()
        groups = self.sampler.sample(prompts, seeds, self.sampling)
        rollout = Rollout(index, groups, self.plan.updates(groups, self.peers))
        self.on_rollout(rollout)
        return rollout

    def draw(self, index: int) -> tuple[list, list[list[int]]]:
        """This process's prompts of a rollout, and a seed for each sample that does not depend on the processes."""
        rows = self.order.prompts(index)
        share = len(rows) // self.peers.count
        mine = range(self.peers.rank * share, (self.peers.rank + 1) * share)
        seeds = [
            [derived_seed(self.order.seed, "sample", index, place, n) for n in range(self.num_generations)] for place in mine
        ]
        return [self.prompts[rows[place]] for place in mine], seeds

    def state_dict(self) -> dict[str, Any]:
        """The rollout that is being trained on, when a checkpoint falls between its updates; else nothing."""
        inside = self.finished_updates() % self.steps_per_rollout
        return {"rollout": self.rollout if inside else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rollout of a checkpoint."""
        self.rollout = state["rollout"]
