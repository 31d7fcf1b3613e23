"""What is logged of calls of tools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from grpo_hf.episodes.answers import OUTCOMES
from grpo_hf.metrics import Metrics
from grpo_hf.types import ToolCall

UNKNOWN = "unknown"
"""Stands for all names that the model has made up."""


def record_calls(
    metrics: Metrics, calls: Iterable[ToolCall], *, completions: int, names: Collection[str], resets: Iterable[ToolCall] = ()
) -> None:
    """How often tools were called, how calls ended, and how long they took; ``names`` are those of all tools there are.

    tools/call_frequency is calls a completion and tools/failure_frequency the share of calls whose outcome is not ok, as in
    TRL; tools/<name>/outcomes/<outcome> is a share of the tool's own calls. ``resets`` of environments count under the name
    reset alone.
    """
    by_name: dict[str, list[ToolCall]] = defaultdict(list)
    for call in calls:
        by_name[call.name if call.name in names else UNKNOWN].append(call)
    all_calls = [call for group in by_name.values() for call in group]
    metrics.mean("tools/call_frequency", len(all_calls), completions)
    failures = sum(call.outcome != "ok" for call in all_calls)
    if all_calls:
        metrics.mean("tools/failure_frequency", failures, len(all_calls))
    for name, group in {**by_name, "reset": list(resets)}.items():
        for outcome in OUTCOMES if group else ():
            metrics.mean(f"tools/{name}/outcomes/{outcome}", sum(call.outcome == outcome for call in group), len(group))
        if group:
            metrics.mean(f"tools/{name}/seconds/mean", sum(call.seconds for call in group), len(group))
            metrics.maximum(f"tools/{name}/seconds/max", max(call.seconds for call in group))
