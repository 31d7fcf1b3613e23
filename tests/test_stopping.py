"""Ctrl-C and SIGTERM stop a run between two steps with a checkpoint, and it goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.cli.train import main
from grpo_hf.training.checkpoints import checkpoints_in, newest_checkpoint
from grpo_hf.training.stopping import ONE_PRESS, RunStopped
from tests.launched import write_recipe
from tests.runs import AfterStep, logs, same, timeless, weights
from tests.tiny import even_words, tiny_trainer

OPTIONS: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.01, "logging_steps": 2, "num_iterations": 2}
SAVING = {"save_strategy": "steps", "save_steps": 4}


def at_step(step: int, *signals: int, pause: float = 0.0) -> AfterStep:
    """Sends this process these signals when the step has been taken, before its log line."""

    def send(state: Any, model: Any) -> None:
        if state.global_step == step:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(pause)

    return AfterStep(send)


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C, sent twice"]
)
@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_is_asked_to_stop(
    tmp_path: Path, step: int, signals: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher may hand on what the terminal has sent already."""
    before = [signal.getsignal(number) for number in signals]
    whole = tiny_trainer(tmp_path / "whole", **OPTIONS)
    whole.train()
    stopped = tiny_trainer(tmp_path / "run", callbacks=[at_step(step, *signals)], **OPTIONS | SAVING)
    with pytest.raises(RunStopped) as caught:
        stopped.train()
    assert caught.value.code == 128 + signals[0]
    said = capsys.readouterr().err
    assert f"{signal.Signals(signals[0]).name}: the run stops after this step" in said
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert f"stopped after step {step}: go on from {checkpoint} with --resume_from_checkpoint auto" in said
    assert checkpoints_in(tmp_path / "run") == [checkpoint]
    resumed = tiny_trainer(tmp_path / "run", **OPTIONS | SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert [timeless(line) for line in logs(resumed)] == [timeless(line) for line in logs(whole)]
    assert same(weights(resumed.model), weights(whole.model))
    assert [signal.getsignal(number) for number in signals] == before


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    twice = at_step(1, signal.SIGINT, signal.SIGINT, pause=ONE_PRESS + 0.2)
    run = tiny_trainer(tmp_path, callbacks=[twice], **OPTIONS | SAVING)
    with pytest.raises(SystemExit) as caught:
        run.train()
    assert caught.value.code == 130 and not isinstance(caught.value, RunStopped)
    assert newest_checkpoint(tmp_path) is None


def test_a_run_that_saves_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_trainer(tmp_path, callbacks=[at_step(1, signal.SIGTERM)], **OPTIONS)
    with pytest.raises(RunStopped):
        run.train()
    assert "stopped after step 1: no checkpoint is there to go on from" in capsys.readouterr().err


def interrupts(completion: str) -> float:
    """A verifier in this process, in whose call Ctrl-C is pressed."""
    os.kill(os.getpid(), signal.SIGINT)
    return even_words(completion)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No last evaluation, no model that looks like the end of a run, no traceback."""
    rewards = [{"name": "tests.test_stopping:interrupts", "in_process": True}]
    recipe = write_recipe(tmp_path, save_strategy="steps", save_steps=10, rewards=rewards, write_report=True)
    assert main([str(recipe)]) == 130
    said = capsys.readouterr().err
    assert "stopped after step 1: go on from " in said and "Traceback" not in said
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "report.html").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_before_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, model_function="tests.test_stopping:interrupted")
    assert main([str(recipe)]) == 130
    assert "stopped outside of training" in capsys.readouterr().err


def interrupted(*, seed: int) -> None:
    """A model that takes long to load."""
    raise KeyboardInterrupt
