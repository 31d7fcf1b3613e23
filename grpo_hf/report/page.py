"""One self-contained HTML page about a run: headline numbers, curves and samples, from the files the run left."""

from __future__ import annotations

import base64
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_hf.report.curves import (
    DARK,
    LIGHT,
    Metrics,
    Panel,
    curve,
    held_out_keys,
    metric_name,
    panel_png,
    read_metrics,
    run_panels,
    save_grid,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]
LAST_ROLLOUTS = 4
SHOWN_CHARACTERS = 1500


def write_report(run_dir: str | Path, *, title: str | None = None, summary: dict[str, str] | None = None) -> Path:
    """Write ``report.html`` and ``curves.png`` into a run folder and return the page's path.

    Reads ``metrics.jsonl`` and, where there is one, ``rollouts/*.parquet``. ``summary`` becomes a table of two columns.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    completions, samples = read_samples(run_dir / "rollouts")
    panels = run_panels(metrics)
    if panels:
        save_grid(run_dir / "curves.png", panels)
    title = escape(title or run_dir.resolve().name)
    body = [f"<h1>{title}</h1>", _headline_html(headline(metrics, completions)), _summary_html(summary or {})]
    body += [_curves_html(panels), _samples_html(samples)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = run_dir / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


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


def read_samples(folder: Path) -> tuple[int, dict[str, list[Row]]]:
    """How many completions the rollout files hold, and the ones to show, by heading."""
    rollouts: dict[Path, pa.ChunkedArray] = {}
    for file in sorted(folder.glob("*.parquet")):
        try:
            rollouts[file] = pq.read_table(file, columns=["rollout"])["rollout"]
        except pa.ArrowInvalid:  # a run killed while it wrote
            logger.warning("%s is torn and was skipped", file)
    held = {file: set(column.to_pylist()) for file, column in rollouts.items()}
    first, *later = sorted(set().union(*held.values())) or [None]
    last = later[-LAST_ROLLOUTS:] or [first]
    samples = pick_samples(_read_rows(held, set(last)))
    if later:
        samples[f"Typical, first rollout ({first})"] = _typical(_read_rows(held, {first}), count=2)
    return sum(len(column) for column in rollouts.values()), {k: rows for k, rows in samples.items() if rows}


def _read_rows(held: dict[Path, set[int]], wanted: set[int]) -> list[Row]:
    """Rows of the wanted rollouts that have a reward, the latest first; a completion that its prompt was given several
    times is one row, with how often it came in "times"."""
    tables = [pq.read_table(file, filters=[("rollout", "in", wanted)]) for file, ids in held.items() if ids & wanted]
    # Row by row: what verifiers have logged beside completions may be of another type in each file.
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: -row["rollout"])
    scored = [row for row in reversed(rows) if _finite(row["reward"])]
    times = Counter((row["prompt"], row["completion"]) for row in scored)
    once = {(row["prompt"], row["completion"]): row for row in scored}
    return [row | {"times": times[key]} for key, row in once.items()][::-1]


def pick_samples(rows: list[Row]) -> dict[str, list[Row]]:
    """Best, worst and typical rows, three each where there are enough, no row twice."""
    take = max(1, min(3, len(rows) // 3))
    best = _ranked(rows, lambda row: -row["reward"])[:take]
    rest = [row for row in rows if row not in best]
    worst = _ranked(rest, lambda row: row["reward"])[:take]
    middle = [row for row in rest if row not in worst]
    return {"Best": best, "Worst": worst, "Typical": _typical(middle, count=take)}


def _typical(rows: list[Row], *, count: int) -> list[Row]:
    if not rows:
        return []
    centre = median(row["reward"] for row in rows for _ in range(row.get("times", 1)))
    return _ranked(rows, lambda row: abs(row["reward"] - centre))[:count]


def _ranked(rows: list[Row], badness: Callable[[Row], float]) -> list[Row]:
    """Least bad first; among equals a prompt's second row comes after the first row of every other prompt."""
    seen: Counter[tuple[float, str]] = Counter()
    ranks = []
    for i, row in enumerate(rows):
        key = (badness(row), row["prompt"])
        ranks.append((key[0], seen[key], i))
        seen[key] += 1
    return [rows[i] for _, _, i in sorted(ranks)]


def _headline_html(numbers: dict[str, str]) -> str:
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in numbers.items())
    return f'<dl class="headline">{tiles}</dl>'


def _summary_html(summary: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in summary.items())
    return f"<table>{rows}</table>" if rows else ""


def _curves_html(panels: list[Panel]) -> str:
    if not panels:
        return "<h2>Curves</h2><p>No metric with a finite value was logged.</p>"
    note = "A faint dot is one step, a line their running mean; short curves are joined dots."
    return f'<h2>Curves</h2><p class="note">{note}</p><div class="curves">{"".join(map(_picture, panels))}</div>'


