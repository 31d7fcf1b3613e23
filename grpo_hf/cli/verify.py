"""`grpo-hf verify DATA --reward NAME ...`: score completions outside training, or check a dataset's gold answers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from tqdm.auto import tqdm

from grpo_hf.cli.data import load_table
from grpo_hf.rewards import FAULTS, OUTCOMES, Reward, RewardSettings, Verdict, check_gold, get_rewards, score_samples
from grpo_hf.types import Sample

SHOWN = 5
"""Slowest, faulty and disputed samples that are shown of each."""


@dataclass(frozen=True)
class Scored:
    """One row, and what became of it."""

    row: int
    """Its number."""
    text: str
    """The completion."""
    verdicts: dict[str, Verdict]
    """By verifier."""
    label: float | None
    """What it ought to score; None where nobody has said."""

    @property
    def disputed(self) -> bool:
        """Whether verifiers disagree, with each other or with the label, on which side of 0.5 it is."""
        scores = [verdict.score for verdict in self.verdicts.values() if verdict.outcome not in FAULTS]
        scores += [] if self.label is None else [self.label]
        return len({score > 0.5 for score in scores if not math.isnan(score)}) > 1


def main(argv: Sequence[str] | None = None) -> int:
    """0: every call ended well and no label is contradicted. 1: not so. 2: the command makes no sense."""
    args = parse(argv)
    rewards = get_rewards([yaml.safe_load(spec) for spec in args.reward])
    table = with_columns_of_rows(load_table(args.data, args.split))
    if args.limit is not None:
        table = table.select(range(min(args.limit, len(table))))
    settings = RewardSettings(timeout=args.timeout, workers=args.workers, memory_gb=args.memory_gb)
    if args.gold:
        return report_gold(rewards, table, settings)
    if args.completion_column not in table.column_names:
        raise ValueError(
            f"{args.data} has no column {args.completion_column!r}, only {', '.join(table.column_names)}; name the one with "
            "the completions: --completion-column NAME"
        )
    scored = list(score(rewards, table, args, settings))
    if args.output is not None:
        write(args.output, scored)
    return report(rewards, scored, args.max_fault_share)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="grpo-hf verify", description=__doc__)
    parser.add_argument("data", help="a file (.jsonl, .json, .csv, .parquet), a run's rollouts/, or a dataset's name")
    parser.add_argument("--reward", action="append", required=True, help="a name, or {name: math, mode: strict}; repeatable")
    parser.add_argument("--gold", action="store_true", help="only check that every gold answer can be read")
    parser.add_argument("--split", default="train", help="of a dataset given by name")
    parser.add_argument("--completion-column", default="completion")
    parser.add_argument("--label", help="a column with the score that is right; contradictions are disputes and fail")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--output", type=Path, help="write every verdict to this .jsonl file")
    parser.add_argument("--max-fault-share", type=float, default=0.0, help="faults that are let pass (exit status)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for each call")
    parser.add_argument("--workers", type=int, help="worker processes; default: the machine's cores")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="of one call")
    return parser.parse_args(argv)


def with_columns_of_rows(table: Dataset) -> Dataset:
    """The samples that a run has saved, with the columns of their rows, which are JSON there."""
    if not {"rollout", "row", "columns", "completion"} <= set(table.column_names):
        return table
    return table.map(lambda sample: json.loads(sample["columns"]), remove_columns="columns")


def score(rewards: list[Reward], table: Dataset, args: argparse.Namespace, settings: RewardSettings) -> Iterator[Scored]:
    """Every row's verdicts, in order."""
    samples = [sample_of(row, args.completion_column) for row in table]
    labels = [None] * len(samples) if args.label is None else [float(value) for value in table[args.label]]
    verdicts = score_samples(rewards, samples, settings=settings)
    for number, (sample, by_name) in enumerate(zip(samples, tqdm(verdicts, total=len(samples), desc="verify"), strict=True)):
        yield Scored(number, sample.text, by_name, labels[number])


