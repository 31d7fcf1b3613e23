"""A run's samples in a terminal: the groups as a table, and the one under the cursor beside it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from grpo_hf.report.samples import Group, Said, read_samples

BYTES = 100_000_000
"""Of samples at most, as JSON; of more, rollouts evenly spread over the run."""

COLUMNS = ("step", "prompt", "mean", "lowest", "highest", "tokens", "")
ORDERS = {"newest": ("step", True), "oldest": ("step", False), "best": ("mean", True), "worst": ("mean", False)}
"""What s goes through: a number of a group, and whether the highest comes first."""


def numbers_of(group: Group) -> dict[str, float | None]:
    """The group in numbers; there is no reward where no completion has one."""
    rewards = [item["reward"] for item in group["items"] if item["reward"] is not None]
    mean, lowest, highest = (fmean(rewards), min(rewards), max(rewards)) if rewards else (None, None, None)
    tokens = fmean(item["length"] for item in group["items"])
    return {"step": group["step"], "mean": mean, "lowest": lowest, "highest": highest, "tokens": tokens}


def in_order(groups: list[Group], order: str) -> list[Group]:
    """Those without such a number last."""
    name, highest_first = ORDERS[order]
    numbers = [numbers_of(group)[name] for group in groups]
    known = [(value, place) for place, value in enumerate(numbers) if value is not None]
    known.sort(key=lambda item: item[0], reverse=highest_first)
    places = [place for _, place in known] + [place for place, value in enumerate(numbers) if value is None]
    return [groups[place] for place in places]


def tags_of(group: Group) -> list[str]:
    """What is to be noticed: no signal, completions that are cut off, and outcomes that are no score."""
    numbers = numbers_of(group)
    outcomes = {outcome for item in group["items"] for _, outcome in item["scores"].values()} - {"scored"}
    flat = ["no signal"] if numbers["lowest"] == numbers["highest"] else []
    cut = ["cut off"] if any(item["cut_off"] for item in group["items"]) else []
    return flat + cut + sorted(outcome.replace("_", " ") for outcome in outcomes)


def is_found(group: Group, wanted: str) -> bool:
    """Whether a prompt, a completion, a column or a tag has this text, whatever the case."""
    said = [*group["prompt"], *(part for item in group["items"] for part in item["said"])]
    texts = [text for _, text in said] + [*group["columns"].values(), *tags_of(group)]
    return wanted.lower() in "\n".join(texts).lower()


def as_text(group: Group) -> Text:
    """The group as one reads it: prompt, columns, and each completion with what it was worth."""
    text = Text()
    _add(text, group["prompt"], group["columns"])
    for item in group["items"]:
        scores = ", ".join(f"{name} {number(value)} {outcome}" for name, (value, outcome) in item["scores"].items())
        cut = ", cut off" if item["cut_off"] else ""
        text.append(f"\nreward {number(item['reward'])}, advantage {number(item['advantage'])}", "bold green")
        text.append(f" ({scores}; {item['length']} tokens{cut})\n", "green")
        _add(text, item["said"], item["logged"])
    return text


def _add(text: Text, said: Said, beside: dict[str, str]) -> None:
    for heading, words in said:
        text.append(f"{heading}\n", "bold").append(f"{words}\n")
    for name, value in beside.items():
        text.append(f"{name}: {value}\n", "dim")


def number(value: float | None) -> str:
    """Four digits, or n/a."""
    return "n/a" if value is None else f"{value:.4g}"


class Browser(App[None]):
    """Browse, sort and search."""

    CSS = """
    DataTable { width: 5fr }
    VerticalScroll { width: 6fr; padding: 0 1 }
    Input { display: none }
    Input.asked { display: block }
    """
    BINDINGS: ClassVar[list[Any]] = [("s", "sort", "Order"), ("slash", "search", "Search"), ("q", "quit", "Quit")]

    def __init__(self, run_dir: Path):
        super().__init__()
        samples = read_samples(run_dir / "rollouts", budget=BYTES)
        if not samples.groups:
            raise ValueError(f"{run_dir} has no samples: rollouts/*.parquet is written with save_rollouts=True")
        self.groups, self.title = samples.groups, str(run_dir)
        self.order, self.wanted = "newest", ""
        self.shown: list[Group] = []

    def compose(self) -> ComposeResult:
        yield Input(placeholder="text of prompts, completions, columns and tags")
        with Horizontal():
            yield DataTable(cursor_type="row", zebra_stripes=True)
            with VerticalScroll():
                yield Static()
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        table.add_columns(*COLUMNS)
        table.focus()
        self.fill()

    def fill(self) -> None:
        """The table, of the groups that are found, in their order."""
        self.shown = in_order([group for group in self.groups if is_found(group, self.wanted)], self.order)
        table = self.query_one(DataTable)
        table.clear()
        for group in self.shown:
            row = "" if group["row"] is None else str(group["row"])
            step, *numbers = map(number, numbers_of(group).values())
            table.add_row(step, row, *numbers, ", ".join(tags_of(group)))
        self.sub_title = f"{len(self.shown)} of {len(self.groups)} groups, {self.order}"
        self.query_one(Static).update(as_text(self.shown[0]) if self.shown else "nothing is found")

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if event.cursor_row < len(self.shown):
            self.query_one(Static).update(as_text(self.shown[event.cursor_row]))

    def action_sort(self) -> None:
        names = list(ORDERS)
        self.order = names[(names.index(self.order) + 1) % len(names)]
        self.fill()

    def action_search(self) -> None:
        field = self.query_one(Input)
        field.add_class("asked")
        field.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.wanted = event.value
        event.input.remove_class("asked")
        self.query_one(DataTable).focus()
        self.fill()
