"""What a unique token costs, by group size, budget, prompt, vocabulary and processes: `python -m benchmarks.scaling`.

The packed side of sides/ours.py alone, in float32: seconds of the training phase over the tokens of an update that are there
once (every prompt, and every completion, its last token included). The head is work that only completion tokens have, so
the head's share grows along "group size", whose micro-batches have a CPU's default budget. "weights" is a model of about
100 million: its share of the measured peak of matrix products counts every product once (MFU). Each value is its own
process; values of an axis take turns. Writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, make_data, make_model, make_tokenizer
from benchmarks.side_by_side import RESULTS, Worker, setting
from benchmarks.sides.ours import samples_of
from grpo_hf.packing.layout import TOKENS_PER_MICROBATCH, pack
from grpo_hf.training.throughput import cost_of, matmul_peak, update_flops

SIDE = "grpo_hf"
BASE = Case(192, 64, equal=True)
SAMPLES = Case(64, 128, equal=True, budget=TOKENS_PER_MICROBATCH["cpu"])
AXES: dict[str, dict[str, Case]] = {
    "group size": {str(size): replace(SAMPLES, groups=64 // size, group_size=size, rows=size) for size in (2, 8, 64)},
    "budget": {
        f"{tokens:,}": replace(SAMPLES, groups=1, group_size=64, rows=64, budget=tokens)
        for tokens in (1024, 2048, 4096, 8192)
    },
    "prompt": {str(length): replace(BASE, prompt=length) for length in (64, 256, 1024, 2048)},
    "vocabulary": {f"{size:,}": replace(BASE, vocabulary=size) for size in (1_000, 8_000, 32_000, 152_000)},
    "weights": {"40 million": BASE, "100 million": replace(BASE, hidden=640, layers=10)},
    "processes": {"1": BASE, "2": BASE},
}
"""Axis -> value -> case."""


def unique_tokens(case: Case) -> int:
    """Of an update: each prompt once, and its completions."""
    data = make_data(case)
    return sum(map(len, data.prompts)) + sum(len(made.ids) for group in data.completions for made in group)


def model_flops(case: Case) -> int:
    """Floating-point operations that an update needs."""
    samples = samples_of(case, make_data(case))
    return update_flops(cost_of(make_model(case)), pack(samples, tokens_per_microbatch=1_000_000))


def measure_axis(axis: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Every value in turn, in each round; the first round is not counted."""
    cases = AXES[axis]
    with tempfile.TemporaryDirectory() as name:
        workers = {}
        for number, (value, case) in enumerate(cases.items()):
            folder = Path(name, str(number))
            make_model(case).save_pretrained(folder / "model")
            make_tokenizer(case.vocabulary).save_pretrained(folder / "model")
            processes = int(value) if axis == "processes" else 1
            workers[value] = Worker(SIDE, case, model=folder / "model", folder=folder, processes=processes)
        rounds = [{value: worker.step() for value, worker in workers.items()} for _ in range(repeats + 1)][1:]
        for worker in workers.values():
            worker.close()
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    cost = {v: [1e3 * answers[v]["wall_s"] / unique_tokens(case) for answers in rounds] for v, case in cases.items()}
    to_first = {v: [own / one for own, one in zip(cost[v], cost[next(iter(cases))], strict=True)] for v in cases}
    results = {}
    for value, case in cases.items():
        seconds = [answers[value]["wall_s"] for answers in rounds]
        rate = model_flops(case) / statistics.median(seconds)
        results[value] = {
            "wall_s": statistics.median(seconds),
            "wall_spread_s": [min(seconds), max(seconds)],
            "peak_mib": max(answers[value]["peak_mib"] for answers in rounds),
            "unique_tokens": unique_tokens(case),
            "ms_per_unique_token": statistics.median(cost[value]),
            "to_first": statistics.median(to_first[value]),
            "gflops": rate / 1e9,
            "matmul_peak_gflops": peak / 1e9,
            "mfu": rate / peak,
        }
    return results


def main() -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", action="append", choices=AXES, help="this one only; may be given again")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds")
    args = parser.parse_args()
    output = RESULTS / "scaling.json"
    written = json.loads(output.read_text())["axes"] if output.exists() else {}
    for axis in args.axis or AXES:
        written[axis] = measure_axis(axis, args.repeats)
        output.write_text(json.dumps({"setting": setting(), "axes": written}, indent=1) + "\n")
        print(
            f"{axis:14}{'s a step':>10}{'unique tokens':>15}{'ms a token':>12}{'to first':>10}{'of peak':>9}{'peak MiB':>10}"
        )
        for value, row in written[axis].items():
            print(
                f"{value:14}{row['wall_s']:10.2f}{row['unique_tokens']:15}{row['ms_per_unique_token']:12.3f}"
                f"{row['to_first']:10.2f}{row['mfu']:9.0%}{row['peak_mib']:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
