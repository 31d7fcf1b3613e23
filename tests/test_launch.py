"""`accelerate launch recipes/train.py`, whole: two processes and two "machines" train as one; a process that dies ends the
others and is named, and the run goes on where it was, to the last bit."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from grpo_hf.cli.train import main
from tests.killed_run import metrics, samples
from tests.launched import launched, logged, write_recipe
from tests.runs import same

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "num_iterations": 2}
LORA = {"use_peft": True, "beta": 0.1}
FAILURE = r"(?s)rank +: 1 .*traceback : .*RuntimeError: this process was told to fail"
# either the launcher sees the death first, or process 0 misses the other one
KILLED = r"Signal 9 \(SIGKILL\) received by PID|Connection (closed|reset) by peer"

DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed")

# how it is launched, settings, how process 1 dies in its fourth step, what is said of it
DEATHS = [
    pytest.param({"config": "cpu_fsdp2_2proc"}, {}, "SIGKILL", KILLED, id="FSDP2"),
    pytest.param({"config": "cpu_2proc", "machines": 2}, LORA, "raise", FAILURE, id="two machines, LoRA"),
    pytest.param({"config": "zero2", "processes": 2}, LORA, "raise", FAILURE, id="ZeRO-2, LoRA", marks=DEEPSPEED),
    pytest.param({"config": "zero3", "processes": 2}, {}, "raise", FAILURE, id="ZeRO-3", marks=DEEPSPEED),
]


@pytest.mark.parametrize(("way", "settings", "how", "said"), DEATHS)
def test_a_run_that_loses_a_process_goes_on(
    tmp_path: Path, way: dict[str, Any], settings: dict[str, Any], how: str, said: str
) -> None:
    settings = SAVING | settings
    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    main([str(write_recipe(alone, **settings, per_device_train_batch_size=16))])
    launched(whole, **way | {"machines": 1}, **settings)
    with pytest.raises(RuntimeError, match=said):
        launched(killed, **way, **settings, model_options={"dies": death(how)})
    launched(killed, **way, **settings, resume_from_checkpoint="auto")
    assert logged(whole, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    assert repr(metrics(killed)) == repr(metrics(whole))
    assert samples(killed) == samples(whole)
    assert same(final_weights(killed), final_weights(whole))


def test_processes_stop_together_and_another_number_goes_on(tmp_path: Path) -> None:
    """In the middle of a rollout, whose updates are shared anew; from two processes to one and from one to two."""
    alone, two, one = (tmp_path / name for name in ("alone", "two", "one"))
    sizes = {"one": {"per_device_train_batch_size": 16}, "two": {"per_device_train_batch_size": 8}}
    settings = SAVING | {"beta": 0.1}
    main([str(write_recipe(alone, **settings, **sizes["one"]))])
    stop: dict[str, Any] = {"dies": {"rank": 1, "forward": 3, "how": "SIGTERM"}}
    with pytest.raises(RuntimeError, match=f"stopped after step 3: go on from {two / 'checkpoint-3'}"):
        launched(two, "cpu_2proc", **settings, **sizes["two"], model_options=stop)
    main([str(write_recipe(two, **settings, **sizes["one"], resume_from_checkpoint="auto"))])
    stop["dies"]["rank"] = 0
    assert main([str(write_recipe(one, **settings, **sizes["one"], model_options=stop))]) == 128 + signal.SIGTERM
    (said,) = launched(one, "cpu_2proc", **settings, **sizes["two"], resume_from_checkpoint="auto")
    assert "number of processes 1 -> 2. Sums over processes are taken in another order" in said
    for folder in (two, one):
        assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
        assert logged(folder, "kl") == pytest.approx(logged(alone, "kl"), rel=1e-3)


def death(how: str) -> dict[str, Any]:
    """Of process 1, in its fourth step."""
    return {"rank": 1, "forward": 4, "how": how}


def final_weights(folder: Path) -> dict[str, Any]:
    """What the run has saved at its end."""
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)
