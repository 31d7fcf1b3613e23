"""An evaluation on the disk: a folder `step-000060` with the samples of each data set, a file for each process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow.parquet as pq

from grpo_hf.evaluation.estimates import ANSWER, Question, answer_of
from grpo_hf.evaluation.sampling import seed_of
from grpo_hf.rollout.record import completion_rows, write_table
from grpo_hf.types import Group

FOLDER = "evaluations"
"""Of a run's evaluations, in its output_dir."""
UNNAMED = "eval"
"""What a single data set without a name is called there."""


def write_evaluation(run: Path, groups: Sequence[Group], *, name: str, step: int, process: int, seed: int) -> Path:
    """Write this process's samples of a data set, one row each; the evaluation's folder."""
    rows = completion_rows(groups, {"step": step, "process": process})
    for row in rows:
        row["seed"] = seed_of(seed, row["row"])
    folder = run / FOLDER / f"step-{step:06d}"
    write_table(rows, folder / f"{quote(name or UNNAMED, safe=' ')}-{process}.parquet")  # a name may have a "/"
    return folder


def read_evaluation(place: str | Path) -> dict[str, list[Question]]:
    """The questions of each data set, from a run's folder, its newest evaluation, or that of one evaluation."""
    folder = Path(place)
    if (folder / FOLDER).is_dir():
        folder = max((folder / FOLDER).iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"{place} holds no evaluation; give the output_dir of `grpo-hf eval`, or that of a training run that has "
            f"evaluated, or one step of it: {place}/{FOLDER}/step-000000"
        )
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        rows.setdefault(unquote(file.stem.rpartition("-")[0]), []).extend(pq.read_table(file).to_pylist())
    return {name: _questions(found) for name, found in rows.items()}


def _questions(rows: list[dict[str, Any]]) -> list[Question]:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    questions = []
    rewards = [name for name in rows[0] if name.startswith("rewards/")]
    for row, same in groupby(sorted(rows, key=lambda item: item["row"]), key=lambda item: item["row"]):
        items = list(same)
        questions.append(
            Question(
                row=row,
                seed=items[0]["seed"],
                prompt=items[0]["prompt"],
                scores={name.removeprefix("rewards/"): [number(item[name]) for item in items] for name in rewards},
                rewards=[number(item["reward"]) for item in items],
                answers=[answer_of(item.get(f"extra/{ANSWER}"), item["completion"]) for item in items],
            )
        )
    return questions
