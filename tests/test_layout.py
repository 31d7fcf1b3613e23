"""Layouts: samples -> token trees and padded rows, by literal values and on random samples."""

import random
from collections import Counter

import pytest
import torch

from grpo_hf.packing import layout
from grpo_hf.packing.layout import LAYOUTS, default_budget, num_tokens, pack, packed_batch, pad, padded_batch
from grpo_hf.types import Completion, Node, PackedBatch, TrainingSample
from tests.samples import group, random_samples, sample, samples_of, samples_that_share


def completion(ids: list[int], advantage: float) -> Completion:
    return Completion(ids, truncated=False, advantage=advantage)


GROUPS = [
    group([1, 2], [completion([10, 11], 1.0), completion([20], -1.0)]),
    group([3], [completion([30, 31, 32], 2.0)]),
    group([4, 5], [completion([40, 41, 42], 3.0)]),
]
SAMPLES = samples_of(GROUPS)

CONVERSATIONS = [
    sample([1, 2, 3, 4, 50, 51, 60, 61, 62], [6, 7, 8], completion=0),
    sample([1, 2, 3, 4, 50, 51, 70, 71], [6, 7], completion=1),
    sample([1, 2, 3, 4, 52, 90, 91, 53], [4, 7], completion=2),  # 90, 91 are a tool's answer
    sample([1, 2, 9, 54], [3], completion=3),
]
"""A system prompt (1, 2), two questions below it, and a first turn (50, 51) that two completions go on from."""


@pytest.fixture
def every_run_is_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LEAST_SAVED", 0)


