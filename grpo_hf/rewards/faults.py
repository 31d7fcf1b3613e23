"""Counts of how the calls of a rollout ended, and the error that a run of mostly faulty calls stops with."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from grpo_hf.rewards.outcomes import FAULTS
from grpo_hf.rewards.settings import RewardSettings
from grpo_hf.rewards.verdict import Verdict

SHOWN = 3
"""Calls that are shown for each verifier and outcome."""


BLANK_ROLLOUTS = 3
"""Rollouts in a row without a single number as reward, at which the run stops."""

FEW = 15
"""Calls below which a single fault says little."""


class RewardFaultError(RuntimeError):
    """Verifiers fail so often that the rewards would teach nothing, or in a way that the run is to stop at."""


@dataclass(frozen=True)
class Offender:
    """A call that ended badly."""

    row: int | None
    """Of the dataset."""
    completion: str
    """Its start."""
    verdict: Verdict


@dataclass
class Calls:
    """One verifier's calls."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """How many ended how."""
    seconds: float = 0.0
    """All calls together."""
    slowest: float = 0.0
    """Seconds of the longest."""
    blank: int = 0
    """How many ended as scored, with None."""
    blank_rollouts: int = 0
    """Rollouts in a row, up to this one, in which no verifier gave any completion a number."""
    offenders: dict[str, list[Offender]] = field(default_factory=dict)
    """The longest of those that were no success, by outcome."""

    @property
    def count(self) -> int:
        """All of them."""
        return self.outcomes.total()

    @property
    def faults(self) -> int:
        """Those that say nothing about their completion."""
        return sum(self.outcomes[outcome] for outcome in FAULTS)

    def add(self, verdict: Verdict, row: int | None, completion: str) -> None:
        """Count one."""
        self.outcomes[verdict.outcome] += 1
        self.blank += verdict.outcome == "scored" and math.isnan(verdict.score)
        self.seconds += verdict.seconds
        self.slowest = max(self.slowest, verdict.seconds)
        if verdict.outcome != "scored":
            self._keep(verdict.outcome, [Offender(row, completion[:200], verdict)])

    def merge(self, other: Calls) -> None:
        """Add another's, of another process or batch."""
        self.outcomes += other.outcomes
        self.blank += other.blank
        self.blank_rollouts = min(self.blank_rollouts, other.blank_rollouts)
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        for outcome, offenders in other.offenders.items():
            self._keep(outcome, offenders)

    def _keep(self, outcome: str, offenders: list[Offender]) -> None:
        kept = self.offenders.get(outcome, []) + offenders
        self.offenders[outcome] = sorted(kept, key=lambda offender: -offender.verdict.seconds)[:SHOWN]


Tally = dict[str, Calls]
"""The calls of a rollout by verifier."""


def merged(tallies: Iterable[Tally]) -> Tally:
    """All of them in one."""
    total: Tally = {}
    for tally in tallies:
        for name, calls in tally.items():
            total.setdefault(name, Calls(blank_rollouts=calls.blank_rollouts)).merge(calls)
    return total


def too_many(calls: Calls, share: float) -> bool:
    """Whether faults pass their share; of few calls, where one may be chance, the share is taken of FEW, or of all."""
    return calls.faults > share * calls.count and (calls.faults == calls.count or calls.faults > share * FEW)


def stop_if_faulty(tally: Tally, settings: RewardSettings) -> None:
    """End the run where faults pass their share, an outcome's policy is "stop", or nothing gets a number any more.

    Raises:
        RewardFaultError: with the counts, the worst calls and what to do.
    """
    for name, calls in tally.items():
        stops = [outcome for outcome in calls.outcomes if settings.policy_of(outcome) == "stop"]
        if stops or too_many(calls, settings.max_fault_share):
            counts = ", ".join(f"{count} {outcome}" for outcome, count in calls.outcomes.most_common())
            why = (
                f"reward_policy stops the run at {' and '.join(stops)}"
                if stops
                else f"{calls.faults / calls.count:.0%} of them say nothing about their completion, more than "
                f"reward_max_fault_share={settings.max_fault_share:g} allows"
            )
            outcomes = stops or [outcome for outcome in FAULTS if outcome in calls.outcomes]
            shown = _shown(offender for outcome in outcomes for offender in calls.offenders[outcome])
            raise RewardFaultError(
                f"the verifier {name!r} was called {calls.count} times ({counts}): {why}. The worst:\n{shown}\n"
                "Mend the verifier or the rows (`grpo-hf verify` shows them without training), or change reward_timeout, "
                "reward_memory_gb, reward_policy or reward_max_fault_share"
            )

    if tally and all(calls.blank_rollouts >= BLANK_ROLLOUTS for calls in tally.values()):
        raise RewardFaultError(
            f"no completion of {BLANK_ROLLOUTS} rollouts in a row has got a number as reward, so there is nothing to learn:"
            f" {found_by(tally)}. A verifier returns None where it does not apply; check the columns that it decides this by"
        )


def found_by(tally: Tally) -> str:
    """What each verifier's calls have come to, in words."""
    parts = []
    for name, calls in tally.items():
        counts = {"None": calls.blank, **calls.outcomes, "scored": calls.outcomes["scored"] - calls.blank}
        parts.append(f"{name!r} {', '.join(f'{count} {what}' for what, count in counts.items() if count) or 'no call'}")
    return "; ".join(parts)


def _shown(offenders: Iterable[Offender]) -> str:
    """The calls with what they died of; the same message is not said twice."""
    parts, said = [], set()
    for offender in offenders:
        verdict = offender.verdict
        row = "" if offender.row is None else f" on row {offender.row}"
        message = "(the same)" if verdict.message in said else verdict.message
        said.add(verdict.message)
        head = f"- {verdict.outcome} after {verdict.seconds:.3g} s{row}, completion {offender.completion!r}"
        parts.append(f"{head}\n{textwrap.indent(message, '    ')}")
    return "\n".join(parts)
