"""A run's folder: one run at a time, an earlier one's files set aside, a record that outlives full disks and resumes."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.report import read_metrics
from grpo_hf.rollout.peers import ALONE
from grpo_hf.training.checkpoints import checkpoints_in, newest_checkpoint, run_of
from grpo_hf.training.folder import METRICS, STARTS, RunFolder, as_json, check_writable
from tests.runs import AfterStep, StopAfter, logs, same, weights
from tests.tiny import tiny_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in map(json.loads, (folder / METRICS).read_text().splitlines()) if "loss" in line]


# ---- A folder that is used again


def test_a_new_run_sets_checkpoints_and_model_of_an_earlier_one_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotation cannot delete the new ones for older ones with higher numbers, nor "auto" go on from the other run."""
    earlier = tiny_trainer(tmp_path, max_steps=4, **SAVING)
    earlier.train()
    earlier.save_model()
    (tmp_path / "notes.txt").write_text("the user's")
    new = tiny_trainer(tmp_path, max_steps=4, seed=7, save_total_limit=1, callbacks=[StopAfter(2)], **SAVING)
    new.evaluate([{"prompt": "w1 w2"}])
    new.train()
    assert (
        f"{tmp_path} holds an earlier run, which is now in {tmp_path / 'earlier-1'}: README.md, checkpoint-1, checkpoint-2"
        in caplog.text
    )
    here = [".lock", "checkpoint-2", "earlier-1", METRICS, "notes.txt", STARTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == here
    aside = {path.name for path in (tmp_path / "earlier-1").iterdir()}
    assert {"checkpoint-4", METRICS, "model.safetensors", "README.md"} <= aside
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert run_of(tmp_path / "checkpoint-2")["seed"] == 7


def test_a_model_that_lies_where_the_run_writes_stays(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, **SAVING)
    run.train()
    run.save_model()
    again = tiny_trainer(tmp_path, model=type(run.model).from_pretrained(tmp_path))
    again.train()
    assert (tmp_path / "model.safetensors").is_file() and not checkpoints_in(tmp_path)


def test_what_came_after_the_checkpoint_that_a_run_goes_on_from_is_not_its_own(tmp_path: Path) -> None:
    """Otherwise "auto" would go on from there at the next kill."""
    options = {"save_rollouts": True, **SAVING}
    tiny_trainer(tmp_path, max_steps=4, **options).train()
    run = tiny_trainer(tmp_path, max_steps=4, learning_rate=0.1, callbacks=[StopAfter(3)], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert [path.name for path in checkpoints_in(tmp_path / "earlier-1")] == ["checkpoint-4", "checkpoint-3"]
    assert len(list((tmp_path / "rollouts").iterdir())) == 3
    assert steps(tmp_path) == [1, 2, 3]


def test_a_damaged_checkpoint_of_a_later_step_costs_no_whole_one(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_total_limit": 1, **SAVING}
    tiny_trainer(tmp_path, callbacks=[StopAfter(2)], **options).train()
    (tmp_path / "checkpoint-9").mkdir()
    tiny_trainer(tmp_path, callbacks=[StopAfter(4)], **options).train(resume_from_checkpoint="auto")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-4"]


# ---- One run at a time


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    other = tiny_trainer(tmp_path)

    def start_another(state: Any, model: Any) -> None:
        with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*: two runs .*set another output_dir"):
            other.train()

    tiny_trainer(tmp_path, callbacks=[AfterStep(start_another)]).train()
    other.train()


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path, ALONE).lock():
            os.write(there, b"locked")
            signal.pause()
    os.read(here, 6)
    with pytest.raises(ValueError, match=f"in use by process {child} "), RunFolder(tmp_path, ALONE).lock():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunFolder(tmp_path, ALONE).lock():
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/sys/run")):
        with pytest.raises(ValueError, match=f"output_dir='{folder}' cannot be written to: .*; set it to a folder that can"):
            check_writable(folder)


# ---- The record


def test_numbers_that_json_does_not_know() -> None:
    assert as_json({"step": 1, "reward": math.nan, "kl": math.inf}) == '{"step": 1, "reward": null, "kl": null}\n'


def test_a_disk_that_others_fill_costs_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lines and samples go to a device that is always full from step 2 to 4."""
    path, rollouts = tmp_path / METRICS, tmp_path / "rollouts"

    def fill_and_free(state: Any, model: Any) -> None:
        if state.global_step == 2:
            path.rename(tmp_path / "moved")
            path.symlink_to("/dev/full")
            (rollouts / "rollout-000002-0.partial").symlink_to("/dev/full")
        if state.global_step == 4:
            (tmp_path / "moved").rename(path)

    run = tiny_trainer(tmp_path, max_steps=4, save_rollouts=True, callbacks=[AfterStep(fill_and_free)])
    run.train()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert f"{path} cannot be written, the disk has " in caplog.text
    assert "the samples of rollout 2 are not saved, the disk has " in caplog.text
    assert sorted(path.name for path in rollouts.glob("*.parquet")) == [f"rollout-00000{n}-0.parquet" for n in (0, 1, 3)]
    assert [line.get("guards/disk_full") for line in logs(run)] == [None, None, 1, None]


def test_checkpoints_stay_small_and_a_resumed_run_has_every_line(tmp_path: Path) -> None:
    """In its history, which guards look at, as in its file, which the report reads; in another folder too."""
    options = {"learning_rate": 0.01, **SAVING}
    whole = tiny_trainer(tmp_path / "whole", max_steps=14, **options)
    whole.train()
    state = json.loads((tmp_path / "whole" / "checkpoint-14" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"]] == list(range(5, 15))
    tiny_trainer(tmp_path / "stopped", max_steps=14, callbacks=[StopAfter(12)], **options).train()
    resumed = tiny_trainer(tmp_path / "elsewhere", max_steps=14, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-12"))
    assert [line["reward"] for line in logs(resumed)] == [line["reward"] for line in logs(whole)]
    assert [line["step"] for line in read_metrics(tmp_path / "elsewhere" / METRICS)] == list(range(1, 15))
    assert same(weights(resumed.model), weights(whole.model))
