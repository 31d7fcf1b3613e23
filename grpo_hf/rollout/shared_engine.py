"""An engine that several processes have together, each of which holds a part of the weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import cast

from grpo_hf.rollout.engine import Engine, Request, Requests, Sampling
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

    @contextmanager
    def requests(self, sampling: Sampling) -> Iterator[SharedRequests]:
        """See Engine.requests."""
        with self.part.requests(sampling) as requests:
            shared = SharedRequests(requests, self.peers, self.size, sampling)
            yield shared
            shared.finish()

    def abort(self) -> None:
        """See Engine.abort."""
        self.part.abort()


class SharedRequests:
    """See Requests: all are added before the first is waited for, since every process needs to know of all."""

    patience = 0.0

    def __init__(self, requests: Requests, peers: Peers, size: int, sampling: Sampling):
        self.requests, self.peers, self.size, self.sampling = requests, peers, size, sampling
        self.asked: list[Request] | None = []
        """What this process wants; None once all know of it."""
        self.open: set[tuple[int, Hashable]] = set()
        """Rank and key of what has not ended, of all processes that have this engine."""

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """See Requests.add."""
        if self.asked is None:
            raise ValueError("vllm_tensor_parallel_size > 1 takes no later turns: use vllm_mode='server' for tools")
        self.asked.append(Request(key, ids, seed, count, max_tokens or self.sampling.max_completion_length))

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """See Requests.finished."""
        self._hand_over()
        found: list[tuple[Hashable, list[Completion]]] = []
        while not found and any(rank == self.peers.rank for rank, _ in self.open):
            found = self._step()
        return found

    def finish(self) -> None:
        """Go on until the others have theirs."""
        self._hand_over()
        while self.open:
            self._step()

    def _hand_over(self) -> None:
        if self.asked is None:
            return
        everyone, self.asked = self.peers.gather(self.asked), None
        start = self.peers.rank // self.size * self.size
        for rank, wanted in enumerate(everyone[start : start + self.size], start):
            for item in wanted:
                self.requests.add((rank, item.key), item.ids, item.seed, item.count, item.max_tokens)
                self.open.add((rank, item.key))

    def _step(self) -> list[tuple[Hashable, list[Completion]]]:
        mine = []
        for ended, found in self.requests.finished():
            rank, key = cast(tuple[int, Hashable], ended)
            self.open.remove((rank, key))
            if rank == self.peers.rank:
                mine.append((key, found))
        return mine
