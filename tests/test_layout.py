"""Layouts: groups -> packed rows and padded rows, by literal values and on random groups."""

import random
from collections import Counter

import pytest
import torch

from grpo_hf.packing.layout import default_budget, num_padded_tokens, num_tokens, pack, packed_batch, pad, padded_batch
from grpo_hf.types import Group, PackedBatch
from tests.tiny import group, random_groups

GROUPS = [group([1, 2], [[10, 11], [20]]), group([3], [[30, 31, 32]]), group([4, 5], [[40, 41, 42]])]


def test_packed_row() -> None:
    """A completion's last token is a target only; position ids restart every completion at its prompt's length."""
    batch = packed_batch(GROUPS)
    assert batch.input_ids.tolist() == [[1, 2, 10, 3, 30, 31, 4, 5, 40, 41]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.targets.tolist() == [10, 11, 20, 30, 31, 32, 40, 41, 42]
    assert batch.scored_at.tolist() == [1, 2, 1, 3, 4, 5, 7, 8, 9]
    assert batch.sequence.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert (batch.num_sequences, batch.num_tokens) == (4, 10)


def test_packed_rows_structure() -> None:
    """The one-token completion has no input, so its span is empty."""
    layout = packed_batch(GROUPS).prefix_layout
    assert layout is not None
    assert layout.spans == [
        (range(0, 2), [range(2, 3), range(3, 3)]),
        (range(3, 4), [range(4, 6)]),
        (range(6, 8), [range(8, 10)]),
    ]
    assert layout.longest == 4
    assert layout.prompt_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert layout.completion_of.tolist() == [-1, -1, 0, -1, 2, 2, -1, -1, 3, 3]
    assert layout.position_of.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]


def test_padded_rows() -> None:
    batch = padded_batch(GROUPS[:2])
    assert batch.input_ids.tolist() == [[1, 2, 10], [1, 2, 0], [3, 30, 31]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 3
    assert batch.targets.tolist() == [10, 11, 20, 30, 31, 32]
    assert batch.scored_at.tolist() == [1, 2, 4, 6, 7, 8]
    assert batch.sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.prefix_layout is None


def test_one_token_completions_only() -> None:
    """The prompt is all there is to forward; its last position scores every completion."""
    batch = packed_batch([group([7, 8, 9], [[1], [2], [3]])])
    assert batch.input_ids.tolist() == [[7, 8, 9]]
    assert batch.scored_at.tolist() == [2, 2, 2]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.prefix_layout is not None
    assert batch.prefix_layout.spans == [(range(0, 3), [range(3, 3)] * 3)]


def test_token_counts_by_hand() -> None:
    assert [num_tokens(item) for item in GROUPS] == [2 + 1 + 0, 1 + 2, 2 + 2]
    assert num_padded_tokens(GROUPS) == 4 * (2 + 3)


def test_a_group_above_the_budget_is_cut_and_its_prompt_repeated() -> None:
    large = group([1, 2, 3], [[10, 11, 12], [20, 21], [30, 31, 32]])  # 3 + 2 + 1 + 2 tokens
    first, second = pack([large], tokens_per_microbatch=6)
    assert first.input_ids.tolist() == [[1, 2, 3, 10, 11, 20]]
    assert second.input_ids.tolist() == [[1, 2, 3, 30, 31]]
    assert [batch.num_sequences for batch in pack([large], tokens_per_microbatch=1)] == [1, 1, 1]  # never less than one


def test_small_groups_fill_the_budget_together() -> None:
    sizes = [(2, [4]), (3, [6]), (2, [2]), (1, [2])]  # 5, 8, 3 and 2 tokens
    assert [batch.num_tokens for batch in pack(random_groups(sizes), tokens_per_microbatch=10)] == [10, 8]
    # 4 rows, longest first: 8, then 5 and 3 and 2, padded to 5 each.
    assert [tuple(batch.input_ids.shape) for batch in pad(random_groups(sizes), tokens_per_microbatch=15)] == [
        (1, 8),
        (3, 5),
    ]


def test_rollout_logprobs_are_kept_when_every_completion_has_them() -> None:
    item = group([1], [[2, 3], [4]])
    item.completions[0].rollout_logprobs = [-0.5, -1.0]
    assert packed_batch([item]).rollout_logprobs is None
    item.completions[1].rollout_logprobs = [-2.0]
    assert packed_batch([item]).rollout_logprobs.tolist() == [-0.5, -1.0, -2.0]  # type: ignore[union-attr]


def test_random_groups_lose_and_double_nothing_and_keep_the_budget() -> None:
    generator = random.Random(0)
    for seed in range(60):
        shapes = [
            (generator.randint(1, 9), [generator.randint(1, 7) for _ in range(generator.randint(1, 6))])
            for _ in range(generator.randint(1, 8))
        ]
        groups, budget = random_groups(shapes, seed=seed), generator.randint(1, 60)
        expected = Counter(
            (tuple(item.prompt.ids), tuple(completion.ids), completion.advantage)
            for item in groups
            for completion in item.completions
        )
        for layout in (pack, pad):
            batches = layout(groups, tokens_per_microbatch=budget)
            assert sum((Counter(sequences_of(batch)) for batch in batches), Counter()) == expected
            assert all(batch.num_tokens <= budget or batch.num_sequences == 1 for batch in batches)
            again = layout(groups, tokens_per_microbatch=budget)
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
        unique = {id(item): num_tokens(item) for item in groups}
        assert sum(batch.num_tokens for batch in pack(groups, tokens_per_microbatch=10_000)) == sum(unique.values())


def sequences_of(batch: PackedBatch) -> list[tuple]:
    """(prompt, completion, advantage) of each completion, read back from what a model and a loss are given."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    found = []
    for number in range(batch.num_sequences):
        at, targets = batch.scored_at[batch.sequence == number], batch.targets[batch.sequence == number]
        assert torch.equal(ids[at[1:]], targets[:-1])
        length = int(positions[at[0]]) + 1  # the first token is predicted by the prompt's last
        assert positions[at].tolist() == list(range(length - 1, length - 1 + len(at)))
        prompt = ids[at[0] - length + 1 : at[0] + 1]
        advantage = batch.advantages[number].item()
        found.append((tuple(prompt.tolist()), tuple(targets.tolist()), advantage))
    return found


def test_moving_a_batch_moves_its_structure() -> None:
    batch = packed_batch(GROUPS).to(torch.device("meta"))
    assert batch.prefix_layout is not None
    tensors = [batch.input_ids, batch.advantages, batch.prefix_layout.prompt_of, batch.prefix_layout.position_of]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(GROUPS[0], Group)


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
