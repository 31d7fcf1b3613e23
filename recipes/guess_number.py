"""What recipes/guess_number.yaml plays: find a number of 1 to 32 in at most six guesses from "higher" and "lower".

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

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 32.

        Returns:
            Whether it is higher, lower, or right.
        """
        if self.found or self.guesses == GUESSES:
            return "over"
        self.guesses += 1
        self.found = number == self.number
        return "right" if self.found else "higher" if number < self.number else "lower"

    def get_reward(self) -> float:
        """1 when the number was found."""
        return float(self.found)


def make_data(*, train: int = 4096, held_out: int = 256) -> tuple[list[dict], list[dict]]:
    """Each number equally often, so that chance alone does not tell runs apart."""
    rows = [{"prompt": PROMPT, "number": 1 + row % HIGHEST} for row in range(train + held_out)]
    return rows[:train], rows[train:]


def demonstrations(count: int, generator: random.Random) -> tuple[list[list[dict[str, Any]]], list[Any]]:
    """Games of a player who remembers the last answer only: it wins one in three."""
    conversations = []
    for _ in range(count):
        game = GuessNumber()
        game.reset(generator.randint(1, HIGHEST))
        messages, low, high = [*PROMPT], 1, HIGHEST
        for _ in range(GUESSES):
            guess = generator.randint(low, high)
            answer = game.guess(guess)
            call = {"function": {"name": "guess", "arguments": {"number": guess}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "guess", "content": answer})
            if answer == "right":
                break
            low, high = (guess + 1, HIGHEST) if answer == "higher" else (1, guess - 1)
        conversations.append([*messages, {"role": "assistant", "content": "Done."}])
    return conversations, [GuessNumber().guess]
