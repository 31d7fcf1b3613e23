"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with the run that was never killed.

    python -m tests.killed_run FOLDER --kills 20 --seed 0 --settings '{"beta": 0.1}'

Every attempt is a process of its own, forked from one that has only imported. Prints the steps that each attempt took, and
where it was when it was killed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_hf import GRPOTrainer
from tests.agents import Room, agent_model, agent_trainer, dice, look
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


class Places(TrainerCallback):
    """Says, at every place of a step, how many steps are finished and which place it is."""

    def __init__(self, pipe: int):
        self.pipe, self.steps = pipe, 0

    def watch(self, trainer: Any) -> None:
        """Hear of the trainer's phases, and of its checkpoints."""
        phase, save = trainer.metrics.phase, trainer._save_checkpoint
        trainer.metrics.phase = lambda name: (self.say(name), phase(name))[1]
        trainer._save_checkpoint = lambda *args: (self.say("checkpoint"), save(*args), self.say("between updates"))[1]

    def say(self, place: str) -> None:
        """Write it."""
        os.write(self.pipe, f"{self.steps} {place}\n".encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first place."""
        self.steps = state.global_step
        self.say("between updates")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count it."""
        self.steps = state.global_step


AGENTS: dict[str, dict[str, Any]] = {"tools": {"tools": [dice, look]}, "environment": {"environment_factory": Room}}
"""What the setting ``agents`` gives the trainer."""


def make_trainer(folder: Path, settings: dict[str, Any], *callbacks: TrainerCallback) -> GRPOTrainer:
    """Of tests/tiny.py or, with the setting ``agents``, of tests/agents.py, with a model that vLLM can run where it does."""
    settings = BASE | settings
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if settings.pop("lora", False) else None
    vllm = settings.get("use_vllm", False)
    options: dict[str, Any] = settings | {"callbacks": list(callbacks), "peft_config": peft_config}
    if agents := options.pop("agents", None):
        return agent_trainer(folder, model=agent_model(vllm=vllm), **AGENTS[agents], **options)
    if vllm:
        from tests.tiny_vllm import STOPS, vllm_model

        model = vllm_model(tied=True)
        model.generation_config.eos_token_id = list(STOPS)
    else:
        model = tiny_model()
        model.generation_config.eos_token_id = list(range(77, 97))
    return tiny_trainer(folder, model=model, **options)


def train(folder: Path, settings: dict[str, Any], pipe: int) -> None:
    """The run, from its newest checkpoint to its end."""
    places = Places(pipe)
    trainer = make_trainer(folder, settings, places)
    places.watch(trainer)
    trainer.train(resume_from_checkpoint="auto")
    torch.save(trainer.model.state_dict(), folder / "final.pt")


def attempt(folder: Path, settings: dict[str, Any], generator: random.Random | None = None, most: int = 0) -> list[str]:
    """One process: every place that it has come to. With a generator it is killed after one of the first ``most``."""
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
    last_one, places = generator.randint(1, most) if generator else sys.maxsize, []
    with os.fdopen(here, "rb", buffering=0) as pipe:
        while len(places) < last_one and (place := pipe.readline().decode()):
            places.append((time.monotonic(), place.strip()))
        if generator and len(places) == last_one:
            time.sleep(generator.uniform(0, SECONDS.get(places[-1][1].split(maxsplit=1)[1], 0.0)))
            os.kill(child, signal.SIGKILL)
        rest = pipe.read().decode().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])
    for (start, place), (end, _) in pairwise(places):
        name = place.split(maxsplit=1)[1]
        SECONDS[name] = min(SECONDS.get(name, math.inf), end - start)
    return [place for _, place in places] + rest


SECONDS: dict[str, float] = {}
"""What each place has taken at the least."""


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every log line but the summary, which knows of the last attempt only."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [timeless(line) for line in lines if "train_loss" not in line]


def samples(folder: Path) -> dict[str, list]:
    """Every rollout's rows, by file, without what its turns have taken."""
    files = sorted((folder / "rollouts").iterdir())
    rows = {path.name: pq.read_table(path).to_pylist() for path in files}
    for row in (row for part in rows.values() for row in part):
        row["turns"] = re.sub(r'"seconds": [0-9.e-]+', "", row["turns"] or "")
    return rows


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
    if args.settings.pop("server", False):
        with served(args.folder, args.settings) as settings:
            return compare(args.folder, settings, kills=args.kills, seed=args.seed)
    if args.settings.get("use_vllm"):
        import vllm  # noqa: F401  the attempts find it imported
    compare(args.folder, args.settings, kills=args.kills, seed=args.seed)


@contextmanager
def served(folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a run that samples on a server, while that runs."""
    from tests.server import Server

    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, model=agent_model(vllm=True), max_model_len=256) if "agents" in settings else Server(folder)
    server.start()
    try:
        server.wait()
        yield settings | server.settings()
    finally:
        server.stop()


def compare(folder: Path, settings: dict[str, Any], *, kills: int, seed: int) -> None:
    """The run that is never killed, the other, and what they do not have in common."""
    whole, killed, steps = folder / "whole", folder / "killed", (BASE | settings)["max_steps"]
    folder.mkdir(parents=True, exist_ok=True)
    attempt(whole, settings)
    generator = random.Random(seed)
    lives: list[str] = []
    places: Counter[str] = Counter()
    finished = 0
    for number in range(kills):
        # Each life is short enough for the later ones to have something left of the run: four places a step, or more.
        life = attempt(killed, settings, generator, max(1, 4 * (steps - finished) // (kills - number)))
        finished, place = int(life[-1].split()[0]), life[-1].split(maxsplit=1)[1]
        lives.append(f"{life[0].split()[0]}-{finished}")
        places[place] += 1
    assert not (killed / "final.pt").exists(), "the run has ended before the last kill"
    attempt(killed, settings)
    found = differences(whole, killed)
    where = ", ".join(f"{count} in {place}" for place, count in places.items())
    print(f"{len(lives)} kills, in the steps {', '.join(lives)} of {steps} ({where}); differences: {found or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
