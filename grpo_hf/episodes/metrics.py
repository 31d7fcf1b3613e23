"""What is logged of calls of tools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from grpo_hf.episodes.answers import OUTCOMES
from grpo_hf.metrics import Metrics
from grpo_hf.types import Group, ToolCall

UNKNOWN = "unknown"
"""Stands for all names that the model has made up."""


def record_calls(metrics: Metrics, groups: Iterable[Group], names: Collection[str]) -> None:
    """How often tools were called, how calls ended, and how long they took; ``names`` are those of all tools there are.

    tools/call_frequency is calls a completion and tools/failure_frequency the share of calls whose outcome is not ok, as in
    TRL; tools/<name>/outcomes/<outcome> is a share of the tool's own calls. Resets of environments count under the name
    reset alone.
    """
    episodes = [item for group in groups for item in group.completions]
    turns = [turn for item in episodes for turn in item.turns]
    calls = [call for turn in turns for call in turn.calls if call.outcome]
    resets = [item.reset for item in episodes if item.reset is not None]
    metrics.mean("tools/turns", len(turns), len(episodes))
    by_name: dict[str, list[ToolCall]] = defaultdict(list)
    for call in calls:
        by_name[call.name if call.name in names else UNKNOWN].append(call)
    metrics.mean("tools/call_frequency", len(calls), len(episodes))
    failures = sum(call.outcome != "ok" for call in calls)
    metrics.mean("tools/failure_frequency", failures, max(len(calls), 1))
    if resets:
        by_name["reset"] = resets
    for name, group in by_name.items():
        for outcome in OUTCOMES:
            metrics.mean(f"tools/{name}/outcomes/{outcome}", sum(call.outcome == outcome for call in group), len(group))
        metrics.mean(f"tools/{name}/seconds/mean", sum(call.seconds for call in group), len(group))
        metrics.maximum(f"tools/{name}/seconds/max", max(call.seconds for call in group))