def test_a_tree_in_a_row() -> None:
    """What comes after a completion's last target, and that target, are no input; depths are positions."""
    batch = packed_batch(SAMPLES)
    assert batch.input_ids.tolist() == [[4, 5, 40, 41, 3, 30, 31, 1, 2, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.targets.tolist() == [10, 11, 20, 30, 31, 32, 40, 41, 42]
    assert batch.scored_at[batch.scored].tolist() == [8, 9, 8, 4, 5, 6, 1, 2, 3]
    assert batch.scored_at.tolist() == [1, 2, 3, 4, 5, 6, 8, 9], "the prompt's last token predicts two, and is there once"
    assert batch.advantages.tolist() == [1, 1, -1, 2, 2, 2, 3, 3, 3]
    assert batch.completion.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert batch.lengths.tolist() == [2, 1, 3, 3]
    assert (batch.samples, batch.num_targets, batch.num_tokens) == ([0, 1, 2, 3], [2, 1, 3, 3], 10)


def test_the_trees_structure() -> None:
    """The one-token completion has no input of its own, so its prompt's run goes on into the other completion."""
    tree = packed_batch(SAMPLES).tree
    assert tree is not None
    assert tree.nodes == [Node(range(0, 4), -1, 4), Node(range(4, 7), -1, 7), Node(range(7, 10), -1, 10)]
    assert tree.reach.tolist() == [4] * 4 + [7] * 3 + [10] * 3
    assert tree.depth.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert tree.longest == 4


def test_a_tree_of_several_levels(every_run_is_a_node: None) -> None:
    batch = packed_batch(CONVERSATIONS)
    assert batch.input_ids.tolist() == [[1, 2, 9, 3, 4, 52, 90, 91, 50, 51, 70, 60, 61]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 5, 6, 4, 5, 6, 6, 7]]
    assert batch.tree is not None
    assert batch.tree.nodes == [
        Node(range(0, 2), -1, 13),
        Node(range(2, 3), 0, 3),
        Node(range(3, 5), 0, 13),
        Node(range(5, 8), 2, 8),
        Node(range(8, 10), 2, 13),
        Node(range(10, 11), 4, 11),
        Node(range(11, 13), 4, 13),
    ]
    assert batch.tree.reach.tolist() == [13, 13, 3, 13, 13, 8, 8, 8, 13, 13, 11, 13, 13]
    assert batch.targets.tolist() == [60, 61, 62, 70, 71, 52, 53, 54]
    assert batch.scored_at[batch.scored].tolist() == [9, 11, 12, 9, 10, 4, 7, 2]
    assert batch.tree.longest == 8


def test_runs_that_are_not_worth_a_node_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """(50, 51) saves 2 tokens and (1, 2) as many; between them (3, 4), which three go on from by then, saves 4."""
    monkeypatch.setattr(layout, "LEAST_SAVED", 4)
    batch = packed_batch(CONVERSATIONS)
    assert batch.input_ids.tolist() == [[1, 2, 9, 1, 2, 3, 4, 52, 90, 91, 50, 51, 70, 50, 51, 60, 61]]
    assert batch.tree is not None
    assert [(node.parent, node.end) for node in batch.tree.nodes] == [(-1, 3), (-1, 17), (1, 10), (1, 13), (1, 17)]
    assert sequences_of(batch) == [as_trained(item) for item in CONVERSATIONS]
    roomy, tight = (pack(CONVERSATIONS, tokens_per_microbatch=budget) for budget in (17, 16))
    assert [batch.num_tokens for batch in roomy] == [17]
    assert [batch.num_tokens for batch in tight] == [13], "what is repeated must fit"


def test_padded_rows() -> None:
    batch = padded_batch(SAMPLES[:3])
    assert batch.input_ids.tolist() == [[1, 2, 10], [1, 2, 0], [3, 30, 31]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 3
    assert batch.targets.tolist() == [10, 11, 20, 30, 31, 32]
    assert batch.scored_at.tolist() == [1, 2, 4, 6, 7, 8]
    assert batch.scored.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.completion.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.tree is None


def test_one_token_completions_only() -> None:
    """The prompt is all there is to forward; its last position scores every completion, and goes through the head once."""
    batch = packed_batch(samples_of([group([7, 8, 9], [completion([token], 1.0) for token in (1, 2, 3)])]))
    assert batch.input_ids.tolist() == [[7, 8, 9]]
    assert (batch.scored_at.tolist(), batch.scored.tolist()) == ([2], [0, 0, 0])
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.tree is not None
    assert batch.tree.nodes == [Node(range(0, 3), -1, 3)]


def test_the_same_completion_twice_is_computed_once_and_counts_twice() -> None:
    batch = packed_batch(samples_of([group([7], [completion([1, 2], 1.0), completion([1, 2], 1.0)])]))
    assert batch.input_ids.tolist() == [[7, 1]]
    assert (batch.targets.tolist(), batch.completion.tolist()) == ([1, 2, 1, 2], [0, 0, 1, 1])
    assert batch.scored.tolist() == [0, 1, 0, 1]


def test_token_counts_by_hand() -> None:
    assert num_tokens(SAMPLES[:2]) == 2 + 1 + 0
    assert [num_tokens([item]) for item in SAMPLES] == [3, 2, 3, 4]
    assert num_tokens(SAMPLES) == 3 + 3 + 4
    assert num_tokens(CONVERSATIONS) == 13


def test_a_group_above_the_budget_is_cut_and_its_prompt_repeated() -> None:
    completions = [completion(ids, 1.0) for ids in ([10, 11, 12], [20, 21], [30, 31, 32])]
    large = samples_of([group([1, 2, 3], completions)])  # 3 + 2 + 1 + 2 tokens
    first, second = pack(large, tokens_per_microbatch=6)
    assert first.input_ids.tolist() == [[1, 2, 3, 30, 31, 20]]
    assert second.input_ids.tolist() == [[1, 2, 3, 10, 11]]
    alone = pack(large, tokens_per_microbatch=1)
    assert sorted(batch.samples for batch in alone) == [[0], [1], [2]]  # never less than one


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        (13, {(0, 1, 2, 3): 13}),
        (12, {(0, 1, 2): 12, (3,): 3}),
        (10, {(0, 1, 3): 10, (2,): 7}),
        (9, {(0, 1): 9, (2, 3): 8}),
        (8, {(0,): 8, (2, 3): 8, (1,): 7}),
    ],
)
def test_a_tree_above_the_budget_is_cut_between_subtrees_and_its_path_repeated(
    budget: int, parts: dict[tuple[int, ...], int], every_run_is_a_node: None
) -> None:
    """The two that go on from the same turn stay together as long as they fit."""
    batches = pack(CONVERSATIONS, tokens_per_microbatch=budget)
    assert {tuple(batch.samples): batch.num_tokens for batch in batches} == parts


def test_small_groups_fill_the_budget_together() -> None:
    samples = random_samples([(2, [4]), (3, [6]), (2, [2]), (1, [2])])  # 5, 8, 3 and 2 tokens
    assert [batch.num_tokens for batch in pack(samples, tokens_per_microbatch=10)] == [10, 8]
    # 4 rows, longest first: 8, then 5 and 3 and 2, padded to 5 each.
    assert [tuple(batch.input_ids.shape) for batch in pad(samples, tokens_per_microbatch=15)] == [(1, 8), (3, 5)]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_the_samples_of_a_completion_stay_together(kind: str, budget: int) -> None:
    """A completion whose history was rewritten is two samples; a ratio over all of its tokens needs both."""
    rewritten = [
        sample([1, 2, 3, 4, 5], [3, 4], completion=7, completion_length=3),
        sample([1, 9, 5], [2], completion=8),
        sample([1, 2, 6, 7, 8], [4], completion=7, completion_length=3),
    ]
    batches = LAYOUTS[kind](rewritten, tokens_per_microbatch=budget)
    assert sorted(tuple(batch.samples) for batch in batches) == ([(0, 2), (1,)] if budget < 1000 else [(0, 2, 1)])
    whole = next(batch for batch in batches if 0 in batch.samples)
    assert whole.completion.tolist() == [0, 0, 0, 1][: len(whole.completion)]
    assert whole.lengths.tolist() == [3, 1][: len(whole.lengths)]


