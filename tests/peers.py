"""Several processes' parts of some work, in threads that gather from each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from grpo_hf.rollout.peers import Peers

Result = TypeVar("Result")


def on_processes(work: Callable[[Peers], Result], count: int = 2) -> list[Result]:
    """What each of so many processes makes; one that gathers more often than another fails after a minute."""
    barrier, slots = threading.Barrier(count, timeout=60), [None] * count

    def gather(rank: int, item: Any) -> list[Any]:
        slots[rank] = item
        barrier.wait()
        everyone = list(slots)
        barrier.wait()
        return everyone

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Peers(rank, count, partial(gather, rank))), range(count)))