def sample_of(row: dict[str, Any], column: str) -> Sample:
    """A row as verifiers see it; a completion may be text or chat messages."""
    completion = row[column]
    text = completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)
    return Sample(row.get("prompt", ""), completion, text, list(row.get("completion_ids") or []), row)


def report_gold(rewards: list[Reward], table: Dataset, settings: RewardSettings) -> int:
    """Name the rows whose gold answer a verifier cannot read."""
    checked = [reward.name for reward in rewards if reward.gold_column is not None]
    if not checked:
        print("none of these verifiers parses a gold answer; there is nothing to check")
        return 0
    bad = check_gold(rewards, table, settings=settings)
    for item in bad[:SHOWN]:
        print(f"row {item.row}, {item.verifier}: {item.message.splitlines()[-1]}")
    print(f"{len(bad)} of {len(table)} gold answers cannot be read by {', '.join(checked)}")
    return int(bool(bad))


def report(rewards: list[Reward], scored: list[Scored], max_fault_share: float) -> int:
    """Print what became of the calls; the exit status."""
    width = max(len(reward.name) for reward in rewards)
    print(" ".join([f"{'':<{width}}", *(f"{name:>9}" for name in (*OUTCOMES, "mean", "ms"))]))
    worst = 0.0
    for reward in rewards:
        verdicts = [item.verdicts[reward.name] for item in scored]
        counts = Counter(verdict.outcome for verdict in verdicts)
        scores = [verdict.score for verdict in verdicts if not math.isnan(verdict.score)]
        mean = sum(scores) / len(scores) if scores else math.nan
        seconds = sum(verdict.seconds for verdict in verdicts) / max(len(verdicts), 1)
        cells = [*(f"{counts[name]:>9}" for name in OUTCOMES), f"{mean:>9.3f}", f"{1000 * seconds:>9.2f}"]
        print(" ".join([f"{reward.name:<{width}}", *cells]))
        worst = max(worst, sum(counts[name] for name in FAULTS) / max(len(verdicts), 1))
    faulty = [item for item in scored if any(verdict.outcome in FAULTS for verdict in item.verdicts.values())]
    disputed = [item for item in scored if item.disputed]
    show("faults", faulty)
    show("disputed", disputed)
    show("slowest", sorted(scored, key=lambda item: -max(v.seconds for v in item.verdicts.values()))[:SHOWN])
    contradicted = any(item.label is not None for item in disputed)
    return int(worst > max_fault_share or contradicted)


def show(title: str, items: list[Scored]) -> None:
    """A few samples with their verdicts."""
    if not items:
        return
    print(f"\n{title} ({len(items)}):" if len(items) > SHOWN else f"\n{title}:")
    for item in items[:SHOWN]:
        said = ", ".join(f"{name} {told(verdict)}" for name, verdict in item.verdicts.items())
        label = "" if item.label is None else f", label {item.label:g}"
        print(f"  row {item.row}: {said}{label}: {' '.join(item.text.split())[-80:]!r}")


def told(verdict: Verdict) -> str:
    """A verdict in a few words."""
    if verdict.outcome in FAULTS:
        return f"{verdict.outcome} ({(verdict.message.splitlines() or [''])[-1][:80]})"
    return f"{verdict.score:g} in {1000 * verdict.seconds:.1f} ms" + (
        " (no answer)" if verdict.outcome == "no_answer" else ""
    )


def write(path: Path, scored: Iterable[Scored]) -> None:
    """One line a sample: its row, and each verifier's outcome, score, seconds and message."""
    with path.open("w") as file:
        for item in scored:
            verdicts = {
                name: {"outcome": v.outcome, "score": None if math.isnan(v.score) else v.score, "seconds": v.seconds}
                | ({"message": v.message} if v.message else {})
                for name, v in item.verdicts.items()
            }
            file.write(json.dumps({"row": item.row, "verdicts": verdicts}) + "\n")
    print(f"verdicts: {path}", file=sys.stderr)
