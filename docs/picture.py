"""Draw step.svg and smollm2.svg from the last results of the benchmarks: `python -m docs.picture`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"

SIDES = {
    "trl": "TRL",
    "trl_head": "TRL, head on completions only",
    "liger": "Liger loss",
    "padded": "padded rows, fused head",
    "trl_async_tree": "TRL's async trie",
    "prefix_grouper": "PrefixGrouper",
    "grpo_hf": "grpo_hf",
    "grpo_hf_vllm": "grpo_hf, vLLM",
}
PANELS = (
    ("4 prompts of 192, 8 completions of 64 each", "training_step.json", "192 / 64, equal lengths"),
    ("8 prompts behind one system prompt of 512", "training_step.json", "shared system prompt"),
    ("as the first, sampling included", "whole_step.json", "192 / 64"),
)
"""What each shows: its title, the file, and the case in it."""

WIDTH, LABEL, ROW, GAP = 760, 230, 20, 34
STYLE = """text { font: 13px system-ui, sans-serif; fill: #444 }
.title { font-weight: 600 } .other { fill: #a9b4c2 } .ours { fill: #2a6fdb }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .other { fill: #67727f } .ours { fill: #6ea8ff } }"""


def picture() -> str:
    """Seconds of a step as bars, each panel on a scale of its own."""
    drawn, top = [], 0
    for title, file, case in PANELS:
        seconds = seconds_of(json.loads((RESULTS / file).read_text())["cases"], case)
        drawn += panel(title, seconds, top)
        top += GAP + ROW * len(seconds)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img">'
    title = "<title>Seconds of a training step, on the same completions with the same gradient, on two CPU cores</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *drawn, "</svg>"]) + "\n"


def seconds_of(cases: Mapping[str, Any], case: str) -> dict[str, float]:
    """Seconds by side, the slowest first."""
    found = {side: cases[case][side]["wall_s"] for side in SIDES if side in cases[case]}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def panel(title: str, seconds: Mapping[str, float], top: int) -> Iterator[str]:
    """A title, and under it a bar for each side."""
    yield f'<text class="title" x="0" y="{top + 18}">{escape(title)}: seconds a step</text>'
    longest = WIDTH - LABEL - 60
    for number, (side, value) in enumerate(seconds.items()):
        y, length = top + 26 + ROW * number, longest * value / max(seconds.values())
        kind = "ours" if side.startswith("grpo_hf") else "other"
        yield f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(SIDES[side])}</text>'
        yield f'<rect class="{kind}" x="{LABEL}" y="{y + 2}" width="{length:.0f}" height="{ROW - 5}" rx="2"/>'
        yield f'<text x="{LABEL + length + 6:.0f}" y="{y + 13}">{value:.1f}</text>'


def learning_of_smollm2() -> str:
    """The run of `make demo-smollm2`."""
    learned = json.loads((RESULTS / "learned.json").read_text())["smollm2_digits"]
    return learning_curve(list(zip(learned["minutes"], learned["values"], strict=True)))


def learning_curve(points: list[tuple[float, float]]) -> str:
    """Held-out accuracy, 0 to 1, over the minutes of a run, from [minutes, accuracy] of each evaluation."""
    left, bottom, width, height = 50, 190, WIDTH - 80, 160
    longest = max(minutes for minutes, _ in points)
    places = [(left + width * minutes / longest, bottom - height * accuracy) for minutes, accuracy in points]
    drawn = []
    for accuracy in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - height * accuracy
        drawn.append(f'<line class="rule" x1="{left}" x2="{left + width}" y1="{y:.0f}" y2="{y:.0f}"/>')
        drawn.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{accuracy:.0%}</text>')
    for minutes in range(int(longest) + 1):
        x = left + width * minutes / longest
        drawn.append(f'<text x="{x:.0f}" y="{bottom + 20}" text-anchor="middle">{minutes} min</text>')
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
    drawn.append(f'<polyline class="line" points="{line}"/>')
    drawn += [f'<circle class="ours" cx="{x:.0f}" cy="{y:.0f}" r="3.5"/>' for x, y in places]
    title = "SmolLM2-135M-Instruct learns to sort 3 or 4 digits: lists sorted exactly, held out"
    style = STYLE + "\n.rule { stroke: #8884 } .line { fill: none; stroke: #2a6fdb; stroke-width: 2 }"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30}" role="img">'
    named = f'<title>{title}</title><text class="title" x="0" y="16">{title}</text>'
    return "\n".join([head, f"<style>{style}</style>", named, *drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    (FOLDER / "step.svg").write_text(picture())
    (FOLDER / "smollm2.svg").write_text(learning_of_smollm2())
    print(FOLDER / "step.svg", FOLDER / "smollm2.svg")
