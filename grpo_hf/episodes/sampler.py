"""Many episodes on one engine: whoever has been answered goes on, and nobody waits for another."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, TypeAlias

from grpo_hf.episodes.episode import Ask, Episode
from grpo_hf.rollout.engine import Engine, Requests, Sampling
from grpo_hf.types import Completion, Prompt

LOOK_EVERY = 0.02
"""Seconds after which an engine that works elsewhere is left, to see which tools have answered."""

Key: TypeAlias = Any
"""Of an episode: the number of its prompt, and its own in the group."""


@dataclass(frozen=True)
class EpisodeSampler:
    """Plays groups of episodes; it samples as `sample_groups` does, but from prompts."""

    engine: Engine
    """Takes the turns."""
    play: Callable[[Prompt, int], Episode]
    """Begins the episode of a prompt with a seed."""

    def __call__(
        self, prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (number of the prompt, its completions) as groups finish; completion n has the prompt's seed + n."""
        members = range(num_generations)
        begun = enumerate(zip(prompts, seeds, strict=True))
        table = Table({(number, n): self.play(prompt, seed + n) for number, (prompt, seed) in begun for n in members})
        groups: dict[int, dict[int, Completion]] = defaultdict(dict)
        try:
            with self.engine.requests(sampling) as requests:
                while table.playing:
                    for (number, n), completion in table.go_on(requests):
                        groups[number][n] = completion
                        if len(groups[number]) == num_generations:
                            group = groups.pop(number)
                            yield number, [group[n] for n in members]
                    table.listen(requests)
        finally:
            table.close()


class Table:
    """Episodes that are played, and what each of them waits for."""

    def __init__(self, playing: dict[Key, Episode]):
        self.playing = playing
        self.answers: deque[tuple[Key, Any]] = deque((key, None) for key in playing)
        self.asked: set[Key] = set()
        """Wait for the engine."""
        self.asked_since = 0.0
        """When the first of them began to wait, or the engine last worked."""
        self.waiting: dict[Future[Any], Key] = {}
        """Wait for a tool."""

    def go_on(self, requests: Requests) -> Iterator[tuple[Key, Completion]]:
        """Give the answers that have come; yields the episodes that end with them."""
        while self.answers:
            key, answer = self.answers.popleft()
            try:
                wanted = self.playing[key].send(answer)
            except StopIteration as end:
                del self.playing[key]
                yield key, end.value
                continue
            if isinstance(wanted, Ask):
                requests.add(key, wanted.ids, wanted.seed, max_tokens=wanted.max_tokens)
                if not self.asked:
                    self.asked_since = time.monotonic()
                self.asked.add(key)
            else:
                self.waiting[wanted] = key

    def listen(self, requests: Requests) -> None:
        """Until a tool or the engine has answered, or the engine has taken a step."""
        if self.waiting:
            # A batch that has begun cannot be joined: where the engine works in such, a moment's wait makes it larger.
            now = time.monotonic()
            moment = None if not self.asked else max(0.0, self.asked_since + requests.patience - now)
            done, _ = wait(self.waiting, moment, FIRST_COMPLETED)
            for future in sorted(done, key=self.waiting.__getitem__):
                self.answers.append((self.waiting.pop(future), future.result()))
            if self.answers and moment:
                return
        if self.asked:
            for key, (completion,) in requests.finished(LOOK_EVERY if self.waiting else None):
                self.asked.remove(key)
                self.answers.append((key, completion))
            self.asked_since = time.monotonic()

    def close(self) -> None:
        """End the episodes that still run."""
        for episode in self.playing.values():
            episode.close()
