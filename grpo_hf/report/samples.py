"""rollouts/*.parquet -> groups of completions as the page shows them, thinned where they are many."""

from __future__ import annotations

import ast
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Group = dict[str, Any]
Said = list[tuple[str, str]]
"""A heading, such as who speaks, and a text, for each message."""

SHOWN_CHARACTERS = 4000
"""Of a text; the rest is cut off, which is said."""

WITH_TOKENS = 2
"""Rollouts, the last and the first, whose tokens are shown one by one with their log-probs."""

OF_TOKENS = {"ids", "is_sampled", "logprobs"}
NOT_SHOWN = {"weights"}


@dataclass
class Samples:
    """What the rollout files of a run hold."""

    completions: int = 0
    """In all files."""
    groups: list[Group] = field(default_factory=list)
    """Those that are shown, in the order of their steps."""
    history: list[list[Any]] = field(default_factory=list)
    """[step, row of the data set, mean reward] of every prompt that was sampled, in all files."""


def read_samples(folder: Path, *, budget: int, decode: Callable[[int], str] | None = None) -> Samples:
    """The samples of a run: all of them where they take at most ``budget`` bytes as JSON.

    Otherwise whole rollouts are left out: the last one and the first are read before those in the middle between them, then
    the middles of what is left, so that what is shown is spread evenly over the run. The first WITH_TOKENS that are read
    have their tokens too, where ``decode`` makes texts of them.
    """
    samples, files = Samples(), dict(_light(folder))
    by_rollout: dict[int, list[Path]] = {}
    for file, light in files.items():
        samples.completions += len(light)
        for rollout in sorted(set(light["rollout"].to_pylist())):
            by_rollout.setdefault(rollout, []).append(file)
        samples.history += _history(light)
    samples.history.sort()
    rollouts = sorted(by_rollout)
    for number, place in enumerate(spread(len(rollouts))):
        of_this = decode if number < WITH_TOKENS else None
        hidden = NOT_SHOWN if of_this else NOT_SHOWN | OF_TOKENS
        rows = [row for file in by_rollout[rollouts[place]] for row in _rows(file, rollouts[place], hidden)]
        groups = as_groups(rows, of_this)
        budget -= len(json.dumps(groups))
        if budget < 0 and samples.groups:
            break
        samples.groups += groups
    samples.groups.sort(key=lambda group: (group["step"], group["number"]))
    return samples


def spread(count: int) -> Iterator[int]:
    """0 to count - 1: the last, the first, the middle, and then the middles of ever smaller parts.

    >>> list(spread(6))
    [5, 0, 2, 1, 3, 4]
    """
    given = dict.fromkeys([count - 1, 0][:count])
    yield from given
    parts = [(0, count - 1)]
    for low, high in parts:
        middle = (low + high) // 2
        if middle not in given and low < high:
            given[middle] = None
            yield middle
        parts += [(low, middle), (middle, high)] if high - low > 1 else []


def _light(folder: Path) -> Iterator[tuple[Path, pa.Table]]:
    """The files that are whole, each with the columns that numbers are of."""
    for file in sorted(folder.glob("*.parquet")):
        try:
            known = set(pq.read_schema(file).names)
            yield file, pq.read_table(file, columns=[c for c in ("rollout", "step", "row", "reward") if c in known])
        except pa.ArrowInvalid:  # a run killed while it wrote
            logger.warning("%s is torn and was skipped", file)


def _history(light: pa.Table) -> list[list[Any]]:
    if "row" not in light.column_names:
        return []
    means = light.group_by(["step", "row"]).aggregate([("reward", "mean")])
    return [[row["step"], row["row"], finite(row["reward_mean"])] for row in means.to_pylist()]


def decoder_of(run_dir: Path) -> Callable[[int], str] | None:
    """Makes a token's text of its id, by the tokenizer that the run has saved with its model or a checkpoint."""
    saved = filter(Path.is_file, [run_dir / "tokenizer.json", *run_dir.glob("checkpoint-*/tokenizer.json")])
    if (file := next(saved, None)) is None:
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return cache(lambda token: tokenizer.decode([token], skip_special_tokens=False))


