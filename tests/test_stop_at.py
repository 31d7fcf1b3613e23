"""A run ends when its held-out rewards hold, and where it would have ended when it is killed before its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_hf.training.callbacks import StopAt
from grpo_hf.training.checkpoints import newest_checkpoint
from grpo_hf.training.trainer import GRPOTrainer
from tests.runs import logs, same, timeless, weights
from tests.tiny import PROMPTS, tiny_trainer

OPTIONS: dict[str, Any] = {
    "max_steps": 9,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_dataset": PROMPTS[:2],
}


def run(folder: Path, least: float, *, resume: str | None = None, **settings: Any) -> GRPOTrainer:
    trainer = tiny_trainer(folder, stop_at={"even_words": least}, **OPTIONS | settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_two_evaluations_in_a_row_end_it(tmp_path: Path) -> None:
    """Every evaluation is at least 0, so the second ends the run, with all of its steps logged, and a checkpoint."""
    ended = run(tmp_path, 0.0)
    assert ended.state.global_step == 4
    assert [line["step"] for line in logs(ended) if "loss" in line] == [2, 3, 4]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_what_is_never_reached_changes_nothing(tmp_path: Path) -> None:
    """Rewards are at most 1."""
    assert run(tmp_path, 1.5).state.global_step == 9


def test_killed_before_its_end_it_ends_there(tmp_path: Path) -> None:
    ended = run(tmp_path, 0.0)
    again = run(tmp_path, 0.0, resume="auto")
    assert again.state.global_step == 4
    assert [timeless(line) for line in logs(again)] == [timeless(line) for line in logs(ended)]
    assert same(weights(again.model), weights(ended.model))


def test_killed_earlier_it_ends_there_too(tmp_path: Path) -> None:
    """The first of the two evaluations is in the record of the run that was killed."""
    ended = run(tmp_path, 0.0)
    again = run(tmp_path, 0.0, resume=str(tmp_path / "checkpoint-3"))
    assert [timeless(line) for line in logs(again)] == [timeless(line) for line in logs(ended)]
    assert same(weights(again.model), weights(ended.model))


def test_higher_it_goes_on(tmp_path: Path) -> None:
    run(tmp_path, 0.0)
    assert run(tmp_path, 1.5, resume="auto").state.global_step == 9


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.9, 0.98, 0.96, 0.99], False), ([0.9, 0.98, 0.99], True), ([0.99], False), ([0.99, 0.98, 0.9], False), ([], False)],
)
def test_in_a_row(values: list[float], ends: bool) -> None:
    lines: list[dict[str, float]] = []
    for step, value in enumerate(values):
        lines += [
            {"step": step, "eval_rewards/right/mean": value, "eval_rewards/upright/mean": 0.0},
            {"step": step, "loss": 0.0},
        ]
    assert StopAt({"right": 0.97}).reached(lines) is ends


def test_each_data_set_counts() -> None:
    high = {"eval_a_rewards/right/mean": 0.99, "eval_b_rewards/right/mean": 0.98}
    low = high | {"eval_b_rewards/right/mean": 0.5}
    assert StopAt({"right": 0.97}).reached([{"step": 1} | high, {"step": 2} | high])
    assert not StopAt({"right": 0.97}).reached([{"step": 1} | high, {"step": 2} | low])


def test_one_evaluation_that_is_logged_twice_is_one() -> None:
    line = {"step": 3, "eval_rewards/right/mean": 1.0}
    assert not StopAt({"right": 0.97}).reached([line, line])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_at": {"even_word": 0.9}}, r"stop_at names 'even_word', .* even_words.*even_words"),
        ({"stop_at": {"even_words": "high"}}, r"stop_at=\{'even_words': 'high'\} must map rewards to numbers"),
        ({"stop_at": {}}, r"stop_at=\{\} must map"),
        ({"stop_at": 0.9}, r"stop_at=0.9 must map"),
        ({"stop_at": {"even_words": 0.9}, "eval_dataset": None, "eval_strategy": "no"}, "needs evaluations"),
        ({"stop_at": {"even_words": 0.9}, "eval_strategy": "no"}, "needs evaluations"),
    ],
)
def test_what_cannot_end_a_run_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **OPTIONS | settings)
