"""metrics.jsonl -> panels -> PNG, on matplotlib's object API, so no window and no global state."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

logger = logging.getLogger(__name__)

Metrics = list[dict[str, Any]]
PALETTE = ("#3b82c4", "#e08214", "#2a9d6f", "#c8499b", "#8570d6", "#cf4a3c", "#17a2b8", "#8f9499")
DASHES = ("-", "--", ":", "-.")
PAPER, INK, RULE = "#ffffff", "#24292f", "#d8dee4"
FEW = 20
"""Points of a curve below which they are joined, and no running mean is drawn."""
# The stack of times from the bottom; a part that is not named here goes on top.
TIME_PARTS = ("generate", "score", "logprobs", "forward_backward", "optimizer", "other")
# Metrics that share a panel: title -> {key: label}. Their held-out twins are drawn beside them.
SHARED = {
    "Groups without signal and cut-off answers (share)": {
        "frac_reward_zero_std": "groups without signal",
        "completions/clipped_ratio": "answers cut off",
    },
    "Completion length (tokens)": {
        "completions/mean_length": "mean",
        "completions/min_length": "shortest",
        "completions/max_length": "longest",
    },
    "Entropy (nats per token)": {"entropy": "entropy"},
    "KL to the reference model": {"kl": "KL"},
    "Tokens clipped by the loss (share)": {
        "clip_ratio/region_mean": "either side",
        "clip_ratio/low_mean": "low",
        "clip_ratio/high_mean": "high",
    },
    "Forward and backward (share of the matmul peak)": {"perf/mfu": "share"},
}
OUTCOMES_TITLE = "Verifier calls without a score (share)"
TOOLS_TITLE = "Tool calls by how they ended (share)"
# Eval keys without a plot of their own: cost, spread, intervals and diagnostics.
NO_PLOT_ENDS = (*"/mean _std /std _low _high eval_loss runtime _per_second _time epoch num_tokens".split(),)
NO_PLOT_STARTS = ("eval_completions/", "eval_clip_ratio/", "eval_sampling/", "eval_time/", "eval_tokens")


@dataclass(frozen=True)
class Curve:
    """One metric over steps, finite values only."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """One small plot."""

    title: str
    curves: dict[str, Curve]
    """By label."""
    stacked: bool = False
    """Areas on top of each other, with their shares in the legend."""


def read_metrics(path: str | Path) -> Metrics:
    """Read metrics.jsonl into one dict a step, in order of step.

    Train and eval lines of a step are merged. A step that was run again after a resume takes the later values. What a
    killed run left of its last line is skipped, also when the resumed run went on writing on that same line.
    """
    by_step: dict[int, dict[str, Any]] = {}
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        record = parse_line(line)
        if record is not None:
            by_step.setdefault(record["step"], {}).update(record)
        elif line.strip():
            logger.warning("%s: line %d is torn and was skipped", path, number)
    if not by_step:
        raise ValueError(f"{path} holds no metrics: expected one JSON object a line, each with a 'step'")
    return [by_step[step] for step in sorted(by_step)]


def parse_line(line: str) -> dict[str, Any] | None:
    """What was written after a step; None of a torn line."""
    for start in (0, max(line.rfind("{"), 0)):  # the second: a whole line behind a torn one
        with suppress(json.JSONDecodeError):
            record = json.loads(line[start:])
            if isinstance(record, dict) and "step" in record:
                return record
    return None


def curve(metrics: Metrics, key: str) -> Curve:
    """Where ``key`` was logged, and what: None, NaN and infinite values are left out."""
    found = [(line["step"], line.get(key)) for line in metrics]
    kept = [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]
    return Curve([step for step, _ in kept], [value for _, value in kept])


def metric_name(key: str) -> str:
    """What a key is called on the page: ``eval_rewards/format/mean`` is "held-out format"."""
    name = key.removeprefix("eval_").removeprefix("rewards/").removesuffix("/mean")
    return f"held-out {name}" if key.startswith("eval_") else name


def component_keys(metrics: Metrics, prefix: str = "") -> list[str]:
    """The keys ``rewards/<name>/mean``, without a lone one that only repeats the total reward."""
    logged = {key for line in metrics for key in line}
    means = (key for key in logged if key.startswith(f"{prefix}rewards/") and key.endswith("/mean"))
    keys = sorted(key for key in means if not key.endswith("/seconds/mean"))
    repeats = len(keys) == 1 and curve(metrics, keys[0]) == curve(metrics, f"{prefix}reward")
    return [] if repeats else keys


def held_out_keys(metrics: Metrics) -> list[str]:
    """Eval metrics with a plot of their own: reward, its components, then what is neither cost, spread nor a twin."""
    twins = {f"eval_{key}" for labels in SHARED.values() for key in labels}
    logged = {key for line in metrics for key in line if key.startswith("eval_")} - twins
    others = (
        key for key in logged if not (key.endswith(NO_PLOT_ENDS) or key.startswith(NO_PLOT_STARTS) or "/outcomes/" in key)
    )
    keys = dict.fromkeys(["eval_reward", *component_keys(metrics, "eval_"), *sorted(others)])
    return [key for key in keys if curve(metrics, key).values]


def run_panels(metrics: Metrics) -> list[Panel]:
    """The plots of one run, reward first; a metric that was never logged has none."""
    panels = []
    for key in ["reward", *held_out_keys(metrics), *component_keys(metrics)]:
        name = metric_name(key)
        title = f"Reward: {name}" if key.startswith("rewards/") else name[0].upper() + name[1:]
        panels.append(Panel(title, {name: curve(metrics, key)}))
    for title, labels in SHARED.items():
        curves = {label: curve(metrics, key) for key, label in labels.items()}
        twins = {f"held-out {label}": curve(metrics, f"eval_{key}") for key, label in labels.items()}
        panels.append(Panel(title, {label: c for label, c in (curves | twins).items() if c.values}))
    panels.append(Panel(OUTCOMES_TITLE, _outcome_curves(metrics, "rewards/")))
    panels.append(Panel(TOOLS_TITLE, _outcome_curves(metrics, "tools/")))
    panels.append(Panel("Where the time of a step went (seconds)", _time_curves(metrics), stacked=True))
    return [panel for panel in panels if any(c.values for c in panel.curves.values())]


def _outcome_curves(metrics: Metrics, of: str) -> dict[str, Curve]:
    """Shares of calls by who was called, a verifier or a tool, and how the call ended, where there were any."""
    logged = sorted({key for line in metrics for key in line if "/outcomes/" in key})
    found = {key: curve(metrics, key) for key in logged if key.removeprefix("eval_").startswith(of)}
    return {metric_name(key).removeprefix(of).replace("/outcomes/", ": "): c for key, c in found.items() if any(c.values)}


def _time_curves(metrics: Metrics) -> dict[str, Curve]:
    """Every time/ part on the same steps; a part that a step did not log took no time in it."""
    logged = {key.removeprefix("time/") for line in metrics for key in line if key.startswith("time/")}
    parts = [part for part in TIME_PARTS if part in logged] + sorted(logged - set(TIME_PARTS))
    curves = {part: curve(metrics, f"time/{part}") for part in parts}
    steps = sorted({step for c in curves.values() for step in c.steps})
    seconds = {part: dict(zip(c.steps, c.values, strict=True)) for part, c in curves.items()}
    return {part: Curve(steps, [by_step.get(step, 0.0) for step in steps]) for part, by_step in seconds.items()}


def running_mean(values: list[float]) -> list[float]:
    """Mean over about a tenth of the values around each; the window is cut off at both ends."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def learning_curves(path: str | Path, curves: dict[str, list[float]], *, title: str, xlabel: str, ylabel: str) -> Path:
    """Draw labelled curves into one PNG and return its path; value i of a curve stands at x = i."""
    if not any(curves.values()):
        raise ValueError(f"nothing to draw into {path}: got {len(curves)} curves, none with a value")
    figure = Figure(figsize=(9, 5), dpi=144, facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    for i, (label, values) in enumerate(curves.items()):
        style = DASHES[i // len(PALETTE) % len(DASHES)]
        marker = "o" if len(values) == 1 else ""
        axes.plot(values, color=PALETTE[i % len(PALETTE)], linestyle=style, marker=marker, label=_plain(label))
    _dress(axes, xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(_plain(title), color=INK, fontsize=12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, format="png")
    return Path(path)


def save_grid(path: str | Path, panels: list[Panel], *, columns: int = 3) -> Path:
    """Draw all panels into one PNG and return its path."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.3 * rows), dpi=110, facecolor=PAPER, layout="constrained")
    cells = figure.subfigures(rows, columns, squeeze=False).flat
    for cell, panel in zip(cells, panels, strict=False):
        draw_panel(cell, panel)
    figure.savefig(path, format="png")
    return Path(path)


def draw_panel(figure: FigureBase, panel: Panel) -> None:
    """Draw one panel into a figure or a cell of one: title above, legend below."""
    figure.set_facecolor(PAPER)
    axes = figure.subplots()
    if panel.stacked:
        _draw_stack(axes, panel)
    else:
        for i, (label, c) in enumerate(panel.curves.items()):
            _draw_curve(axes, label, c, PALETTE[i % len(PALETTE)])
    _dress(axes, xlabel="step", ylabel="")
    if panel.stacked or panel.title in SHARED:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    figure.suptitle(_plain(panel.title), color=INK, fontsize=11)
    if len(panel.curves) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)


def _draw_curve(axes: Axes, label: str, c: Curve, color: str) -> None:
    if len(c.steps) < FEW:
        axes.plot(c.steps, c.values, color=color, marker="o", markersize=3.5, linewidth=1.4, label=_plain(label))
        return
    axes.plot(c.steps, c.values, color=color, marker=".", markersize=3, linestyle="", alpha=0.35)
    axes.plot(c.steps, running_mean(c.values), color=color, linewidth=1.8, label=_plain(label))


def _draw_stack(axes: Axes, panel: Panel) -> None:
    totals = {label: sum(c.values) for label, c in panel.curves.items()}
    whole = sum(totals.values()) or 1.0
    labels = [_plain(f"{label.replace('_', ' ')} {total / whole:.0%}") for label, total in totals.items()]
    steps = next(iter(panel.curves.values())).steps
    heights = [running_mean(c.values) for c in panel.curves.values()]
    edges: list[float] = [*steps]
    if len(steps) == 1:  # an area needs two edges
        edges, heights = [steps[0] - 0.5, steps[0] + 0.5], [h * 2 for h in heights]
    axes.stackplot(edges, heights, labels=labels, colors=PALETTE, alpha=0.85, linewidth=0)
    axes.margins(x=0)


def _dress(axes: Axes, *, xlabel: str, ylabel: str) -> None:
    axes.set_facecolor(PAPER)
    axes.set_xlabel(_plain(xlabel), color=INK, fontsize=9)
    axes.set_ylabel(_plain(ylabel), color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", useOffset=False)


def _plain(text: str) -> str:
    """Keep matplotlib from reading dollar signs as mathematics."""
    return text.replace("$", r"\$")
