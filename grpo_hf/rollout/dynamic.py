"""Which prompts are worth their samples: dynamic sampling, skipping of solved prompts, curricula by pass rate.

What the run has learned of its prompts is a `Memory`; everything else here is a function of it, the seed and counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.utils import logging

from grpo_hf.rollout.prompts import PromptOrder
from grpo_hf.types import Completion, Group

logger = logging.get_logger(__name__)

History = list[float | None]
"""A prompt's pass rates, oldest first: the share of a group's completions with the reward of a solved one; None for a visit
that was skipped."""
Curriculum = Callable[[History], bool]
"""A prompt's history -> whether to sample it now."""

LEAST_ACCEPTANCE = 0.1
"""A round asks for ten times what is missing at most."""
NEWEST = 0.3
"""Weight of the newest rollout in the running acceptance."""


def skip_solved(history: History, *, after: int = 2, revisit_after: int = 3) -> bool:
    """False for a prompt that every completion has solved on the last ``after`` visits; every (``revisit_after`` + 1)th pass
    looks again.

    >>> skip_solved([0.5, 1.0]), skip_solved([1.0, 1.0]), skip_solved([1.0, 1.0, None, None, None])
    (True, False, True)
    """
    visits = [rate for rate in history if rate is not None]
    solved = len(visits) >= after and all(rate == 1.0 for rate in visits[-after:])
    return not solved or (
        len(history) >= revisit_after and history[len(history) - revisit_after :] == [None] * revisit_after
    )


CURRICULA: dict[str, Curriculum] = {"skip_solved": skip_solved}
"""By name."""


@dataclass(frozen=True)
class Choice:
    """How prompts are chosen."""

    dynamic_sampling: bool = False
    """Draw until the rollout holds its number of informative groups (DAPO, arXiv 2503.14476)."""
    max_rounds: int = 4
    """Rounds of sampling in one rollout at most, the first included."""
    curricula: tuple[Curriculum, ...] = ()
    """A prompt is sampled when all of them say so."""
    solved_reward: float = 1.0
    """A completion with at least this reward has passed."""

    def first_round(self, order: PromptOrder, rollout: int, memory: Memory, count: int) -> Draw:
        """The rollout's own prompts, where one is skipped another in its place, cut into ``count`` processes' shares; with
        dynamic sampling as many more as will not be informative."""
        own = order.prompts(rollout)
        share = len(own) // count
        skipped = {row for row in own if not self.wants(row, memory)}
        others = iter(self.others(order, rollout, own, len(skipped), memory) if skipped else [])
        rows = [next(others, row) if row in skipped else row for row in own]
        draw = Draw(rows, [list(part) for part in _cut([share] * count)], sorted(skipped - set(rows)))
        if len(draw.skipped) < len(skipped):
            logger.warning_once(
                "The curriculum skips so many prompts that a rollout is not full: some are sampled all the same"
            )
        if self.dynamic_sampling:
            self.extend(draw, order, rollout, memory, [memory.oversampled(share) - share] * count)
        return draw

    def extend(self, draw: Draw, order: PromptOrder, rollout: int, memory: Memory, asked: list[int]) -> list[list[int]]:
        """Add, and return, as many new places as each process asks for, as far as there are prompts.

        Which process draws which prompt depends on what each asks for, so a run with refills is the same run only on the
        same number of processes; without refills the number does not matter.
        """
        start = len(draw.rows)
        draw.rows += self.others(order, rollout, draw.rows, sum(asked), memory) if sum(asked) else []
        new = [[place for place in part if place < len(draw.rows)] for part in _cut(asked, start)]
        for places, part in zip(draw.places, new, strict=True):
            places += part
        return new

    def wants(self, row: int, memory: Memory) -> bool:
        """Whether to sample a prompt now."""
        history = memory.histories.get(row, [])
        return all(curriculum(list(history)) for curriculum in self.curricula)

    def others(self, order: PromptOrder, rollout: int, held: list[int], count: int, memory: Memory) -> list[int]:
        """Up to ``count`` prompts that the rollout does not hold yet."""
        found: list[int] = []
        without = set(held)
        for row in order.refills(rollout):
            if len(found) == count:
                break
            if row not in without and self.wants(row, memory):
                found.append(row)
        return found


@dataclass
class Draw:
    """The prompts of one rollout, over all processes."""

    rows: list[int]
    """The prompt of each place; places count on through the rounds, and seed the sampling."""
    places: list[list[int]]
    """Each process's."""
    skipped: list[int]
    """Prompts that were due and that the curriculum has left out."""


@dataclass
class Memory:
    """What the rollouts so far have shown of the prompts; the same on all processes."""

    rollouts: int = 0
    """It has learned from those before this number."""
    acceptance: float = 1.0
    """Running share of groups that are informative."""
    histories: dict[int, History] = field(default_factory=dict)
    """By prompt."""

    def oversampled(self, missing: int) -> int:
        """How many groups to sample for so many informative ones."""
        return math.ceil(missing / self.acceptance)

    def learn(self, rollout: int, seen: list[tuple[int, float, bool]], skipped: list[int], *, histories: bool) -> None:
        """Take in a rollout, once: of each group of all processes the prompt, its pass rate (NaN: no visit) and whether it
        was informative, and the prompts that were skipped; into ``histories`` where a curriculum wants them."""
        if rollout < self.rollouts:
            return
        self.rollouts = rollout + 1
        newest = sum(informative for *_, informative in seen) / len(seen)
        self.acceptance = min(1.0, max(LEAST_ACCEPTANCE, (1 - NEWEST) * self.acceptance + NEWEST * newest))
        rates: dict[int, float | None] = {row: rate for row, rate, _ in seen if histories and not math.isnan(rate)}
        for row, rate in (rates | dict.fromkeys(skipped)).items():
            self.histories.setdefault(row, []).append(rate)


def is_informative(group: Group) -> bool:
    """Rewards, those that are missing (NaN) apart, that are not all equal."""
    return len({item.reward for item in _scored(group)}) > 1


def pass_rate(group: Group, solved_reward: float) -> float:
    """The share of completions with at least this reward; NaN when none has any."""
    scored = _scored(group)
    return sum(item.reward >= solved_reward for item in scored) / len(scored) if scored else math.nan


def chosen(groups: list[Group], share: int) -> list[Group]:
    """Informative groups first, in the order drawn; the others, whose gradient is 0, where those are too few."""
    return sorted(groups, key=lambda group: not is_informative(group))[:share]


def _scored(group: Group) -> list[Completion]:
    return [item for item in group.completions if not math.isnan(item.reward)]


def _cut(sizes: list[int], start: int = 0) -> list[range]:
    """Ranges of these sizes, one after the other."""
    parts = []
    for size in sizes:
        parts.append(range(start, start + size))
        start += size
    return parts
