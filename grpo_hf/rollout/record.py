"""What a rollout leaves behind: a parquet file of samples, and the numbers of its log line."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_hf.metrics import Metrics
from grpo_hf.packing.layout import num_padded_tokens
from grpo_hf.rewards.faults import Tally
from grpo_hf.rewards.settings import FOLLOWED
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.stream import Rollout
from grpo_hf.types import Completion, Group

GroupSummary = list[dict[str, Any]]
"""length, truncated, reward, advantage and rewards (by name) of each completion of a group."""


def write_rollout(folder: Path, rollout: Rollout, *, step: int, process: int) -> Path:
    """Write one row a completion; a killed run leaves no half file, a resumed one overwrites its own."""
    rows: list[dict[str, Any]] = []
    extra = _extra_columns([item for group in rollout.groups for item in group.completions])
    for group in rollout.groups:
        prompt = group.prompt.raw if isinstance(group.prompt.raw, str) else repr(group.prompt.raw)
        for item in group.completions:
            rows.append(
                {
                    "step": step,
                    "rollout": rollout.index,
                    "weights": rollout.version,
                    "process": process,
                    "prompt": prompt,
                    "completion": item.text,
                }
                | {"length": len(item.ids), "truncated": item.truncated}
                | {f"rewards/{name}": value for name, value in item.rewards.items()}
                | {f"outcomes/{name}": outcome for name, outcome in item.outcomes.items()}
                | {"reward": item.reward, "advantage": item.advantage}
                | {f"extra/{name}": values[len(rows)] for name, values in extra.items()}
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollout-{rollout.index:06d}-{process}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    os.replace(partial, path)
    return path


def _extra_columns(completions: list[Completion]) -> dict[str, list[Any]]:
    """What verifiers have logged beside completions; as text where it is not of one kind."""
    names = dict.fromkeys(name for item in completions for name in item.extra)
    columns = {name: [item.extra.get(name) for item in completions] for name in names}
    for name, values in columns.items():
        try:
            pa.array(values)
        except (pa.ArrowException, ValueError, OverflowError):
            columns[name] = [None if value is None else str(value) for value in values]
    return columns


def keep_until(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to this step; the last line of a killed run may be half written."""
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def put_back(aside: Path, folder: Path) -> None:
    """Undo set_aside_earlier_run: that run goes on after all."""
    for path in aside.iterdir():
        if path.name == "metrics.jsonl" and (folder / path.name).exists():
            path.write_text(path.read_text() + (folder / path.name).read_text())
        path.replace(folder / path.name)
    aside.rmdir()


def set_aside_earlier_run(folder: Path) -> Path | None:
    """Move what an earlier run left in this folder into earlier-1/, earlier-2/, ...; its checkpoints stay.

    Returns where it is now; None when there was nothing.
    """
    left = [path for name in ("metrics.jsonl", "rollouts", "report.html", "curves.png") if (path := folder / name).exists()]
    if left:
        number = 1 + sum(1 for _ in folder.glob("earlier-*"))
        aside = folder / f"earlier-{number}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        return aside
    return None


def record_rollout(metrics: Metrics, rollout: Rollout, peers: Peers) -> None:
    """Log what was sampled, under TRL's names where it has them; every process records the numbers of all."""
    everyone = summarize_all(rollout.groups, peers)
    record_groups(metrics, everyone)
    signal = [any(item["advantage"] for item in group) for group in everyone]
    metrics.mean("frac_zero_signal_groups", len(signal) - sum(signal), len(signal))
    metrics.total("tokens/sampled", sum(len(item.ids) for group in rollout.groups for item in group.completions))


def record_forward(metrics: Metrics, rollout: Rollout, peers: Peers, *, num_iterations: int) -> None:
    """Log the tokens of this rollout's forwards, how evenly the processes share them (max / mean), and those that one row
    a completion, padded, would take."""
    forwarded = sum(batch.num_tokens for update in rollout.updates for batch in update.microbatches)
    everyone = peers.gather(forwarded)
    metrics.mean("tokens/max_over_mean", max(everyone) * len(everyone) / sum(everyone))
    metrics.total("tokens/forwarded", forwarded * num_iterations)
    metrics.total("tokens/padded_equivalent", num_padded_tokens(rollout.groups) * num_iterations)


def summarize_all(groups: list[Group], peers: Peers) -> list[GroupSummary]:
    """The numbers of every process's completions, without their text and tokens."""
    mine = [
        [
            {"length": len(item.ids), "truncated": item.truncated, "reward": item.reward, "advantage": item.advantage}
            | {"rewards": item.rewards}
            for item in group.completions
        ]
        for group in groups
    ]
    return [group for part in peers.gather(mine) for group in part]


def record_groups(metrics: Metrics, groups: list[GroupSummary]) -> None:
    """Lengths and rewards of sampled groups."""
    completions = [item for group in groups for item in group]
    lengths = [item["length"] for item in completions]
    ended = [item["length"] for item in completions if not item["truncated"]] or [0]
    for name, values in (("", lengths), ("terminated_", ended)):
        metrics.mean(f"completions/mean_{name}length", sum(values), len(values))
        metrics.minimum(f"completions/min_{name}length", min(values))
        metrics.maximum(f"completions/max_{name}length", max(values))
    metrics.mean("completions/clipped_ratio", sum(item["truncated"] for item in completions), len(completions))
    for name in completions[0]["rewards"]:
        _mean_and_std(metrics, f"rewards/{name}/", [item["rewards"][name] for item in completions])
    _mean_and_std(metrics, "reward", [item["reward"] for item in completions])
    flat = sum(len({item["reward"] for item in group if not math.isnan(item["reward"])}) <= 1 for group in groups)
    metrics.mean("frac_reward_zero_std", flat, len(groups))


def record_outcomes(metrics: Metrics, tally: Tally) -> None:
    """How this process's calls of each verifier ended, and how long they took."""
    for name, calls in tally.items():
        for outcome in FOLLOWED:
            metrics.mean(f"rewards/{name}/outcomes/{outcome}", calls.outcomes[outcome], calls.count)
        metrics.mean(f"rewards/{name}/seconds/mean", calls.seconds, calls.count)
        metrics.maximum(f"rewards/{name}/seconds/max", calls.slowest)


def _mean_and_std(metrics: Metrics, name: str, values: list[float]) -> None:
    """<name>/mean and <name>/std, or <name> and <name>_std, of the values that are not NaN."""
    scored = [value for value in values if not math.isnan(value)]
    if scored:
        mean_name, std_name = (f"{name}mean", f"{name}std") if name.endswith("/") else (name, f"{name}_std")
        metrics.mean(mean_name, statistics.fmean(scored))
        metrics.mean(std_name, statistics.stdev(scored) if len(scored) > 1 else 0.0)
