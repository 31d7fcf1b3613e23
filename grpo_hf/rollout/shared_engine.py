"""An engine that several processes have together, each of which holds a part of the weights."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.peers import Peers
from grpo_hf.types import Completion


class SharedEngine:
    """Each process's part of an engine over ``size`` processes, neighbours by rank: all of them sample the prompts of all,
    step by step, and each keeps its own.

    Every process has to call every method as often as the others.
    """

    def __init__(self, part: Engine, peers: Peers, size: int):
        self.part, self.peers, self.size = part, peers, size

    def sync_weights(self, version: int) -> None:
        """See Engine.sync_weights; a part takes what it needs of whole weights."""
        self.part.sync_weights(version)

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See Engine.sample."""
        everyone = self.peers.gather((prompts, seeds))
        start = self.peers.rank // self.size * self.size
        before = sum(len(asked) for asked, _ in everyone[start : self.peers.rank])
        together = everyone[start : start + self.size]
        every_prompt = [ids for asked, _ in together for ids in asked]
        every_seed = [seed for _, asked in together for seed in asked]
        finished = self.part.sample(every_prompt, every_seed, num_generations, sampling)
        return ((n - before, group) for n, group in finished if before <= n < before + len(prompts))

    def abort(self) -> None:
        """See Engine.abort."""
        self.part.abort()