def _picture(panel: Panel) -> str:
    light, dark = (base64.b64encode(panel_png(panel, theme)).decode() for theme in (LIGHT, DARK))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
    image = f'<img alt="{escape(panel.title)}" src="data:image/png;base64,{light}">'
    return f"<picture>{source}{image}</picture>"


def _samples_html(samples: dict[str, list[Row]]) -> str:
    sections = []
    for heading, rows in samples.items():
        cards = "".join(map(_card, rows))
        sections.append(f'<h3>{escape(heading)}</h3><div class="samples">{cards}</div>')
    return "<h2>Samples</h2>" + "".join(sections) if sections else ""


def _card(row: Row) -> str:
    rewards = {key.removeprefix("rewards/"): value for key, value in row.items() if key.startswith("rewards/")}
    scores = {name: f"{_number(value)}{_outcome(row, name)}" for name, value in rewards.items()}
    extra = {key.removeprefix("extra/"): str(value)[:80] for key, value in row.items() if key.startswith("extra/")}
    facts = {"reward": _number(row["reward"]), "advantage": _number(row["advantage"], sign="+")}
    facts |= {"step": f"{row['step']:,}", "length": f"{row['length']:,} tokens{', cut off' * bool(row['truncated'])}"}
    lines = [facts, scores, extra]
    items = ("".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in line.items()) for line in lines)
    shown = "".join(f'<p class="facts">{line}</p>' for line in items if line)
    texts = [("Prompt", row["prompt"]), ("Completion", row["completion"])]
    if row.get("messages"):
        texts = conversation(json.loads(row["messages"]), json.loads(row.get("turns") or "[]"))
    return f"<article>{shown}{''.join(f'<h4>{escape(name)}</h4>{_text(text)}' for name, text in texts)}</article>"


def conversation(messages: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A heading and a text for each message: who said it, with a turn's tokens and seconds, and how a tool's call ended."""
    numbered = iter(turns)
    calls: list[dict[str, Any]] = []
    parts = []
    for message in messages:
        heading, text = str(message["role"]), message.get("content") or ""
        if message["role"] == "assistant" and (turn := next(numbered, None)):
            heading += f", {turn['num_tokens']:,} tokens, {turn['seconds']:.2f} s"
            calls = list(turn["calls"])
            asked = (f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)[1:-1]})" for call in calls)
            text = "\n".join(filter(None, [_plain(text), *asked]))
        elif message["role"] == "tool" and calls:
            call = calls.pop(0)
            heading = f"{call['name']}: {call['outcome']}, {call['seconds']:.2f} s"
        parts.append((heading, _plain(text)))
    return parts


def _plain(content: Any) -> str:
    """A message's content as text; of blocks the text in each."""
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", str(block)) if isinstance(block, dict) else str(block) for block in content)


def _outcome(row: Row, name: str) -> str:
    """How the verifier's call ended, where it was no plain success."""
    outcome = row.get(f"outcomes/{name}") or "scored"
    return "" if outcome == "scored" else f", {outcome.replace('_', ' ')}"


def _text(text: str) -> str:
    """Escaped text in a box that keeps its line breaks, cut where it is long."""
    box = f'<div class="text" dir="auto">{escape(text[:SHOWN_CHARACTERS])}</div>'
    if len(text) <= SHOWN_CHARACTERS:
        return box
    return f'{box}<p class="note">cut here: {SHOWN_CHARACTERS:,} of {len(text):,} characters shown</p>'


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, *, sign: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "n/a"
    small, large = 0 < abs(value) < 0.001, abs(value) >= 1000
    return format(value, f"{sign}.1e" if small else f"{sign},.0f" if large else f"{sign}.3f")


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


CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24292f; --soft: #59636e; --rule: #d8dee4; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1c2128; --ink: #d5dbe1; --soft: #9aa4af; --rule: #3a424c; --box: #262c34 }
}
body { margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 2.5rem) 3rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem }
h4 { font-size: .75rem; margin: .7rem 0 .2rem; color: var(--soft) }
.headline, .curves, .samples { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.headline { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem; margin: 0 }
.headline div, article { border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem .8rem }
dt, .note { color: var(--soft); font-size: .8rem; margin: .2rem 0 }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; white-space: nowrap }
table { border-collapse: collapse; margin-top: 1.2rem; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 400 }
.curves img { width: 100%; display: block }
.facts { margin: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; color: var(--soft) }
.facts b { color: var(--ink) }
.text { white-space: pre-wrap; unicode-bidi: isolate; max-height: 18rem; overflow-y: auto; padding: .5rem .6rem;
  background: var(--box); font: .8rem/1.45 ui-monospace, Consolas, "DejaVu Sans Mono", monospace }
"""
