"""What a rollout leaves behind: a parquet file of samples, and the numbers of its log line."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from grpo_hf.files import sync
from grpo_hf.metrics import Metrics
from grpo_hf.rewards.faults import Tally
from grpo_hf.rewards.settings import FOLLOWED
from grpo_hf.rollout.dynamic import is_informative
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import num_sampled
from grpo_hf.rollout.stream import Rollout
from grpo_hf.types import Completion, Group, Prompt

logger = logging.get_logger(__name__)

GroupSummary = list[dict[str, Any]]
"""length, truncated, reward, advantage and rewards (by name) of each completion of a group."""


def write_rollout(folder: Path, rollout: Rollout, *, step: int, process: int) -> Path:
    """Write one row a completion; a killed run leaves no half file, a resumed one overwrites its own."""
    about = {"step": step, "rollout": rollout.index, "weights": rollout.version, "process": process}
    path = folder / f"rollout-{rollout.index:06d}-{process}.parquet"
    write_table(completion_rows(rollout.groups, about), path)
    return path


def completion_rows(groups: Sequence[Group], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a completion, with what all of them have in common (``about``): which prompt it is of (``row`` of the data
    set, whose other columns are JSON), what was said, and what it was worth."""
    rows: list[dict[str, Any]] = []
    extra = _extra_columns([item for group in groups for item in group.completions])
    for number, group in enumerate(groups):
        prompt = group.prompt.raw if isinstance(group.prompt.raw, str) else repr(group.prompt.raw)
        others = {name: value for name, value in group.prompt.row.items() if name != "prompt"}
        columns = json.dumps(others, default=str, ensure_ascii=False)
        for item in group.completions:
            rows.append(
                about
                | {"row": group.prompt.index, "group": number, "columns": columns}
                | {"prompt": prompt, "completion": item.text, "length": num_sampled(item), "truncated": item.truncated}
                | conversation(group.prompt, item)
                | {f"rewards/{name}": value for name, value in item.rewards.items()}
                | {f"outcomes/{name}": outcome for name, outcome in item.outcomes.items()}
                | {"reward": item.reward, "advantage": item.advantage}
                | {"ids": item.ids, "is_sampled": item.is_sampled, "logprobs": item.rollout_logprobs}
                | {f"extra/{name}": values[len(rows)] for name, values in extra.items()}
            )
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """A parquet file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    sync(partial)
    os.replace(partial, path)


def conversation(prompt: Prompt, item: Completion) -> dict[str, str | None]:
    """Chats as JSON: the messages of prompt and completion, and of an episode its turns, with their calls."""
    if isinstance(prompt.raw, str):
        return {"messages": None, "turns": None}
    said = [{"role": "assistant", "content": item.text}] if item.messages is None else item.messages
    turns = json.dumps([asdict(turn) for turn in item.turns], default=str) if item.turns else None
    asked = prompt.raw if item.prompt_messages is None else item.prompt_messages
    return {"messages": json.dumps([*asked, *said], default=str, ensure_ascii=False), "turns": turns}


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


def record_rollout(metrics: Metrics, rollout: Rollout, peers: Peers) -> None:
    """Log what was sampled, under TRL's names where it has them; every process records the numbers of all."""
    everyone = summarize_all(rollout.groups, peers)
    record_groups(metrics, everyone)
    record_outcomes(metrics, rollout.tally)
    signal = [any(item["advantage"] for item in group) for group in everyone]
    metrics.mean("frac_zero_signal_groups", len(signal) - sum(signal), len(signal))
    metrics.total("tokens/sampled", num_tokens(rollout.sampled))
    logprobs = [x for group in rollout.groups for item in group.completions for x in item.rollout_logprobs or ()]
    if any(x is None or math.isnan(x) for x in logprobs):
        logger.warning_once(
            "The engine gave some tokens no log-prob (None or NaN): these are trained on without the engine correction, and "
            "their share is logged as sampling/frac_without_logprobs"
        )
    if rollout.skipped is not None:
        metrics.mean("dynamic/skipped", rollout.skipped, len(everyone))
    if rollout.rounds is not None:  # what was sampled for what is kept; `reward` and its like are of the kept groups alone
        sampled = rollout.sampled
        metrics.mean("dynamic/acceptance", sum(map(is_informative, sampled)), len(sampled))
        metrics.mean("dynamic/sampled_per_kept", len(sampled), len(rollout.groups))
        metrics.mean("dynamic/rounds", rollout.rounds)
        rewards = [item.reward for group in sampled for item in group.completions if not math.isnan(item.reward)]
        metrics.mean("dynamic/reward", math.fsum(rewards), len(rewards))


def num_tokens(groups: list[Group]) -> int:
    """Tokens that the model chose."""
    return sum(num_sampled(item) for group in groups for item in group.completions)


def num_padded_tokens(groups: list[Group]) -> int:
    """Input tokens when every completion is a row padded to the longest prompt and the longest completion (TRL's)."""
    lengths = [len(item.ids) for group in groups for item in group.completions]
    return len(lengths) * (max(map(num_prompt_tokens, groups)) + max(lengths))


def num_prompt_tokens(group: Group) -> int:
    """Of the longest prompt: an environment may have said something to it."""
    return max(len(group.prompt.ids if item.prompt_ids is None else item.prompt_ids) for item in group.completions)


def summarize_all(groups: list[Group], peers: Peers) -> list[GroupSummary]:
    """The numbers of every process's completions, without their text and tokens."""
    names = ("truncated", "reward", "advantage", "rewards")
    mine = [
        [{"length": num_sampled(item)} | {name: getattr(item, name) for name in names} for item in group.completions]
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
