"""Conversations with a fake tool, for which an engine is asked turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo_hf.rollout.engine import Engine, Sampling

TOOL = [1, 2, 3]
"""What is answered to every turn."""


@dataclass
class Conversation:
    """Of so many turns, each with its own seed and limit."""

    number: int
    prompt: list[int]
    turns: list[list[int]] = field(default_factory=list)
    """Sampled ids."""

    def ask(self, requests: Any) -> None:
        """For the next turn."""
        context = sum(([*turn, *TOOL] for turn in self.turns), self.prompt)
        turn = len(self.turns)
        requests.add(self.number, context, 100 * self.number + turn, max_tokens=4 + (3 * (self.number + turn)) % 7)


def conversations(count: int = 8, length: int = 20) -> list[Conversation]:
    """With prompts of some lengths up to this."""
    return [Conversation(n, [(7 * n + place) % 80 for place in range(length - 2 * (n % 4))]) for n in range(count)]


def at_once(
    engine: Engine,
    sampling: Sampling,
    talks: list[Conversation],
    *,
    turns: int = 3,
    after: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Each goes on as soon as its turn has ended; of all turns in the order of their ends which of its conversation it was.
    ``after`` is called after each with their count."""
    ended: list[int] = []
    with engine.requests(sampling) as requests:
        for talk in talks:
            talk.ask(requests)
        while found := requests.finished():
            for number, (completion,) in found:
                talk = next(talk for talk in talks if talk.number == number)
                talk.turns.append(completion.ids)
                ended.append(len(talk.turns))
                after(len(ended))
                if len(talk.turns) < turns:
                    talk.ask(requests)
    return ended


def one_at_a_time(engine: Engine, sampling: Sampling, talks: list[Conversation], *, turns: int = 3) -> None:
    """Nothing else is asked for before a turn has ended."""
    for talk in talks:
        for _ in range(turns):
            with engine.requests(sampling) as requests:
                talk.ask(requests)
                ((_, (completion,)),) = requests.finished()
            talk.turns.append(completion.ids)


def sampled(talks: list[Conversation]) -> list[list[list[int]]]:
    """The ids of each turn."""
    return [talk.turns for talk in talks]
