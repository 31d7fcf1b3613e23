"""How tools and environments are run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolSettings:
    """What one call may take, and how much runs at once in each training process."""

    timeout: float = 30.0
    """Seconds that a call may take from its start, in a worker, in an environment or as an async function."""
    memory_gb: float = 4.0
    """What a call may add to the memory of its worker, and an environment to that of its process."""
    workers: int | None = None
    """Calls of plain functions at a time, each in a worker process; None: 8, or the cores where there are more."""
    concurrency: int = 256
    """Calls of async functions at a time."""
    environments: int = 256
    """Environments that live at a time, each a process; other episodes wait until one of these has ended."""
    result_chars: int = 100_000
    """Characters of a result that the model is told; what is cut off is said."""
    modules: tuple[str, ...] = ()
    """Imported once, before processes are forked, beside those of the tools and environments themselves."""

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be."""
        rules = {
            "tool_timeout > 0": (self.timeout, self.timeout > 0),
            "tool_timeout < inf": (self.timeout, self.timeout < math.inf),
            "tool_memory_gb > 0": (self.memory_gb, self.memory_gb > 0),
            "tool_workers >= 1": (self.workers, self.workers is None or self.workers >= 1),
            "tool_concurrency >= 1": (self.concurrency, self.concurrency >= 1),
            "tool_environments >= 1": (self.environments, self.environments >= 1),
            "tool_result_chars >= 1": (self.result_chars, self.result_chars >= 1),
        }
        for rule, (value, holds) in rules.items():
            if not holds:
                raise ValueError(f"{rule.split()[0]}={value}, but {rule} is needed")
