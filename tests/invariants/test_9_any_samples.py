"""Invariant 9: "Tree gradient = row-by-row gradient for any set of samples: forks, several turns, shared system
prompts." """

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from grpo_hf.packing import layout
from grpo_hf.packing.layout import num_tokens, pack
from grpo_hf.types import TrainingSample
from tests.invariants.gradients import gradient_of_layout, gradient_of_rows, make_model
from tests.samples import VOCAB, random_samples, sample, samples_that_share
from tests.tiny_models import FAMILIES, MIXTURES, relative_error

GENERATOR = torch.Generator().manual_seed(0)


def words(count: int) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=GENERATOR).tolist()


def with_advantages(samples: list[TrainingSample]) -> list[TrainingSample]:
    """Of each target its own, as credit by token gives them; completions numbered, and as long as their samples together."""
    lengths: dict[int, int] = {}
    for item in samples:
        lengths[item.completion] = lengths.get(item.completion, 0) + int(item.is_target.sum())
    return [
        replace(
            item,
            advantages=torch.where(item.is_target, torch.randn(len(item.ids), generator=GENERATOR), 0.0),
            completion_length=lengths[item.completion],
        )
        for item in samples
    ]


def conversation(history: Sequence[int], *turns: tuple[int, int], completion: int) -> TrainingSample:
    """Turns of (tokens that the model wrote, tokens that a tool answered) after a history."""
    own, tool = zip(*turns, strict=True)
    ends = list(accumulate(sum(turn) for turn in turns))
    starts = [len(history) + start for start in (0, *ends[:-1])]
    targets = [place for start, count in zip(starts, own, strict=True) for place in range(start, start + count)]
    return sample([*history, *words(sum(own) + sum(tool))], targets, completion=completion)


def several_turns() -> list[TrainingSample]:
    """Two groups of three with tool results between targets; two have a first turn in common, all a last one of a token."""
    samples = []
    for group in range(2):
        prompt = words(6)
        first = conversation(prompt, (4, 3), completion=0)
        for number in range(3):
            history = first.ids if number < 2 else prompt
            item = conversation(history, (2, 5), (3, 1), (1, 0), completion=3 * group + number)
            if number < 2:  # each is trained on the turn that they share
                item.is_target[: len(history)] = first.is_target
            samples.append(item)
    return with_advantages(samples)


def forks() -> list[TrainingSample]:
    """Completions whose history was rewritten between turns: two samples each, every target in one of them."""
    samples = []
    for completion in range(3):
        prompt = words(4)
        thinking, answer = words(5), words(2)
        samples.append(sample([*prompt, *thinking, *answer], range(4, 11), completion=completion))
        samples.append(sample([*prompt, *answer, *words(3), *words(4)], range(9, 13), completion=completion))
    return with_advantages(samples)


def a_shared_system_prompt() -> list[TrainingSample]:
    """Over groups with and without a question of their own, with completions of one token."""
    system = words(10)
    groups = [(words(length), lengths) for length, lengths in ((3, [4, 1, 2]), (5, [1, 1]), (1, [6]), (0, [2, 3]))]
    samples = [
        sample([*system, *question, *words(length)], range(10 + len(question), 10 + len(question) + length))
        for question, lengths in groups
        for length in lengths
    ]
    return with_advantages([replace(item, completion=number) for number, item in enumerate(samples)])


def random_forests() -> list[TrainingSample]:
    """So few words that beginnings are shared at any length, with targets anywhere, some completions in several samples."""
    more = [replace(item, completion=100 + item.completion) for item in samples_that_share(9, count=16)]
    return with_advantages(samples_that_share(7, count=16) + more)


CASES = {
    "single turns": random_samples(),
    "several turns": several_turns(),
    "forks": forks(),
    "a shared system prompt": a_shared_system_prompt(),
    "one-token completions": random_samples([(5, [1, 1, 1]), (1, [1, 1]), (9, [1])]),
    "forests": random_forests(),
}

GRID = [
    ("packed", 1000, 0),
    ("packed", 1000, 4),
    ("packed", 40, 0),
    ("packed", 24, 100),
    ("packed", 1, 4),
    ("padded", 60, 4),
]
"""Layout, tokens_per_microbatch, LEAST_SAVED."""


def check(
    family: str, samples: list[TrainingSample], monkeypatch: pytest.MonkeyPatch, grid: list = GRID, **options: bool
) -> float:
    model, worst = make_model(family, **options), 0.0
    expected = gradient_of_rows(model, samples)
    for kind, budget, least_saved in grid:
        monkeypatch.setattr(layout, "LEAST_SAVED", least_saved)
        error = relative_error(gradient_of_layout(model, samples, kind, budget), expected)
        worst = max(worst, error)
        assert error < 1e-5, f"{family}, {options}, {kind}, budget {budget}, least saved {least_saved}"
    return worst


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_any_samples(family: str, samples: list[TrainingSample], monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"\n{family}: worst relative gradient error {check(family, samples, monkeypatch):.1e}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_with_lora_and_checkpointing(family: str, lora: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of these samples at once, in one tree and in several."""
    everything = [
        replace(item, completion=1000 * number + item.completion)
        for number, samples in enumerate(CASES.values())
        for item in samples
    ]
    grid = [("packed", 1000, 0), ("packed", 100, 4)]
    worst = check(family, everything, monkeypatch, grid, lora=lora, checkpointing=checkpointing)
    print(f"\n{family}: worst relative gradient error {worst:.1e}")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
    ],
    ids=str,
)
def test_windows_and_caps_matter_here(family: str, changes: dict) -> None:
    """Without them these samples have another gradient, so a layout that left them out would be found out."""
    gradients = [gradient_of_rows(make_model(family, **options), CASES["several turns"]) for options in ({}, changes)]
    assert relative_error(*gradients) > 0.01


def test_the_budgets_and_runs_matter_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tree and several; trees of several levels, and none."""
    for samples in CASES.values():
        assert [len(pack(samples, tokens_per_microbatch=budget)) > 1 for budget in (1, 1000)] == [True, False]
        assert num_tokens(samples) < sum(len(layout.inputs_of(item)) for item in samples)
    for least_saved, some in ((0, True), (100, False)):
        monkeypatch.setattr(layout, "LEAST_SAVED", least_saved)
        (batch,) = pack(CASES["forests"], tokens_per_microbatch=1000)
        assert batch.tree is not None
        assert (sum(node.end > node.span.stop for node in batch.tree.nodes) > 10) is some
        assert any(node.parent >= 0 and node.end > node.span.stop for node in batch.tree.nodes) is some
