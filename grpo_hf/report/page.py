"""One self-contained HTML page about a run, or about several side by side, from the files that they left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_hf.report.curves import (
    FEW,
    OUTCOMES_TITLE,
    PALETTE,
    SHARED,
    TOOLS_TITLE,
    Metrics,
    Panel,
    curve,
    held_out_keys,
    metric_name,
    parse_line,
    read_metrics,
    run_panels,
    running_mean,
    save_grid,
)
from grpo_hf.report.samples import Samples, decoder_of, finite, read_samples

BYTES_OF_SAMPLES = 15_000_000
"""At most, over all runs of a page; what is more is thinned."""


@dataclass
class Run:
    """What is read of one."""

    name: str
    metrics: Metrics
    samples: Samples
    starts: list[dict[str, Any]]
    """What it was started with, and gone on with: step, time, command, settings, versions."""


def write_report(run_dir: str | Path, *others: str | Path, refresh: float | None = None) -> Path:
    """Write ``report.html`` and ``curves.png`` into a run folder, or ``compare.html`` with other runs beside it; returns the
    page's path.

    Reads ``metrics.jsonl`` and, where they are, ``starts.jsonl`` and ``rollouts/*.parquet``. A browser reads the page again
    every ``refresh`` seconds.
    """
    folders = [Path(run_dir), *map(Path, others)]
    names, budget = run_names(folders), BYTES_OF_SAMPLES // len(folders)
    runs = [read_run(folder, name, budget) for name, folder in zip(names, folders, strict=True)]
    if not others and (panels := run_panels(runs[0].metrics)):
        save_grid(folders[0] / "curves.png", panels)
    page = folders[0] / ("compare.html" if others else "report.html")
    partial = page.with_suffix(".partial")
    partial.write_text(page_html(runs, refresh), encoding="utf-8")
    partial.replace(page)
    return page


def read_run(folder: Path, name: str, budget: int) -> Run:
    """What a run has left, its samples as far as ``budget`` bytes go."""
    samples = read_samples(folder / "rollouts", budget=budget, decode=decoder_of(folder))
    return Run(name, read_metrics(folder / "metrics.jsonl"), samples, read_starts(folder / "starts.jsonl"))


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(parse_line, lines) if line is not None]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def page_html(runs: Sequence[Run], refresh: float | None = None) -> str:
    """The page: numbers as HTML, what one can look through as JSON, and the script that shows it."""
    title = escape(" and ".join(run.name for run in runs))
    again = f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{again}<title>{title}</title>'
    style = _file("uPlot.css") + _file("page.css")
    data = {
        "runs": [run.name for run in runs],
        "panels": merged_panels([run_panels(run.metrics) for run in runs], [run.name for run in runs]),
        "groups": [group | {"run": number} for number, run in enumerate(runs) for group in run.samples.groups],
        "history": [run.samples.history for run in runs],
        "completions": sum(run.samples.completions for run in runs),
    }
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>\n<body>',
        f"<h1>{title}</h1>",
        *(_headline_html(run, alone=len(runs) == 1) for run in runs),
        _starts_html([run for run in runs if run.starts]),
        "<noscript><p>Curves and samples are shown by a script.</p></noscript><main></main>",
        f'<script type="application/json" id="data">{packed}</script>',
        f"<script>{_file('uPlot.js')}</script><script>{_file('page.js')}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _file(name: str) -> str:
    return (files("grpo_hf.report") / "page_files" / name).read_text(encoding="utf-8")


# ---- Curves


def merged_panels(panels: Sequence[list[Panel]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Panels of the same title are one, with the curves of each run: the steps, and each curve's values at them."""
    titles = dict.fromkeys(panel.title for of_run in panels for panel in of_run)
    return [_merged(title, panels, names) for title in titles]


def _merged(title: str, panels: Sequence[list[Panel]], names: Sequence[str]) -> dict[str, Any]:
    found = [(name, panel) for name, of_run in zip(names, panels, strict=True) for panel in of_run if panel.title == title]
    curves = {
        (label if len(names) == 1 else f"{name}: {label}"): c for name, panel in found for label, c in panel.curves.items()
    }
    steps = sorted({step for c in curves.values() for step in c.steps})
    stacked = any(panel.stacked for _, panel in found) and len(names) == 1
    series = []
    for number, (label, c) in enumerate(curves.items()):
        smooth = c.values if len(c.values) < FEW else running_mean(c.values)
        raw, mean = (dict(zip(c.steps, values, strict=True)) for values in (c.values, smooth))
        values = {"values": [_rounded(raw.get(x)) for x in steps], "mean": [_rounded(mean.get(x)) for x in steps]}
        series.append({"label": label, "color": PALETTE[number % len(PALETTE)]} | values)
    from_zero = stacked or title in {*SHARED, OUTCOMES_TITLE, TOOLS_TITLE}
    how = {"stacked": stacked, "from_zero": from_zero, "few": len(steps) < FEW}
    return {"title": title, "steps": steps, "series": series} | how


def _rounded(value: float | None) -> float | None:
    return None if finite(value) is None else float(f"{value:.6g}")


# ---- Numbers


def headline(metrics: Metrics, completions: int | None = None) -> dict[str, str]:
    """The run in a few numbers, by label."""
    numbers = {"steps": f"{metrics[-1]['step']:,}"}
    if seconds := sum(_total(metrics, key) for key in {k for line in metrics for k in line if k.startswith("time/")}):
        numbers["time in steps"] = _duration(seconds)
    if completions:
        numbers["completions"] = f"{completions:,}"
    forwarded, padded = _total(metrics, "tokens/forwarded"), _total(metrics, "tokens/padded_equivalent")
    if forwarded:
        numbers["tokens forwarded"] = _count(forwarded)
    if forwarded and padded:
        numbers["tokens if padded"] = f"{padded / forwarded:.2f} times"
    values = {metric_name(key): curve(metrics, key).values for key in ["reward", *held_out_keys(metrics)]}
    moves = {name: " → ".join(_number(x) for x in (v[0], v[-1])[: len(v)]) for name, v in values.items() if v}
    return moves | numbers


def _total(metrics: Metrics, key: str) -> float:
    """Sum over all steps; a line stands for the steps since the train line before it, at their mean."""
    train = [line for line in metrics if any(k.startswith(("time/", "tokens/")) for k in line)]
    gaps = [after["step"] - before["step"] for before, after in pairwise(train)]
    spans = [max(1, min([line["step"], *gaps[:1]])) for line in train[:1]] + gaps
    weight = {line["step"]: span for line, span in zip(train, spans, strict=True)}
    c = curve(metrics, key)
    return sum(value * weight[step] for step, value in zip(c.steps, c.values, strict=True))


def _headline_html(run: Run, *, alone: bool) -> str:
    numbers = headline(run.metrics, run.samples.completions)
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in numbers.items())
    return f'{"" if alone else f"<h2>{escape(run.name)}</h2>"}<dl class="headline">{tiles}</dl>'


def _starts_html(runs: Sequence[Run]) -> str:
    """Commands, and a table of settings and versions with a column for each run."""
    if not runs:
        return ""
    commands = [
        f'<p class="note">{escape(run.name)}, {escape(start["time"])}, after {start["step"]} updates</p>'
        f'<div class="text">{escape(start["command"])}</div>'
        for run in runs
        for start in run.starts
    ]
    used = [run.starts[-1]["settings"] | run.starts[-1]["versions"] for run in runs]
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [_setting_html(name, [of_run.get(name) for of_run in used]) for name in dict.fromkeys(k for u in used for k in u)]
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    inside = "".join(commands) + table
    return f'<details class="starts"><summary><b>Commands, settings and versions</b></summary>{inside}</details>'


def _setting_html(name: str, values: Sequence[Any]) -> str:
    """A row, marked where runs differ; a default is no value."""
    shown = ["" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    cells = "".join(f"<td>{escape(value)}</td>" for value in shown)
    mark = ' class="differs"' if len({*shown}) > 1 else ""
    return f"<tr{mark}><th>{escape(name)}</th>{cells}</tr>"


def _number(value: float) -> str:
    small, large = 0 < abs(value) < 0.001, abs(value) >= 1000
    return format(value, ".1e" if small else ",.0f" if large else ".3f")


def _count(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
