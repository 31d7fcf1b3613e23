"""Two evaluations of the same rows with the same seeds, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from grpo_hf.evaluation.estimates import Question, values_of
from grpo_hf.evaluation.intervals import Estimate, mean_of_numbers

RESAMPLES = 9_999
"""Sign flips that are drawn where there are too many to try all."""


@dataclass(frozen=True)
class Difference:
    """What B has over A in one measure."""

    before: float
    """A's mean."""
    after: float
    """B's."""
    estimate: Estimate
    """B's less A's, prompt by prompt."""
    p_value: float
    """How often a difference as large comes of chance alone, were A and B alike."""
    better: int
    """Prompts on which B has more."""
    worse: int
    """Prompts on which B has less."""


def check_paired(a: Sequence[Question], b: Sequence[Question]) -> None:
    """Raise ValueError for evaluations whose rows, seeds or numbers of samples differ: they cannot be compared in pairs."""
    for name, of in (("rows", {item.row: item.prompt for item in a}), ("seeds", {item.row: item.seed for item in a})):
        other = {item.row: item.prompt if name == "rows" else item.seed for item in b}
        if of != other:
            row = next(row for row in sorted(of | other) if of.get(row) != other.get(row))
            raise ValueError(
                f"these evaluations have other {name}: row {row} is {of.get(row)!r:.80} in A and {other.get(row)!r:.80} in "
                "B; evaluate both on the same data, with the same seed"
            )
    if len(a[0].rewards) != len(b[0].rewards):
        raise ValueError(
            f"A has {len(a[0].rewards)} samples of each row and B {len(b[0].rewards)}; evaluate both with the same "
            "num_generations_eval"
        )


def differences(a: Sequence[Question], b: Sequence[Question]) -> dict[str, Difference]:
    """Of each measure that both have, over the prompts that both have it of.

    Where it lies in [0, 1] the interval is Bonett and Price's (2012, Statistics in Medicine 31:1337), Student's of the
    differences with one prompt more on either side, which stays right when few prompts differ; else Student's. The p-value
    is the exact sign test's (McNemar's) where every difference is -1, 0 or 1, and that of sign flips otherwise.
    """
    check_paired(a, b)
    of_a, of_b = values_of(a), values_of(b)
    found = {}
    for name in of_a.keys() & of_b.keys():
        rows = sorted(of_a[name].keys() & of_b[name].keys())
        before, after = (np.array([of[name][row] for row in rows]) for of in (of_a, of_b))
        if not rows:
            continue
        change = after - before
        shares = name != "reward" and min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1
        wide = mean_of_numbers([*change, 1.0, -1.0] if shares else change)
        low, high = (max(wide.low, -1.0), min(wide.high, 1.0)) if shares else (wide.low, wide.high)
        estimate = Estimate(float(change.mean()), low, high, len(rows))
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        found[name] = Difference(
            float(before.mean()), float(after.mean()), estimate, _p_value(change, better, worse), better, worse
        )
    return {name: found[name] for name in of_a if name in found}


def _p_value(change: np.ndarray, better: int, worse: int) -> float:
    if better + worse == 0:
        return 1.0
    if np.isin(change, (-1, 0, 1)).all():
        return float(stats.binomtest(better, better + worse).pvalue)
    flips = stats.permutation_test(
        (change[change != 0],), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(flips.pvalue)
