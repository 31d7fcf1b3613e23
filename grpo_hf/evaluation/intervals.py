"""How sure a mean over prompts is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and the interval that holds the true one with 95 % confidence; NaN where that is unknown."""

    value: float
    """The mean."""
    low: float
    """The interval's lower end."""
    high: float
    """The interval's upper end."""
    count: int
    """Prompts that it is the mean of."""


def mean_of_shares(values: Sequence[float], samples: int = 1) -> Estimate:
    """A mean of values in [0, 1], one for each prompt, which may come of several ``samples``: a share, or pass@k.

        n_eff = min(m (1 - m) / (s^2 / P), P * samples) * (z / t_{P-1})^2
        interval = Wilson's of a share m of n_eff trials

    with the mean m and the standard deviation s of the P values. Prompts are what is drawn at random, so the spread between
    them is the error's (Miller 2024, arXiv 2411.00640), expressed as the number of independent trials that are as sure
    (Korn and Graubard 1998, Survey Methodology 24:193), for which Wilson's interval (1927) stays right near 0 and 1 and with
    few of them, where m ± 1.96 s / sqrt(P) is far too sure; at m = 0 and 1 every prompt counts as one trial.
    """
    data = np.asarray(values, dtype=np.float64)
    count, mean = len(data), float(np.mean(data))
    if count < 2:
        return Estimate(mean, 0.0, 1.0, count)
    z, t = _quantiles(count)
    variance = float(np.var(data, ddof=1)) / count
    spread = mean * (1 - mean)
    trials = float(count) if spread <= 0 else count * samples if variance <= 0 else min(spread / variance, count * samples)
    trials *= (z / t) ** 2
    middle = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(max(spread, 0.0) / trials + (z / (2 * trials)) ** 2) / (1 + z * z / trials)
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half), count)


def mean_of_numbers(values: Sequence[float]) -> Estimate:
    """A mean of values of any size, one for each prompt: m ± t_{P-1} s / sqrt(P), Student's interval; NaN where they are all
    alike, which without bounds says nothing of others."""
    data = np.asarray(values, dtype=np.float64)
    count, mean = len(data), float(np.mean(data))
    if count < 2 or np.ptp(data) == 0:
        return Estimate(mean, math.nan, math.nan, count)
    half = _quantiles(count)[1] * float(np.std(data, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def _quantiles(count: int) -> tuple[float, float]:
    """The normal's, and Student's for so many values."""
    upper = (1 + CONFIDENCE) / 2
    return float(stats.norm.ppf(upper)), float(stats.t.ppf(upper, count - 1))