def _rows(file: Path, rollout: int, hidden: set[str]) -> list[Row]:
    columns = [name for name in pq.read_schema(file).names if name not in hidden]
    return pq.read_table(file, columns=columns, filters=[("rollout", "=", rollout)]).to_pylist()


def as_groups(rows: Sequence[Row], decode: Callable[[int], str] | None = None) -> list[Group]:
    """A group for each prompt of a rollout, its completions by reward, the highest first."""
    by_group: dict[Any, list[Row]] = {}
    for row in rows:
        by_group.setdefault((row["rollout"], row["process"], row.get("group"), row["prompt"]), []).append(row)
    return [_group(number, members, decode) for number, members in enumerate(by_group.values())]


def _group(number: int, rows: list[Row], decode: Callable[[int], str] | None) -> Group:
    first, by_reward = rows[0], sorted(rows, key=lambda row: _worth(row["reward"]), reverse=True)
    asked = asked_messages(first)
    return {
        "step": first["step"],
        "number": number,
        "row": first.get("row"),
        "prompt": _cut([("user", first["prompt"])] if asked is None else conversation(asked, [])),
        "columns": {name: _short(value) for name, value in json.loads(first.get("columns") or "{}").items()},
        "items": [_item(row, asked) | _tokens(row, decode) for row in by_reward],
    }


def asked_messages(row: Row) -> list[Any] | None:
    """The messages of a chat's prompt; None where the prompt is a text."""
    if not row.get("messages"):
        return None
    with suppress(ValueError, SyntaxError):
        asked = ast.literal_eval(row["prompt"])
        return json.loads(row["messages"])[: len(asked)]
    return []


def _item(row: Row, asked: list[Any] | None) -> dict[str, Any]:
    said: Said = [("assistant", row["completion"])]
    turns = json.loads(row.get("turns") or "[]")
    if asked is not None:
        said = conversation(json.loads(row["messages"])[len(asked) :], turns)
    scores = {key.removeprefix("rewards/"): value for key, value in row.items() if key.startswith("rewards/")}
    return {
        "said": _cut(said),
        "reward": finite(row["reward"]),
        "scores": {name: [finite(value), row.get(f"outcomes/{name}") or "scored"] for name, value in scores.items()},
        "logged": {key.removeprefix("extra/"): _short(value) for key, value in row.items() if key.startswith("extra/")},
        "advantage": finite(row["advantage"]),
        "length": row["length"],
        "cut_off": bool(row["truncated"]),
        "turns": len(turns),
    }


def _tokens(row: Row, decode: Callable[[int], str] | None) -> dict[str, Any]:
    """[text, log-prob when it was sampled] of each token; no log-prob for those that the model did not choose."""
    ids = row.get("ids")
    if decode is None or not ids:
        return {}
    chosen, logprobs = row.get("is_sampled") or [True] * len(ids), iter(row.get("logprobs") or [])  # of the chosen alone
    values = [finite(next(logprobs, None)) if mine else None for mine in chosen]
    rounded = [None if value is None else round(value, 2) for value in values]
    return {"tokens": [[decode(token), value] for token, value in zip(ids, rounded, strict=True)]}


def conversation(messages: list[dict[str, Any]], turns: list[dict[str, Any]]) -> Said:
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


def _cut(said: Said) -> Said:
    return [(heading, _cut_text(text)) for heading, text in said]


def _cut_text(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}\n[cut here: {SHOWN_CHARACTERS:,} of {len(text):,} characters shown]"


def _short(value: Any) -> str:
    return str(value)[:200]


def _worth(reward: float | None) -> float:
    """A place among rewards: what has none comes last."""
    return -math.inf if finite(reward) is None else float(reward or 0.0)


def finite(value: float | None) -> float | None:
    """The number, or None for what is none."""
    return value if value is not None and math.isfinite(value) else None
