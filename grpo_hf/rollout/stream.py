"""Which prompts come next, sampled and scored: one rollout at a time, or the next one while this one is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo_hf.rewards.faults import Tally, merged
from grpo_hf.rollout.dynamic import Choice, Draw, Memory, chosen, gathered, is_informative
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, derived_seed
from grpo_hf.rollout.sampler import GroupSampler, PendingGroups
from grpo_hf.types import Group, Prompt


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
        draw = self._first_round(index)
        with self.sampler.metrics.phase("sync"):
            self.sampler.engine.sync_weights(version)
        return PendingRollout(index, version, self._start(index, draw, draw.places[self.peers.rank]), draw)

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

    def draw(self, index: int) -> tuple[list[Prompt], list[int]]:
        """This process's prompts of a rollout, and a seed for each group that does not depend on the processes."""
        draw = self._first_round(index)
        return self._requests(index, draw, draw.places[self.peers.rank])

    def _first_round(self, index: int) -> Draw:
        return self.choice.first_round(self.order, index, self.memory, self.peers.count)

    def _requests(self, index: int, draw: Draw, places: list[int]) -> tuple[list[Prompt], list[int]]:
        prompts = [self.prompts[draw.rows[place]] for place in places]
        return prompts, [derived_seed(self.order.seed, "sample", index, place) for place in places]

    def _start(self, index: int, draw: Draw, places: list[int]) -> PendingGroups:
        return self.sampler.start(*self._requests(index, draw, places), self.num_generations, self.sampling)

    def _learn(self, index: int, draw: Draw, groups: list[Group]) -> None:
        """What the groups have shown of their prompts; nothing where nothing is chosen by it."""
        if self.choice.dynamic_sampling or self.choice.curricula:
            mine = self.choice.feedback(draw, zip(draw.places[self.peers.rank], groups, strict=True))
            everyone = self.peers.gather(mine)
            self.memory.learn(index, gathered(everyone, draw, histories=bool(self.choice.curricula)))

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
