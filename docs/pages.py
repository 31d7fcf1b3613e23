"""Write settings.md and verifiers.md from the code: `python -m docs.pages`. What a page says is said in the code alone."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from grpo_hf.cli.recipe import RunArguments
from grpo_hf.reward_fns.marks import scoped
from grpo_hf.rewards import get_reward, known_rewards
from grpo_hf.rewards.registry import _combinator
from grpo_hf.rewards.signature import BUILT_INS
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.trl_names import TRL_ONLY

FOLDER = Path(__file__).parent
_SECTION = re.compile(r"^    # (.+)$|^    (\w+): ", re.MULTILINE)


def settings() -> str:
    """Every setting with its default, section by section as the code has them."""
    ours = {item.name: item for item in fields(GRPOConfig)}
    lines = [
        "# Settings",
        "",
        "Each is a keyword of `GRPOConfig`, a line of a recipe, and an option of `grpo-hf train RECIPE --NAME VALUE`, which",
        "goes before the recipe's. All of transformers' `TrainingArguments` are there too (`max_steps`, `save_steps`, ...);",
        "listed are those with another default. A name that is unknown is an error that says the nearest.",
        "",
        "## What a recipe trains",
        "",
        "In a recipe alone; in Python they are arguments of `GRPOTrainer`.",
        "",
        *_table(fields(RunArguments)),
    ]
    for title, names in _sections(GRPOConfig):
        lines += ["", f"## {title}", "", *_table([ours[name] for name in names])]
    lines += [
        "",
        "## TRL's settings that are not here",
        "",
        "Each is refused with this, unless its value asks for nothing.",
        "",
        "| setting of TRL | what to do |",
        "| --- | --- |",
        *(f"| `{name}` | {_cell(text)} |" for name, text in sorted(TRL_ONLY.items())),
    ]
    return "\n".join(lines) + "\n"


def _sections(config: type) -> Iterator[tuple[str, list[str]]]:
    """The titles that stand between the fields of a class as comments, each with its fields; up to its first method."""
    title, names, known = "Other defaults than transformers has", [], {item.name for item in fields(config)}
    for found in _SECTION.finditer(inspect.getsource(config).partition("    def ")[0]):
        if found[1]:
            yield title, names
            title, names = found[1], []
        elif found[2] in known:
            names.append(found[2])
    yield title, names


def _table(items: Any) -> list[str]:
    rows = [f"| `{item.name}` | {_shown(_default(item))} | {_cell(item.metadata.get('help', ''))} |" for item in items]
    return ["| setting | default | |", "| --- | --- | --- |", *rows]


def _default(item: Field) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _shown(value: Any) -> str:
    return "" if value is MISSING else f"`{_cell(repr(value))}`"


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|").replace("\n", " ")


def _escaped(text: str) -> str:
    """Text whose < are no tags, but for those in `code`."""
    parts = re.sub(r"```(\w+)", r"`\1`", text).split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def verifiers() -> str:
    """Every verifier that ships, with what it reads, its options, and its own words."""
    combinators = [name for name in known_rewards() if _combinator(name)]
    plain = [name for name in known_rewards() if name not in combinators]
    lines = [
        "# Verifiers that ship",
        "",
        "In a recipe by name, `rewards: [gsm8k]`, or with options, `rewards: [{name: math, mode: strict}]`; in Python",
        '`reward_funcs="gsm8k"`, or `{"name": "math", "mode": "strict"}`. A column is read from the row by name; an option',
        "has one value for all rows, or is a column too. Verifiers of [your own](rewards.md) are used in the same way.",
        "",
        f"`scope` is the part of a completion that is read. {_paragraphs(scoped)[1]}",
        "",
        "| | |",
        "| --- | --- |",
    ]
    functions = {name: get_reward(name).function for name in plain} | {name: _combinator(name) for name in combinators}
    lines += [f"| [`{name}`](#{name}) | {_cell(_summary(functions[name]))} |" for name in plain]
    lines += ["", "Made of others:", "", "| | |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{name}) | {_cell(_summary(functions[name]))} |" for name in combinators]
    for name, function in functions.items():
        lines += ["", f"## {name}", "", *_parameters(function, combinator=name in combinators), "", *_words(function)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _parameters(function: Callable[..., Any], *, combinator: bool) -> Iterator[str]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in BUILT_INS]
    needed = [f"`{p.name}`" for p in parameters if p.default is p.empty]
    options = [f"`{p.name}={p.default!r}`" for p in parameters if p.default is not p.empty]
    options = [text if len(text) < 60 else f"{text.partition('=')[0]}`" for text in options]
    if needed:
        yield f"- {'needs' if combinator else 'columns'}: {', '.join(needed)}"
    if options:
        yield f"- options: {', '.join(options)}"


def _summary(function: Any) -> str:
    return " ".join(_paragraphs(function)[0].split()).rstrip(".")


def _paragraphs(function: Any) -> list[str]:
    text = inspect.getdoc(function).partition("\nRaises:\n")[0]  # type: ignore[union-attr]
    return re.split(r"\n\n+", text.strip())


def _words(function: Any) -> Iterator[str]:
    """A docstring as Markdown: indented formulas and examples become blocks of code, and what it raises a line each."""
    for paragraph in _paragraphs(function):
        code = paragraph.startswith((">>>", "    "))
        language = "pycon" if paragraph.startswith(">>>") else "text"
        yield from ([f"```{language}", textwrap.dedent(paragraph), "```", ""] if code else [_escaped(paragraph), ""])
    raises = inspect.getdoc(function).partition("\nRaises:\n")[2]  # type: ignore[union-attr]
    for line in re.sub(r"\n\s{8,}", " ", raises).strip().splitlines():
        error, _, reason = line.strip().partition(": ")
        yield f"- {'outcome `bad_gold`' if error == 'BadGoldError' else f'raises `{error}`'}: {_escaped(reason)}"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings, "verifiers.md": verifiers}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
        print(FOLDER / name)
