"""Any task of the reasoning-gym package (arXiv 2505.24760) by name: its puzzles as a dataset, its scoring as a verifier."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from grpo_hf.reward_fns.marks import last_tagged, scoped
from grpo_hf.rewards.loading import nearest
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

if TYPE_CHECKING:
    from datasets import Dataset

_WRONG_FORM = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)
"""What several tasks raise on an answer that is not of the form they ask for."""


def reasoning_gym_data(
    task: str, *, size: int = 4096, held_out: int = 100, seed: int = 0, config: dict[str, Any] | None = None
) -> tuple[Dataset, Dataset]:
    """Puzzles of a task to train on, and others to evaluate on: columns prompt, answer and entry.

    `config` holds the task's own settings, such as its sizes; `answer` is None where a task only checks answers. `entry` is
    what the verifier reads: the task, its settings and the whole puzzle, as a Python literal, which keeps the tuples and
    number keys that JSON would lose (fractions and the like become text). A training puzzle that asks the same as a held-out
    one is left out. The task "composite" mixes others; its config is
    `{"datasets": [{"name": ..., "weight": 1, "config": {}}, ...]}`.

    >>> train, held_out = reasoning_gym_data("chain_sum", size=3, held_out=2)
    >>> train.column_names, len(train), len(held_out)
    (['prompt', 'answer', 'entry'], 3, 2)

    Raises:
        ValueError: reasoning-gym is not installed, or has no such task or setting; or it has too few puzzles.
    """
    from datasets import Dataset  # here, since workers that only score would load it for nothing

    # One dataset cut in two: puzzle i is drawn from seed + i, so datasets of neighbouring seeds hold the same puzzles.
    settings = {**(config or {}), "seed": seed, "size": size + held_out}
    puzzles = _dataset(task, repr(settings))
    rows = [_row(task, settings, puzzles[number]) for number in range(size + held_out)]
    asked = {row["prompt"] for row in rows[:held_out]}
    train = [row for row in rows[held_out:] if row["prompt"] not in asked]
    if not train:
        raise ValueError(f"the task {task!r} has no other puzzles than the {held_out} held-out ones; lower held_out")
    return Dataset.from_list(train), Dataset.from_list(rows[:held_out])


def checked_entry(entry: Any) -> dict[str, Any]:
    """The task, settings and puzzle of an `entry`, on whose own answer the task's scoring works.

    Raises:
        BadGoldError: it is not what `reasoning_gym_data` writes, or the task does not fully accept the puzzle's own answer.
        ValueError: reasoning-gym is not installed, or has no such task or setting.
    """
    try:
        parsed = ast.literal_eval(entry)
        task, settings, puzzle = parsed["task"], parsed["config"], parsed["puzzle"]
    except (SyntaxError, ValueError, TypeError, LookupError) as error:
        raise BadGoldError(f"not an entry that reasoning_gym_data wrote: {str(entry)[:200]!r}") from error
    answer = puzzle["answer"]
    score = 1.0 if answer is None else _dataset(task, repr(settings)).score_answer(answer, puzzle)
    if score < 1:
        raise BadGoldError(f"the task {task!r} scores {score} for its own answer {answer!r}")
    return parsed


@register_reward
@parses_gold(checked_entry)
@scoped
def reasoning_gym(completion: str, entry: dict[str, Any]) -> float:
    """The task's own score, 0..1, of the answer in the last `<answer>` tags, or of the whole completion without them.

    Many tasks give partial credit. An answer whose form makes a task's scoring fail gets 0.0, which cannot hide a scoring
    that always fails: it has accepted the puzzle's own answer before. Some tasks evaluate answers with sympy.

    >>> train, _ = reasoning_gym_data("chain_sum", size=1, held_out=1)
    >>> row = train[0]
    >>> reasoning_gym(f"<answer>{row['answer']}</answer>", row["entry"]), reasoning_gym("<answer>x</answer>", row["entry"])
    (1.0, 0.0)

    Raises:
        BadGoldError: `entry` is not what `reasoning_gym_data` writes.
        ValueError: reasoning-gym is not installed.
    """
    tagged = last_tagged(completion)
    answer = completion.strip() if tagged is None else tagged
    if not answer and entry["puzzle"]["answer"] != "":
        return NO_ANSWER
    dataset = _dataset(entry["task"], repr(entry["config"]))
    try:
        return float(dataset.score_answer(answer, entry["puzzle"]))
    except _WRONG_FORM:
        return 0.0


@functools.lru_cache(maxsize=64)
def _dataset(task: str, settings: str) -> Any:
    """The package's dataset of a task, whose settings are written as a Python literal.

    Raises:
        ValueError: reasoning-gym is not installed, or has no such task or setting.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("the reasoning_gym reward needs the package reasoning-gym: pip install 'grpo_hf[reasoning-gym]'")
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise ValueError(
            f"reasoning-gym has no task {task!r}; it has: {', '.join(sorted(DATASETS))}{nearest(task, DATASETS)}"
        )
    config = ast.literal_eval(settings)
    known = [field.name for field in fields(DATASETS[task][1])]
    for name in config:
        if name not in known:
            raise ValueError(f"the task {task!r} has no setting {name!r}; it has: {', '.join(known)}{nearest(name, known)}")
    if task == "composite":
        config["datasets"] = [DatasetSpec(**part) for part in config["datasets"]]
    return create_dataset(task, **config)


def _row(task: str, settings: dict[str, Any], puzzle: dict[str, Any]) -> dict[str, Any]:
    """One dataset row of a puzzle."""
    entry = {"task": task, "config": settings, "puzzle": _plain(puzzle)}
    return {"prompt": puzzle["question"], "answer": puzzle["answer"], "entry": repr(entry)}


def _plain(value: Any) -> Any:
    """The value in types that have a literal: NumPy's scalars as Python's own, what else there is as its text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_plain, value))
    if type(value).__module__ == "numpy":
        return value.item()
    finite = type(value) is float and math.isfinite(value)
    return value if finite or value is None or type(value) in (str, int, bool) else str(value)
