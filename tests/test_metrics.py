"""Metrics: weighted means, totals a step, extremes over processes, and where the time went."""

import math
import time

import pytest
import torch

from grpo_hf.metrics import Metrics


def alone(item: dict) -> list[dict]:
    return [item]


def without_times(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith("time/")}


def test_means_are_weighted_and_totals_are_per_step() -> None:
    metrics = Metrics()
    metrics.mean("length", 6.0, 3)
    metrics.mean("length", torch.tensor(10.0, requires_grad=True), 1)
    metrics.mean("plain", 2.0)
    metrics.mean("plain", 4.0)
    metrics.total("tokens", 30)
    metrics.total("tokens", 10)
    metrics.minimum("shortest", 3)
    metrics.minimum("shortest", 5)
    metrics.maximum("longest", 3)
    metrics.maximum("longest", 5)
    values = without_times(metrics.flush(alone, steps=2))
    assert values == {"length": 4.0, "plain": 3.0, "tokens": 20.0, "shortest": 3, "longest": 5}


def test_a_mean_of_nothing_is_nan() -> None:
    metrics = Metrics()
    metrics.mean("nothing", 0.0, 0)
    assert math.isnan(metrics.flush(alone, steps=1)["nothing"])


def test_a_flush_starts_afresh() -> None:
    metrics = Metrics()
    metrics.mean("reward", 1.0)
    metrics.maximum("longest", 5)
    metrics.flush(alone, steps=1)
    assert without_times(metrics.flush(alone, steps=1)) == {}


def test_processes_are_put_together() -> None:
    """One process may have measured what the other has not."""
    metrics = Metrics()
    metrics.mean("reward", 1.0, 1)
    metrics.total("tokens", 5)
    metrics.minimum("shortest", 4)
    other = {
        "means": {"reward": (6.0, 3), "kl": (0.5, 1)},
        "totals": {"tokens": 7, "dropped": 2},
        "minima": {"shortest": 3},
        "maxima": {"longest": 9},
    }
    values = without_times(metrics.flush(lambda mine: [mine, other], steps=1))
    assert values == {"reward": 7 / 4, "kl": 0.5, "tokens": 12, "dropped": 2, "shortest": 3, "longest": 9}


def test_phases_share_the_time_out() -> None:
    metrics = Metrics()
    start = time.perf_counter()
    for _ in range(2):
        with metrics.phase("generate"):
            time.sleep(0.02)
    time.sleep(0.01)
    values = metrics.flush(alone, steps=2)
    seconds = time.perf_counter() - start
    assert values["time/generate"] >= 0.02
    assert values["time/other"] >= 0.005
    assert 2 * sum(values.values()) == pytest.approx(seconds, abs=0.01)


def test_a_phase_that_fails_is_timed_too() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.phase("score"):
        raise KeyError
    assert "time/score" in metrics.flush(alone, steps=1)
