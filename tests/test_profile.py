"""A profile holds whole steps, names their parts, and is asked for with a number that the run has steps for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_hf import GRPOConfig
from grpo_hf.training.callbacks import TOP
from tests.runs import StopAfter, same, weights
from tests.test_cli import tiny_recipe, train_main  # noqa: F401  (the first is a fixture)
from tests.tiny import tiny_trainer


def events(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "profile" / "trace-0.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def count(folder: Path, name: str) -> int:
    return sum(event.get("name") == name and event.get("cat") == "user_annotation" for event in events(folder))


def test_a_profile_from_the_command_line(tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Two steps after the first, from sampling to the optimizer, with their operators."""
    train_main([tiny_recipe, "--profile", "2", "--max_steps", "4", "--per_device_train_batch_size", "8"])
    run = tmp_path / "run"
    for part in ("generate", "score", "forward_backward", "optimizer"):
        assert count(run, f"time/{part}") == 2
    names = {event.get("name") for event in events(run)}
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= names
    shown = capsys.readouterr().err.splitlines()
    start = shown.index(f"profile of 2 steps: {run / 'profile' / 'trace-0.json.gz'}")
    head, *rows = shown[start + 1 : start + 2 + TOP]
    assert head.split() == ["own", "time", "on", "the", "CPU", "ms", "share", "calls"]
    shares = [float(row.split()[-2].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1


def test_a_profiled_run_is_the_same_run(tmp_path: Path) -> None:
    def run(**settings: Any) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(tmp_path, max_steps=3, **settings)
        trainer.train()
        return weights(trainer.model)

    assert same(run(profile=1), run())


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, max_steps=6, profile=4, callbacks=[StopAfter(2)]).train()
    assert "profile of 1 step: " in capsys.readouterr().err
    assert count(tmp_path, "time/forward_backward") == 1


def test_as_many_steps_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="profile=-1, but profile >= 0 is needed"):
        GRPOConfig(output_dir="unused", use_cpu=True, profile=-1)
    with pytest.raises(ValueError, match="max_steps=2, profile=2, but profile < max_steps is needed"):
        GRPOConfig(output_dir="unused", use_cpu=True, profile=2, max_steps=2)
    trainer = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=1, profile=3)
    with pytest.raises(ValueError, match=r"profile=3 takes 4 steps, the first to warm up, and this run has 3 left; lower"):
        trainer.train()
    assert not (tmp_path / "profile").exists()
