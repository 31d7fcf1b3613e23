"""Many episodes on one engine: whoever has been answered goes on, and nobody waits for another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from grpo_hf.episodes.episode import Ask, Episode
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.types import Completion, Prompt

LOOK_EVERY = 0.02
"""Seconds after which an engine that works elsewhere is left, to see which tools have answered."""

Key = tuple[int, int]


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
        playing: dict[Key, Episode] = {
            (number, n): self.play(prompt, seed + n)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            for n in range(num_generations)
        }
        ended: dict[int, dict[int, Completion]] = {number: {} for number in range(len(prompts))}
        ready: deque[tuple[Key, Any]] = deque((key, None) for key in playing)
        waiting: dict[Future[Any], Key] = {}
        asked: set[Key] = set()
        try:
            with self.engine.requests(sampling) as requests:
                while playing:
                    while ready:
                        key, value = ready.popleft()
                        try:
                            step = playing[key].send(value)
                        except StopIteration as end:
                            del playing[key]
                            number, n = key
                            ended[number][n] = end.value
                            if len(ended[number]) == num_generations:
                                group = ended.pop(number)
                                yield number, [group[n] for n in range(num_generations)]
                            continue
                        if isinstance(step, Ask):
                            requests.add(key, step.ids, step.seed, max_tokens=step.max_tokens)
                            asked.add(key)
                        else:
                            waiting[step] = key
                    if waiting:  # a batch that is begun cannot be joined: it pays to wait for more of them a little
                        patience = requests.patience if asked else None
                        done, _ = wait(waiting, patience, FIRST_COMPLETED if patience is None else "ALL_COMPLETED")
                        ready.extend((waiting.pop(future), future.result()) for future in sorted(done, key=waiting.__getitem__))
                    if asked and (not ready or not requests.patience):
                        for key, (completion,) in requests.finished(LOOK_EVERY if waiting else None):
                            asked.remove(key)
                            ready.append((key, completion))
        finally:
            for episode in playing.values():
                episode.close()
