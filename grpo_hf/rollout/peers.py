"""The processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peers:
    """This process among those that train together."""

    rank: int
    """Its number, from 0."""
    count: int
    """How many there are."""
    gather: Callable[[Any], list[Any]]
    """One process's object -> the list of all processes' objects, by rank."""


ALONE = Peers(rank=0, count=1, gather=lambda item: [item])
"""A run of one process."""
