"""Verifiers made of verifiers: a gate, a weighted sum, a clip; and what others need to make their own.

In YAML `{name: gate, first: format, then: {name: math, mode: strict}}`, in Python `gate("format", "math")`; parts are what
`get_reward` takes, combinators among them. What comes out is an ordinary per-sample verifier that asks for every column
that one of its parts asks for. A combined score says "no answer" where the score that it is made of did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_hf.rewards.outcomes import NoAnswer
from grpo_hf.rewards.registry import RewardSpec, get_reward, register_combinator
from grpo_hf.rewards.signature import BUILT_INS, Reward, judge_of, parser_of

Score = Callable[[], Any]
"""Scores the sample with one part; None where it does not apply. A part is not called before its score is asked for."""
Verifier = Callable[..., Any]


@register_combinator
def gate(first: RewardSpec, then: RewardSpec, *, threshold: float = 1.0, otherwise: float = 0.0) -> Verifier:
    """The score of `then` where `first` scores at least `threshold` or does not apply, else `otherwise`.

    `then` is not called where the gate is closed.

    >>> form = lambda completion: float(completion.startswith("#### "))
    >>> right = lambda completion, answer: float(completion.endswith(answer))
    >>> verifier = gate(form, right, otherwise=-1.0)
    >>> [verifier(completion=text, answer="4") for text in ("#### 4", "#### 5", "4")]
    [1.0, 0.0, -1.0]
    """

    def rule(keywords: Mapping[str, Any], condition: Score, reward: Score) -> Any:
        opened = condition()
        return reward() if opened is None or opened >= threshold else with_outcome(otherwise, [opened])

    return verifier_of("gate", parts_of("gate", [first, then]), rule)


@register_combinator
def weighted_sum(rewards: Sequence[RewardSpec], weights: Sequence[float] | None = None) -> Verifier:
    """Σ_k weight_k · score_k over the parts that apply; None where none does. Without `weights` each weighs 1.

    >>> verifier = weighted_sum([lambda completion: 1.0, lambda completion: None, lambda completion: 0.5], [0.2, 9, 2])
    >>> verifier(completion="")
    1.2

    Raises:
        ValueError: no parts, or not one weight for each.
    """
    parts = parts_of("weighted_sum", rewards)
    factors = [1.0] * len(parts) if weights is None else list(weights)
    if not parts or len(factors) != len(parts):
        names = ", ".join(part.name for part in parts) or "none"
        raise ValueError(f"weighted_sum has {len(factors)} weights for {len(parts)} rewards ({names}); give one each")

    def rule(keywords: Mapping[str, Any], *rewards: Score) -> Any:
        scores = [reward() for reward in rewards]
        terms = [factor * value for factor, value in zip(factors, scores, strict=True) if value is not None]
        return with_outcome(sum(terms), scores) if terms else None

    return verifier_of("weighted_sum", parts, rule)


@register_combinator
def clip(reward: RewardSpec, *, low: float = 0.0, high: float = 1.0) -> Verifier:
    """min(max(score, low), high).

    >>> [clip(lambda completion: float(completion))(completion=text) for text in ("-2", "0.5", "7")]
    [0.0, 0.5, 1.0]

    Raises:
        ValueError: `low` is above `high`.
    """
    if low > high:
        raise ValueError(f"clip needs low <= high; got low={low} and high={high}")

    def rule(keywords: Mapping[str, Any], reward: Score) -> Any:
        score = reward()
        return None if score is None else with_outcome(min(max(score, low), high), [score])

    return verifier_of("clip", parts_of("clip", [reward]), rule)


def parts_of(name: str, specs: Sequence[RewardSpec]) -> list[Reward]:
    """The verifiers that a combinator is made of.

    Raises:
        ValueError: the specs are not a list, or one of them is called once per batch or is async.
    """
    if isinstance(specs, str | Mapping):
        raise ValueError(f"{name} takes a list of rewards; got {specs!r}")
    parts = [get_reward(spec) for spec in specs]
    for part in parts:
        if not part.per_sample or part.is_async:
            kind = "async" if part.is_async else "called once per batch"
            raise ValueError(
                f"{name} combines verifiers of single samples, `def f(completion, ...) -> float`; {part.name!r} is {kind}:"
                " give it as a reward of its own and weigh it with reward_weights"
            )
    return parts


def with_outcome(value: float, scores: Sequence[Any]) -> float:
    """The value, which says "no answer" if one of the scores that it is made of does."""
    return NoAnswer(value) if any(isinstance(score, NoAnswer) for score in scores) else value


def verifier_of(name: str, parts: Sequence[Reward], rule: Callable[..., Any], *, built_ins: Sequence[str] = ()) -> Verifier:
    """A per-sample verifier that returns `rule(keywords, *scores)`, with a `Score` for each part.

    It asks for what its parts ask for, and for `built_ins`. Parts that parse one gold column have it parsed once a prompt.
    """

    def verifier(**keywords: Any) -> Any:
        return rule(keywords, *_scores(parts, keywords, [()] * len(parts)))

    verifier.__name__ = verifier.__qualname__ = name
    verifier.__signature__ = _signature(parts, built_ins)  # type: ignore[attr-defined]
    verifier.in_process = all(part.in_process for part in parts)  # type: ignore[attr-defined]
    columns = {part.gold_column for part in parts if part.gold_column}
    if len(columns) == 1:
        _parse_once(verifier, columns.pop(), parts, rule)
    return verifier


def _parse_once(verifier: Any, column: str, parts: Sequence[Reward], rule: Callable[..., Any]) -> None:
    """Split a verifier in two, as `parses_gold` does; parts without a parser get the column as it is."""

    def parse_gold(value: Any) -> tuple[Any, list[tuple[Any, ...]]]:
        return value, [(parser_of(part.function)(value),) if part.gold_column else () for part in parts]

    def judge(**keywords: Any) -> Any:
        value, golds = keywords[column]
        keywords[column] = value
        return rule(keywords, *_scores(parts, keywords, golds))

    verifier.gold_column, verifier.parse_gold, verifier.judge = column, parse_gold, judge


def _scores(parts: Sequence[Reward], keywords: Mapping[str, Any], golds: Sequence[tuple[Any, ...]]) -> list[Score]:
    """A `Score` for each part; `golds` holds a parsed gold answer in a tuple, or an empty one, for each."""
    return [functools.partial(_score, part, keywords, gold) for part, gold in zip(parts, golds, strict=True)]


def _score(part: Reward, keywords: Mapping[str, Any], gold: tuple[Any, ...]) -> Any:
    chosen = {key: value for key, value in keywords.items() if part.accepts(key)}
    function = part.function
    if gold:
        chosen[str(part.gold_column)], function = gold[0], judge_of(function)
    value = function(**chosen)
    return None if value is None or value != value else value


def _signature(parts: Sequence[Reward], built_ins: Sequence[str]) -> inspect.Signature:
    """The union of the parts' parameters; what one of them needs is needed."""
    needed = {name for part in parts for name in part.columns}
    filled = {"completion", *built_ins, *(name for part in parts for name in part.built_ins)}
    optional = {name for part in parts for name in part.optional_columns} - needed
    names = [*(name for name in BUILT_INS if name in filled), *sorted(needed), *sorted(optional)]
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None if name in optional else inspect.Parameter.empty
        )
        for name in names
    ]
    if any(part.takes_all for part in parts):
        parameters.append(inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)
