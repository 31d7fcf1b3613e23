"""Collects what a step measured, and where its time went, until it is logged."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Gather = Callable[[dict], list[dict]]


class Metrics:
    """Weighted means, totals, minima, maxima and phase times of this process since the last flush."""

    def __init__(self) -> None:
        self.reset()

    def mean(self, name: str, total: float | torch.Tensor, count: float = 1.0) -> None:
        """Add ``total`` over ``count`` things; tensors stay on their device until the flush."""
        value = total.detach() if isinstance(total, torch.Tensor) else total
        before = self._means[name]
        self._means[name] = (before[0] + value, before[1] + count)

    def total(self, name: str, value: float) -> None:
        """Add to a sum over all processes, which is logged per optimizer step."""
        self._totals[name] += value

    def minimum(self, name: str, value: float) -> None:
        """Keep the smallest."""
        self._minima[name] = min(self._minima.get(name, value), value)

    def maximum(self, name: str, value: float) -> None:
        """Keep the largest."""
        self._maxima[name] = max(self._maxima.get(name, value), value)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds inside to time/<name>, which names them in a profile too; waits for the GPU, so that the work is
        counted where it was asked for."""
        start = now()
        try:
            with torch.profiler.record_function(f"time/{name}"):
                yield
        finally:
            self._seconds[name] += now() - start

    def flush(self, gather: Gather, *, steps: int) -> dict[str, float]:
        """The values over all processes since the last flush, times per optimizer step; then start afresh.

        ``gather`` maps one process's dict to the list of all processes' dicts. time/other is what no phase covers.
        """
        seconds = dict(self._seconds)
        seconds["other"] = now() - self._start - sum(seconds.values())
        everyone = gather(self.state_dict())
        values: dict[str, float] = {}
        for name in dict.fromkeys(name for part in everyone for name in part["means"]):
            totals, counts = zip(*(part["means"].get(name, (0.0, 0.0)) for part in everyone), strict=True)
            values[name] = sum(totals) / sum(counts) if sum(counts) else float("nan")
        for name in dict.fromkeys(name for part in everyone for name in part["totals"]):
            values[name] = sum(part["totals"].get(name, 0.0) for part in everyone) / max(steps, 1)
        for kind, choose in (("minima", min), ("maxima", max)):
            for name in dict.fromkeys(name for part in everyone for name in part[kind]):
                values[name] = choose(part[kind][name] for part in everyone if name in part[kind])
        values |= {f"time/{name}": value / max(steps, 1) for name, value in seconds.items()}
        self.reset()
        return values

    def state_dict(self) -> dict[str, dict]:
        """What has been collected since the last flush, but for the times: those are of this process's own clock."""
        means = {name: (float(total), count) for name, (total, count) in self._means.items()}
        return {"means": means, "totals": dict(self._totals), "minima": self._minima, "maxima": self._maxima}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on collecting."""
        self._means.update(state["means"])
        self._totals.update(state["totals"])
        self._minima.update(state["minima"])
        self._maxima.update(state["maxima"])

    def reset(self) -> None:
        """Forget everything and start the clock anew."""
        self._means: dict[str, tuple[float | torch.Tensor, float]] = defaultdict(lambda: (0.0, 0.0))
        self._totals: dict[str, float] = defaultdict(float)
        self._minima: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = now()


def now() -> float:
    """Seconds, once the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
