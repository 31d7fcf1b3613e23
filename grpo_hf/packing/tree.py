"""Sequences -> a tree of token runs: which of them are trained on together, and how a tree lies in one row; pure.

    the cat sat          the cat ─┬─ sat
    the cat ran    ->             └─ ran         row: dogs the cat ran sat
    dogs                 dogs

What many sequences begin with (a system prompt, a prompt, earlier turns of a conversation) is one run, and is computed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

Ids = tuple[int, ...]


@dataclass
class Run:
    """Tokens that follow each other in every sequence which comes here."""

    start: int
    """Depth of its first token."""
    parent: int
    """The run that it follows on, by number; -1 for none."""
    sequence: int
    """One of the sequences that hold it, by number."""
    stop: int = 0
    """Depth behind its last token."""
    ends: list[int] = field(default_factory=list)
    """Sequences whose last token is in it."""

    def __len__(self) -> int:
        return self.stop - self.start


def token_runs(sequences: Sequence[Ids]) -> list[Run]:
    """The runs of the sequences' trie, depth first, each as long as it can be; no sequence may be empty."""
    runs: list[Run] = []
    waiting = [(branch, 0, -1) for branch in _branches(sequences, range(len(sequences)), 0)]
    while waiting:
        members, start, parent = waiting.pop()
        run = Run(start, parent, members[0], start)
        runs.append(run)
        while members:
            run.sequence = members[0]
            run.stop = common_length(min(sequences[n] for n in members), max(sequences[n] for n in members), run.stop)
            run.ends += [n for n in members if len(sequences[n]) == run.stop]
            branches = _branches(sequences, [n for n in members if len(sequences[n]) > run.stop], run.stop)
            members = branches[0] if len(branches) == 1 else []  # the others have ended; the run goes on
        waiting += [(branch, run.stop, len(runs) - 1) for branch in branches if len(branches) > 1]
    return runs


def without_short_runs(runs: Sequence[Run], least_saved: int) -> list[Run]:
    """The same sequences; a run that saves fewer than ``least_saved`` tokens is repeated before each that follows it."""
    children: dict[int, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        children[run.parent].append(number)
    kept = [Run(run.start, run.parent, run.sequence, run.stop, list(run.ends)) for run in runs]
    for number, run in reversed(list(enumerate(kept))):
        following = children[number]
        if following and (len(following) - 1) * len(run) < least_saved:
            place = children[run.parent].index(number)
            children[run.parent][place : place + 1] = following
            kept[following[0]].ends += run.ends
            for child in following:
                kept[child].start, kept[child].parent = run.start, run.parent
            run.stop = run.start
    numbers = {number: place for place, number in enumerate(n for n, run in enumerate(kept) if len(run))}
    for run in kept:
        run.parent = numbers.get(run.parent, -1)
    return [kept[number] for number in numbers]


@dataclass
class Bin:
    """Sequences that are trained on together."""

    size: int
    """Tokens of their tree below the run at hand."""
    members: list[int]
    """By number."""


def cut(sequences: Sequence[Ids], extra: Sequence[int], budget: int) -> list[list[int]]:
    """Which sequences to put into one tree, so that each holds at most ``budget`` tokens and little is held twice.

    From the ends of the trie upwards: what fits together below a run shares it; the run is repeated for what does not.
    ``extra`` are tokens that come with a sequence beside its own. One sequence that is larger than the budget is alone.
    """
    runs = token_runs(sequences)
    bins: dict[int, list[Bin]] = defaultdict(list)
    for number, run in reversed(list(enumerate(runs))):
        below = [Bin(extra[n], [n]) for n in run.ends] + bins.pop(number, [])
        together = first_fit(below, budget - run.stop)
        bins[run.parent] = [Bin(item.size + len(run), item.members) for item in together] + bins[run.parent]
    return [sorted(item.members) for item in first_fit(bins[-1], budget)]


def first_fit(bins: Sequence[Bin], room: int) -> list[Bin]:
    """First-fit decreasing bin packing (Johnson 1973); equals keep their order, and one that is too large stays alone."""
    packed: list[Bin] = []
    for item in sorted(bins, key=lambda item: item.size, reverse=True):
        into = next((other for other in packed if other.size + item.size <= room), None)
        if into is None:
            packed.append(Bin(item.size, list(item.members)))
        else:
            into.size += item.size
            into.members += item.members
    return packed


def _branches(sequences: Sequence[Ids], members: Sequence[int], depth: int) -> list[list[int]]:
    """The members by the token that they have there."""
    branches: dict[int, list[int]] = defaultdict(list)
    for number in members:
        branches[sequences[number][depth]].append(number)
    return list(branches.values())


def common_length(low: Sequence[int], high: Sequence[int], start: int = 0) -> int:
    """How many tokens two sequences, and all that are sorted between them, begin with; at least ``start``."""
    shorter = min(len(low), len(high))
    if low[:shorter] == high[:shorter]:
        return shorter
    return next(depth for depth in range(start, shorter) if low[depth] != high[depth])
