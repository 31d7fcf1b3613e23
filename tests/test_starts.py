"""What a run was started with is kept beside its metrics, and nothing secret is."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from grpo_hf.training.starts import command
from tests.tiny import tiny_trainer


def test_a_run_keeps_what_it_was_started_and_gone_on_with(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "hub_token": "secret"}
    tiny_trainer(tmp_path, learning_rate=3e-4, **saving).train()
    tiny_trainer(tmp_path, learning_rate=1e-4, **saving).train(str(tmp_path / "checkpoint-1"))
    text = (tmp_path / "starts.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["step"], second["step"]) == (0, 1)
    assert (first["settings"]["learning_rate"], second["settings"]["learning_rate"]) == (3e-4, 1e-4)
    assert first["settings"]["max_steps"] == 2 and not {"beta", "accelerator_config"} & first["settings"].keys()  # defaults
    assert first["versions"]["torch"] == version("torch") and "pytest" in first["command"]
    assert "secret" not in text
    tiny_trainer(tmp_path, **saving).train()
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "earlier-2" / "starts.jsonl").read_text() == text  # earlier-1 has a later checkpoint


def test_a_command_is_written_without_secrets() -> None:
    argv = ["/usr/bin/python", "train.py", "a b.yaml", "--hub_token", "abc", "--seed", "1", "--api-key=xyz"]
    assert command(argv) == "python train.py 'a b.yaml' --hub_token ... --seed 1 --api-key=..."