def test_engine_logprobs_are_nan_where_a_sample_has_none() -> None:
    """And None where no sample has any; a token without one, among others that have, keeps its place."""
    item = group([1], [completion([2, 3], 1.0), completion([4], 1.0)])
    assert packed_batch(samples_of([item])).rollout_logprobs is None
    item.completions[0].rollout_logprobs = [-0.5, None]
    half = packed_batch(samples_of([item])).rollout_logprobs
    torch.testing.assert_close(half, torch.tensor([-0.5, torch.nan, torch.nan]), equal_nan=True)
    item.completions[1].rollout_logprobs = [-2.0]
    for batch in (packed_batch(samples_of([item])), padded_batch(samples_of([item]))):
        torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([-0.5, torch.nan, -2.0]), equal_nan=True)
        assert batch.old_logprobs is batch.ref_logprobs is None


@pytest.mark.parametrize("least_saved", [0, 1, 4, 100])
def test_random_samples_lose_and_double_nothing_and_keep_the_budget(
    least_saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "LEAST_SAVED", least_saved)
    generator = random.Random(0)
    for seed in range(60):
        samples, budget = samples_that_share(seed), generator.randint(1, 60)
        expected = Counter(map(as_trained, samples))
        for arrange in (pack, pad):
            batches = arrange(samples, tokens_per_microbatch=budget)
            assert Counter(item for batch in batches for item in sequences_of(batch)) == expected
            assert all(batch.num_tokens <= budget or len(batch.lengths) == 1 for batch in batches)
            again = arrange(samples, tokens_per_microbatch=budget)
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
        (whole,) = pack(samples, tokens_per_microbatch=10_000)
        assert least_saved or whole.num_tokens == num_tokens(samples)


def as_trained(item: TrainingSample) -> tuple:
    """(ids up to the last target, places of targets, their advantages)."""
    targets = item.is_target.nonzero().flatten().tolist()
    return item.ids[: targets[-1] + 1], tuple(targets), tuple(item.advantages[targets].tolist())


def sequences_of(batch: PackedBatch) -> list[tuple]:
    """The same of each sample, read back from what a model and a loss are given: a token's context is what it sees."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    found = []
    per_target = zip(*(x.split(batch.num_targets) for x in (batch.scored, batch.targets, batch.advantages)), strict=True)
    for scored, targets, advantages in per_target:
        at = batch.scored_at[scored]
        context = seen_from(batch, int(at[-1]))
        assert positions[context].tolist() == list(range(len(context)))
        sequence = (*ids[context].tolist(), int(targets[-1]))
        places = (positions[at] + 1).tolist()
        assert [sequence[place] for place in places] == targets.tolist()
        assert set(at.tolist()) <= set(context)
        found.append((sequence, tuple(places), tuple(advantages.tolist())))
    return found


def seen_from(batch: PackedBatch, query: int) -> list[int]:
    """The keys that a query sees."""
    if batch.tree is None:
        row = query - query % batch.input_ids.shape[1]
        return list(range(row, query + 1))
    return [key for key in range(query + 1) if query < batch.tree.reach[key]]


def test_moving_a_batch_moves_its_structure() -> None:
    batch = packed_batch(SAMPLES).to(torch.device("meta"))
    assert batch.tree is not None
    tensors = [batch.input_ids, batch.advantages, batch.scored, batch.lengths, batch.tree.reach, batch.tree.depth]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.tree.nodes[0] == Node(range(0, 4), -1, 4)


@pytest.mark.parametrize(
    ("device", "prompt", "group", "budget"),
    [
        ("cpu", 100, 600, 2048),
        ("cpu", 100, 100_000, 2048),
        ("cpu", 2048, 2560, 2560),  # the whole group
        ("cpu", 2048, 100_000, 8192),  # cut, the prompt in every piece
        ("cuda:0", 2048, 100_000, 8192),
        ("cuda:0", 4096, 100_000, 16_384),
    ],
)
def test_the_default_budget(device: str, prompt: int, group: int, budget: int) -> None:
    assert default_budget(torch.device(device), longest_prompt=prompt, longest_group=group) == budget
