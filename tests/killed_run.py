"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with the run that was never killed.

    python -m tests.killed_run FOLDER --kills 20 --seed 0 --settings '{"beta": 0.1}'

Every attempt is a process of its own, forked from one that has only imported. Prints how many steps each attempt took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.runs import timeless
from tests.tiny import tiny_model, tiny_trainer

BASE: dict[str, Any] = {
    "max_steps": 48,
    "learning_rate": 0.01,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "save_rollouts": True,
    "logging_steps": 3,
}


class Moments(TrainerCallback):
    """Says how far the run is, at several places of each step."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def say(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the number of finished steps."""
        os.write(self.pipe, bytes([state.global_step]))

    on_train_begin = on_step_begin = on_pre_optimizer_step = on_step_end = on_save = say


def train(folder: Path, settings: dict[str, Any], pipe: int) -> None:
    """The run, from its newest checkpoint to its end."""
    settings = BASE | settings
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if settings.pop("lora", False) else None
    if settings.get("use_vllm"):
        from tests.tiny_vllm import STOPS, vllm_model

        model = vllm_model(tied=True)
        model.generation_config.eos_token_id = list(STOPS)
    else:
        model = tiny_model()
        model.generation_config.eos_token_id = list(range(77, 97))
    trainer = tiny_trainer(folder, model=model, peft_config=lora, callbacks=[Moments(pipe)], **settings)
    trainer.train(resume_from_checkpoint="auto")
    torch.save(trainer.model.state_dict(), folder / "final.pt")


def attempt(folder: Path, settings: dict[str, Any], generator: random.Random | None) -> list[int]:
    """One process: the finished steps at every moment. With a generator it is killed somewhere after one of them."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(here)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            train(folder, settings, there)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(there)
    moments: list[int] = []
    last_one, times = generator.randint(1, 16) if generator else sys.maxsize, [time.monotonic()]
    while len(moments) < last_one and (moment := os.read(here, 1)):
        moments += moment
        times.append(time.monotonic())
    if generator and len(moments) == last_one:
        time.sleep(generator.uniform(0, min(times[-1] - times[-2], 1.0)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(here)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])
    return moments


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every log line but the summary, which knows of the last attempt only."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [timeless(line) for line in lines if "train_loss" not in line]


def samples(folder: Path) -> dict[str, list]:
    """Every rollout's rows, by file."""
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "rollouts").iterdir())}


def differences(whole: Path, killed: Path) -> list[str]:
    """What the two runs do not have in common."""
    found = []
    if repr(metrics(whole)) != repr(metrics(killed)):  # NaN is not equal to itself
        pairs = zip(metrics(whole), metrics(killed), strict=False)
        found += [
            f"{key}: {a[key]} != {b.get(key)}, step {a['step']}" for a, b in pairs for key in a if a[key] != b.get(key)
        ]
    if repr(samples(whole)) != repr(samples(killed)):
        found.append("samples")
    one, other = torch.load(whole / "final.pt"), torch.load(killed / "final.pt")
    found += [name for name in one if not torch.equal(one[name], other[name])]
    return found


def main() -> None:
    """Both runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.settings.get("use_vllm"):
        import vllm  # noqa: F401  the attempts find it imported
    whole, killed, steps = args.folder / "whole", args.folder / "killed", (BASE | args.settings)["max_steps"]
    attempt(whole, args.settings, None)
    generator = random.Random(args.seed)
    lives: list[str] = []
    for _ in range(args.kills):
        moments = attempt(killed, args.settings, generator)
        lives.append(f"{moments[0]}-{moments[-1]}")
        if moments[-1] == steps:
            break
    if not (killed / "final.pt").exists():
        attempt(killed, args.settings, None)
    found = differences(whole, killed)
    print(f"{len(lives)} kills, in the steps {', '.join(lives)} of {steps}; differences: {found or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
