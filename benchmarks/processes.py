"""The same run in several processes: `python -m benchmarks.processes`.

Every way is `accelerate launch recipes/train.py` with one of accelerate_configs, on the CPU, on a tiny recipe: one process;
two with a copy of the model each; two that share its weights; two launchers, as on two machines, that meet on the loopback;
and DeepSpeed where it is installed. Printed are their losses, and how far these and the gradient norms are from those of one
process; then how evenly two processes share tokens of uneven groups. Writes benchmarks/results/processes.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.launched import launched, logged

WAYS: dict[str, dict[str, Any]] = {
    "one process": {"config": "single", "per_device_train_batch_size": 16},
    "two, DDP": {"config": "cpu_2proc"},
    "two, FSDP2": {"config": "cpu_fsdp2_2proc"},
    "two machines, DDP": {"config": "cpu_2proc", "machines": 2},
    "two machines, FSDP2": {"config": "cpu_fsdp2_2proc", "machines": 2},
}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "two, ZeRO-2": {"config": "zero2", "processes": 2},
    "two, ZeRO-3": {"config": "zero3", "processes": 2},
}
# The loss of a first update without KL follows from the advantages alone; with KL it depends on every weight.
TRAINED: dict[str, dict[str, Any]] = {"all weights": {"beta": 0.1}, "LoRA": {"beta": 0.1, "use_peft": True}}
UNEVEN = {"dataset_options": {"uneven": 64}, "per_device_train_batch_size": 32, "max_completion_length": 30}


def five_steps(settings: dict[str, Any], ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms, by way."""
    found = {}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            launched(Path(folder), **way, **settings)
            found[name] = {metric: logged(Path(folder), metric) for metric in ("loss", "grad_norm")}
    return found


def largest_difference(one: list[float], other: list[float]) -> float:
    """Relative."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def max_over_mean(balance: bool) -> float:
    """Tokens forwarded: those of the process that has the most, over the mean; the mean of five steps."""
    with tempfile.TemporaryDirectory() as folder:
        launched(Path(folder), "cpu_2proc", **UNEVEN, balance_processes=balance)
        return statistics.fmean(logged(Path(folder), "tokens/max_over_mean"))


def main() -> None:
    """All ways, then the balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "processes.json")
    args = parser.parse_args()
    ways = WAYS | (DEEPSPEED if importlib.util.find_spec("deepspeed") else {})
    results: dict[str, Any] = {"five_steps": {}, "largest_relative_difference": {}}
    for trained, settings in TRAINED.items():
        found = results["five_steps"][trained] = five_steps(settings, ways)
        one = found["one process"]
        results["largest_relative_difference"][trained] = apart = {
            name: {metric: largest_difference(one[metric], other[metric]) for metric in one} for name, other in found.items()
        }
        print(f"\n{trained}: five losses; the largest relative difference from one process of losses and gradient norms")
        for name, values in found.items():
            shown = " ".join(f"{value:10.6f}" for value in values["loss"])
            print(f"{name:20} {shown}  {apart[name]['loss']:.1e} {apart[name]['grad_norm']:.1e}", flush=True)
    results["max_over_mean_tokens"] = {"as sampled": max_over_mean(False), "balanced": max_over_mean(True)}
    shares = ", ".join(f"{name} {value:.3f}" for name, value in results["max_over_mean_tokens"].items())
    print(f"\ntokens of two processes, max / mean: {shares}")
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
