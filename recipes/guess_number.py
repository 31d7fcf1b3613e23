"""What recipes/guess_number.yaml plays: find a number of 1 to 32 in at most six guesses, told each time what is left.

This file imports next to nothing: the process of each game loads it.
"""

from __future__ import annotations

import random
from typing import Any

HIGHEST = 32
GUESSES = 6
PROMPT = [{"role": "user", "content": f"Guess my number, 1 to {HIGHEST}."}]


class GuessNumber:
    """A game: it knows the number, and the model does not."""

    def reset(self, number: int, **row: Any) -> None:
        """A new game."""
        self.number, self.guesses, self.found = number, 0, False
        self.low, self.high = 1, HIGHEST

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 32.

        Returns:
            What it can still be.
        """
        if self.found or self.guesses == GUESSES:
            return "over"
        self.guesses += 1
        self.found = number == self.number
        if self.found:
            return "right"
        if number < self.number:
            self.low = max(self.low, number + 1)
            return f"higher: {self.low} to {self.high}"
        self.high = min(self.high, number - 1)
        return f"lower: {self.low} to {self.high}"

    def get_reward(self) -> float:
        """1 when the number was found."""
        return float(self.found)


def make_data(*, train: int = 4096, held_out: int = 256) -> tuple[list[dict], list[dict]]:
    """Each number equally often, so that chance alone does not tell runs apart."""
    rows = [{"prompt": PROMPT, "number": 1 + row % HIGHEST} for row in range(train + held_out)]
    return rows[:train], rows[train:]


def anything(game: GuessNumber, generator: random.Random) -> int:
    """Any number, whatever was said."""
    return generator.randint(1, HIGHEST)


def middle(game: GuessNumber, generator: random.Random) -> int:
    """What leaves as little as possible, whichever way it goes."""
    return (game.low + game.high) // 2


PLAYERS = {anything: (3, 3), middle: (1, GUESSES)}
"""Ways of guessing, how common they are, and the guesses after which their players give up."""


def demonstrations(count: int, generator: random.Random) -> tuple[list[list[dict[str, Any]]], list[Any]]:
    """Games of players, each with a way of guessing: see PLAYERS."""
    conversations = []
    for _ in range(count):
        game, (player,) = GuessNumber(), generator.choices(list(PLAYERS), [common for common, _ in PLAYERS.values()])
        _, patience = PLAYERS[player]
        game.reset(generator.randint(1, HIGHEST))
        messages: list[dict[str, Any]] = [*PROMPT]
        while not game.found and game.guesses < patience:
            guess = player(game, generator)
            call = {"function": {"name": "guess", "arguments": {"number": guess}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "guess", "content": game.guess(guess)})
        conversations.append([*messages, {"role": "assistant", "content": "Done."}])
    return conversations, [GuessNumber().guess]
