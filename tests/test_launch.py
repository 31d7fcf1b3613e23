"""`accelerate launch recipes/train.py`, whole: two processes and two "machines" train as one; a process that dies ends the
others and is named, and the run goes on where it was, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.killed_run import metrics, samples
from tests.launched import launched, logged
from tests.runs import same

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "num_iterations": 2}
LORA = {"use_peft": True, "beta": 0.1}

# accelerate config, launchers, settings, how process 1 dies in its fourth step, what is said of it
DEATHS: dict[str, tuple[str, int, dict[str, Any], str, str]] = {
    "FSDP2": ("cpu_fsdp2_2proc", 1, {}, "SIGKILL", r"Signal 9 \(SIGKILL\) received by PID"),
    "two machines, LoRA": ("cpu_2proc", 2, LORA, "raise", "RuntimeError: this process was told to fail"),
}


@pytest.mark.parametrize(("config", "machines", "settings", "how", "said"), DEATHS.values(), ids=DEATHS)
def test_a_run_that_loses_a_process_goes_on(
    tmp_path: Path, config: str, machines: int, settings: dict[str, Any], how: str, said: str
) -> None:
    settings = SAVING | settings
    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    launched(alone, "single", **settings, per_device_train_batch_size=16)
    launched(whole, config, **settings)
    with pytest.raises(RuntimeError, match=said):
        launched(killed, config, machines=machines, **settings, model_options={"dies": death(how)})
    launched(killed, config, machines=machines, **settings, resume_from_checkpoint="auto")
    assert logged(whole, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    assert repr(metrics(killed)) == repr(metrics(whole))
    assert samples(killed) == samples(whole)
    assert same(final_weights(killed), final_weights(whole))


def death(how: str) -> dict[str, Any]:
    """Of process 1, in its fourth step."""
    return {"rank": 1, "forward": 4, "how": how}


def final_weights(folder: Path) -> dict[str, Any]:
    """What the run has saved at its end."""
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)
