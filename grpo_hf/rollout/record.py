"""What a rollout leaves behind: a parquet file of samples, and the numbers of its log line."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from grpo_hf.metrics import Metrics
from grpo_hf.packing.layout import num_padded_tokens
from grpo_hf.rollout.planning import Peers
from grpo_hf.rollout.stream import Rollout
from grpo_hf.types import Completion, Group


def write_rollout(folder: Path, rollout: Rollout, *, step: int, process: int) -> Path:
    """Write one row a completion; a killed run leaves no half file, a resumed one overwrites its own."""
    rows = []
    for group in rollout.groups:
        prompt = group.prompt.raw if isinstance(group.prompt.raw, str) else repr(group.prompt.raw)
        for item in group.completions:
            rows.append(
                {"step": step, "rollout": rollout.index, "process": process, "prompt": prompt, "completion": item.text}
                | {"length": len(item.ids), "truncated": item.truncated}
                | {f"rewards/{name}": value for name, value in item.rewards.items()}
                | {"reward": item.reward, "advantage": item.advantage}
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollout-{rollout.index:06d}-{process}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    os.replace(partial, path)
    return path


def set_aside_earlier_run(folder: Path) -> None:
    """Move what an earlier run left in this folder into earlier-1/, earlier-2/, ...; its checkpoints stay."""
    left = [path for name in ("metrics.jsonl", "rollouts", "report.html", "curves.png") if (path := folder / name).exists()]
    if left:
        number = 1 + sum(1 for _ in folder.glob("earlier-*"))
        aside = folder / f"earlier-{number}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)


def record_rollout(metrics: Metrics, rollout: Rollout, peers: Peers) -> None:
    """Log what was sampled, under TRL's names where it has them; every process records the numbers of all."""
    everyone = [group for part in peers.gather([_bare(group) for group in rollout.groups]) for group in part]
    record_groups(metrics, everyone)
    signal = [any(item.advantage for item in group.completions) for group in everyone]
    metrics.mean("frac_zero_signal_groups", len(signal) - sum(signal), len(signal))
    metrics.total("tokens/sampled", sum(len(item.ids) for group in rollout.groups for item in group.completions))


def record_forward(metrics: Metrics, rollout: Rollout, *, num_iterations: int) -> None:
    """Log the tokens of this rollout's forwards, and those that one row a completion, padded, would take."""
    forwarded = sum(batch.num_tokens for update in rollout.updates for batch in update.microbatches)
    metrics.total("tokens/forwarded", forwarded * num_iterations)
    metrics.total("tokens/padded_equivalent", num_padded_tokens(rollout.groups) * num_iterations)


def record_groups(metrics: Metrics, groups: list[Group]) -> None:
    """Lengths and rewards of sampled groups."""
    completions = [item for group in groups for item in group.completions]
    lengths = [len(item.ids) for item in completions]
    ended = [len(item.ids) for item in completions if not item.truncated] or [0]
    for name, values in (("", lengths), ("terminated_", ended)):
        metrics.mean(f"completions/mean_{name}length", sum(values), len(values))
        metrics.minimum(f"completions/min_{name}length", min(values))
        metrics.maximum(f"completions/max_{name}length", max(values))
    metrics.mean("completions/clipped_ratio", sum(item.truncated for item in completions), len(completions))
    for name in completions[0].rewards:
        _mean_and_std(metrics, f"rewards/{name}/mean", f"rewards/{name}/std", [item.rewards[name] for item in completions])
    _mean_and_std(metrics, "reward", "reward_std", [item.reward for item in completions])
    by_group = [torch.tensor([item.reward for item in group.completions]) for group in groups]
    flat = sum(int((rewards == rewards[0]).all()) for rewards in by_group)
    metrics.mean("frac_reward_zero_std", flat, len(groups))


def _mean_and_std(metrics: Metrics, mean_name: str, std_name: str, values: list[float]) -> None:
    scored = torch.tensor(values, dtype=torch.float64)
    scored = scored[~scored.isnan()]
    if len(scored):
        metrics.mean(mean_name, scored.mean().item())
        metrics.mean(std_name, scored.std().item() if len(scored) > 1 else 0.0)


def _bare(group: Group) -> Group:
    """The group without its row and text, to travel between processes."""
    prompt = type(group.prompt)(ids=group.prompt.ids, raw="", row={}, index=group.prompt.index)
    return Group(prompt, [Completion(**(vars(item) | {"text": "", "rollout_logprobs": None})) for item in group.completions])
