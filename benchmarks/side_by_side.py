"""Sides that take turns: starts a process for each (sides/), compares their gradients, and sums up what they took."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, make_model, make_tokenizer
from benchmarks.sides import NEEDS, gradient_file
from grpo_hf.training.throughput import matmul_peak

LEAST_COSINE = 0.9999
RESULTS = Path(__file__).parent / "results"
TWO_PROCESSES = Path(__file__).parents[1] / "accelerate_configs" / "cpu_2proc.yaml"


def arguments(description: str | None, cases: Iterable[str], sides: Sequence[str] = ()) -> argparse.Namespace:
    """The options of a command that measures cases, and of one whose sides can be chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=cases, help="this one only; may be given again")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds; 0: the first is what counts")
    if sides:
        parser.add_argument("--side", action="append", choices=sides, help="beside this one only; may be given again")
    return parser.parse_args()


class Worker:
    """A side in a process of its own, or in two."""

    def __init__(self, side: str, case: Case, *, model: Path, folder: Path, processes: int = 1):
        spec = json.dumps({"side": side, "case": asdict(case), "model": str(model), "folder": str(folder)})
        launch = ["accelerate.commands.launch", "--config_file", str(TWO_PROCESSES), "-m"] if processes == 2 else []
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        threads = {"OMP_NUM_THREADS": "1"} if processes == 2 else {}
        self.log = (folder / f"{side}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *launch, "benchmarks.sides", spec],
            stderr=self.log,
            env=os.environ | threads | {"HF_HUB_OFFLINE": "1"},
            **pipes,
        )

    def step(self) -> dict[str, float]:
        """Let it take the steps of one rollout; what one step took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"a side ended: {self.log.read()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self.process.communicate()
        self.log.close()


def measure(case: Case, sides: Sequence[str], repeats: int) -> dict[str, Any]:
    """Medians over rounds of all sides, after a first one, which counts only when it is the only one (``repeats`` 0), and
    every other side over the last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(case).save_pretrained(folder / "model")
        make_tokenizer(case.vocabulary).save_pretrained(folder / "model")
        workers = {side: Worker(side, case, model=folder / "model", folder=folder) for side in sides}
        first = {side: worker.step() for side, worker in workers.items()}
        cosines = compare_gradients(folder, sides) if case.injected else {}
        rounds = [{side: worker.step() for side, worker in workers.items()} for _ in range(repeats)] or [first]
        for worker in workers.values():
            worker.close()
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    result: dict[str, Any] = {"case": asdict(case), "repeats": repeats, "matmul_gflops": round(peak / 1e9)}
    for side in sides:
        values = {name: [answers[side][name] for answers in rounds] for name in rounds[0][side]}
        result[side] = {name: statistics.median(value) for name, value in values.items()} | {
            "wall_spread_s": [min(values["wall_s"]), max(values["wall_s"])],
            "peak_mib": max(values["peak_mib"]),
        }
        if side in cosines:
            result[side]["cosine"] = cosines[side]
    ours = sides[-1]
    for side in sides[:-1]:
        result[f"{side}_over_{ours}"] = {
            name: statistics.median(answers[side][name] / answers[ours][name] for answers in rounds)
            for name in ("wall_s", "cpu_s", "tokens_forwarded")
        } | {"peak_mib": result[side]["peak_mib"] / result[ours]["peak_mib"]}
    return result


def compare_gradients(folder: Path, sides: Sequence[str]) -> dict[str, float]:
    """Cosine of each side's gradient with the last side's; ends the command where they do not take the same step."""
    gradients = {side: torch.load(gradient_file(folder, side)).double() for side in sides}
    cosines = {side: torch.cosine_similarity(g, gradients[sides[-1]], dim=0).item() for side, g in gradients.items()}
    if differ := {side: cosine for side, cosine in cosines.items() if not cosine > LEAST_COSINE}:
        raise SystemExit(
            f"{', '.join(differ)}: not the step of {sides[-1]}; cosines of the gradients are {differ}, "
            f"more than {LEAST_COSINE} is asked for"
        )
    return cosines


def setting() -> dict[str, Any]:
    """What the figures depend on, beside the case."""
    packages = {"torch", "transformers", "accelerate", "peft", *NEEDS.values()} - {"vllm"}
    versions = {name: version(name) for name in sorted(packages) if find_spec(name) is not None}
    return versions | {"threads": torch.get_num_threads()}
