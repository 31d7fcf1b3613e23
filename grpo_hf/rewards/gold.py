"""A pass over a dataset that finds the rows whose own answer cannot be read, before they cost a training run anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from grpo_hf.rewards.registry import check_columns
from grpo_hf.rewards.runners import parsed_gold
from grpo_hf.rewards.scorer import Scorer
from grpo_hf.rewards.settings import RewardSettings
from grpo_hf.rewards.signature import Reward
from grpo_hf.rewards.verdict import Verdict

AT_A_TIME = 16
"""Rows that a worker is given in one go."""


@dataclass(frozen=True)
class BadGold:
    """A row whose answer a verifier cannot read."""

    row: int
    """Its number."""
    verifier: str
    """The verifier's name."""
    message: str
    """Why."""


def check_gold(
    rewards: Sequence[Reward], rows: Any, *, settings: RewardSettings | None = None, progress: bool = True
) -> list[BadGold]:
    """Parse the gold answer of every row, in workers, for every verifier that parses one; return what cannot be read.

    ``rows`` is a datasets.Dataset or a list of dicts. A pass that takes more than a few seconds shows its progress.

    Raises:
        ValueError: a column is missing.
    """
    scorer = Scorer(rewards, settings=settings)
    try:
        return bad_gold(scorer, rows, progress=progress)
    finally:
        scorer.close()


def bad_gold(scorer: Scorer, rows: Any, numbers: Sequence[int] | None = None, *, progress: bool = True) -> list[BadGold]:
    """`check_gold` by a scorer's workers, of the rows of these numbers."""
    rewards = [reward for reward in scorer.rewards if reward.gold_column is not None]
    numbers = range(len(rows)) if numbers is None else numbers
    if not rewards or not numbers:
        return []
    check_columns(rewards, getattr(rows, "column_names", None) or rows[0])
    found: list[BadGold] = []
    with tqdm(total=len(rewards) * len(numbers), desc="gold answers", delay=3, disable=None if progress else True) as bar:
        for reward in rewards:
            values = _column(rows, str(reward.gold_column), numbers)
            for number, verdict in zip(numbers, _verdicts(scorer, reward, values), strict=True):
                if verdict.outcome != "scored":
                    found.append(BadGold(number, reward.name, verdict.message))
                bar.update()
    return found


def _column(rows: Any, name: str, numbers: Sequence[int]) -> list[Any]:
    if isinstance(rows, Sequence) and isinstance(rows[0], Mapping):
        return [rows[number][name] for number in numbers]
    values = list(rows[name])
    return [values[number] for number in numbers]


def _verdicts(scorer: Scorer, reward: Reward, values: list[Any]) -> Any:
    """How the parsing of each value ended."""
    if not reward.in_worker:
        for parsed in (parsed_gold(reward, value) for value in values):
            yield parsed if isinstance(parsed, Verdict) else Verdict("scored")
        return
    parts = [values[start : start + AT_A_TIME] for start in range(0, len(values), AT_A_TIME)]
    for future in [scorer.workers.parse_gold(scorer.parcels[reward.name], part) for part in parts]:
        yield from (gold.verdict for gold in future.result())
