"""What a run was started with is kept beside its metrics, and nothing secret is."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from grpo_hf.training.starts import command
from tests.tiny import tiny_trainer


def test_a_run_keeps_what_it_was_started_and_gone_on_with(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "hub_token": "secret"}
    saving["model_init_kwargs"] = {"token": "secret", "dtype": "float32"}
    tiny_trainer(tmp_path, learning_rate=3e-4, **saving).train()
    tiny_trainer(tmp_path, learning_rate=1e-4, **saving).train(str(tmp_path / "checkpoint-1"))
    text = (tmp_path / "starts.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["step"], second["step"]) == (0, 1)
    assert (first["settings"]["learning_rate"], second["settings"]["learning_rate"]) == (3e-4, 1e-4)
    assert first["settings"]["max_steps"] == 2 and not {"beta", "accelerator_config"} & first["settings"].keys()  # defaults
    assert first["versions"]["torch"] == version("torch") and first["command"] == command(sys.orig_argv)
    assert "secret" not in text and first["settings"]["model_init_kwargs"] == {"token": "...", "dtype": "float32"}
    tiny_trainer(tmp_path, **saving).train()
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "earlier-2" / "starts.jsonl").read_text() == text  # earlier-1 has a later checkpoint


def test_a_command_is_written_without_secrets() -> None:
    argv = ["/usr/bin/python", "train.py", "a b.yaml", "--hub_token", "abc", "--seed", "1", "--api-key=xyz"]
    assert command(argv) == "python train.py 'a b.yaml' --hub_token ... --seed 1 --api-key=..."
    for entry in ('{"token": "abc", "dtype": "float32"}', "{dtype: float32, token: abc}", "{'api_key': 'abc'}"):
        written = command(["python", "train.py", "--model_init_kwargs", entry, "--pad_token_id", "7"])
        assert "abc" not in written and "..." in written and "--pad_token_id 7" in written
        assert "dtype" not in entry or "float32" in written
