"""Samples as a table in the trackers that have tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pandas as pd

from grpo_hf.types import Group

WITH_TABLES = ("wandb", "trackio")
"""Trackers of report_to that show a table: each has a Table of a dataframe, and log."""


def sample_rows(groups: Iterable[Group], step: int) -> list[dict[str, Any]]:
    """A row a completion: step, prompt, completion, rewards by name, advantage, and what verifiers have logged beside it."""
    return [
        {
            "step": step,
            "prompt": group.prompt.raw if isinstance(group.prompt.raw, str) else str(group.prompt.raw),
            "completion": item.text,
            **item.rewards,
            "advantage": item.advantage,
            **item.extra,
        }
        for group in groups
        for item in group.completions
    ]


def log_table(rows: list[dict[str, Any]], report_to: Iterable[str], *, unique_prompts: bool = False) -> None:
    """Log rows as the table "completions", as TRL does, wherever a run has begun; ``unique_prompts`` keeps one a prompt."""
    table = pd.DataFrame(rows)
    table = table.drop_duplicates(subset=["prompt"]) if unique_prompts else table
    for name in WITH_TABLES:
        if name in report_to:
            tracker = importlib.import_module(name)
            if getattr(tracker, "run", True) is not None:  # wandb's, before its callback has begun one
                tracker.log({"completions": tracker.Table(dataframe=table)})
