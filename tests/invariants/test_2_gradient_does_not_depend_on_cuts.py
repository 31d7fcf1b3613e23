"""Invariant 2: "The gradient does not depend on tokens_per_microbatch, on gradient accumulation, or on 1 versus 2
processes."
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.invariants.one_step import COMPLETIONS, gradient_of_one_step
from tests.tiny import relative_error

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_tokens_per_microbatch(tmp_path: Path, loss_type: str, layout: str) -> None:
    """From one forward pass for all completions to one for each."""
    options = {"loss_type": loss_type, "token_layout": layout}
    expected = gradient_of_one_step(tmp_path, tokens_per_microbatch=10_000, **options)
    for budget in (40, 1):
        gradient = gradient_of_one_step(tmp_path, tokens_per_microbatch=budget, **options)
        assert relative_error(gradient, expected) < 1e-5


def test_gradient_accumulation(tmp_path: Path) -> None:
    """However the step's 16 completions are split; 2 at a time cut through every group of 4."""
    expected = gradient_of_one_step(tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    for batch, accumulation in ((8, 2), (2, 8)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert relative_error(gradient_of_one_step(tmp_path, **split), expected) < 1e-5


CASES = {
    "full weights": {},
    "several micro-batches each": {"tokens_per_microbatch": 40},
    "the second process has no signal": {"tokens_per_microbatch": 40, "flat_from": 2},
    "tokens that are compared with all": {
        "tokens_per_microbatch": 40,
        "loss_type": "clip_cov",
        "clip_cov_ratio": 0.3,
        "clip_cov_lb": -2.0,
        "top_entropy_quantile": 0.5,
    },
    "experts and the balance between them": {"family": "mixtral", "tokens_per_microbatch": 40, "router_aux_loss_coef": 0.5},
    "lora, checkpointing, entropy": {"lora": True, "gradient_checkpointing": True, "entropy_coef": 0.1, "loss_type": "grpo"},
}


@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_fsdp2_2proc"])
def test_one_process_or_two(tmp_path: Path, config: str) -> None:
    """Two processes of 8 completions against one of 16: each with the whole model (DDP), or with a part of it (FSDP2)."""
    halves = [{"per_device_train_batch_size": COMPLETIONS // 2} | case for case in CASES.values()]
    (tmp_path / "settings.json").write_text(json.dumps(halves))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launch += ["--config_file", f"accelerate_configs/{config}.yaml", "-m", "tests.invariants.one_step", str(tmp_path)]
    done = subprocess.run(
        launch, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, case), gradient in zip(CASES.items(), torch.load(tmp_path / "gradients.pt"), strict=True):
        error = relative_error(gradient, gradient_of_one_step(tmp_path, **case))
        print(f"\n{name}: {error:.1e}", end="")
        assert error < 1e-5, name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
