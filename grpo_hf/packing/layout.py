"""Groups -> micro-batches under a token budget; pure, and the same numbers on every process.

packed    [prompt, c1, c2, ..., cG][prompt, c1, ...]   every real token once; attention reads PrefixLayout
padded    one row a completion, prompt repeated        for models whose attention cannot be told the layout
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo_hf.types import Completion, Group, PackedBatch, PrefixLayout

TOKENS_PER_MICROBATCH = {"cpu": 2048, "cuda": 8192}
"""Budget by device: with more tokens a CPU spends its time on fresh memory (`python -m benchmarks.scaling --axis budget`); a
GPU wants many."""


def default_budget(device: torch.device, *, longest_prompt: int, longest_group: int) -> int:
    """tokens_per_microbatch that suits the device, and cuts no group so small that the prompt, which is in every piece, is
    more than a quarter of it."""
    suits = TOKENS_PER_MICROBATCH["cpu" if device.type == "cpu" else "cuda"]
    return max(suits, min(4 * longest_prompt, longest_group))


def pack(groups: list[Group], *, tokens_per_microbatch: int) -> list[PackedBatch]:
    """Lay groups out as shared-prefix packed rows of at most ``tokens_per_microbatch`` tokens.

    A group that is larger than the budget is cut between completions, its prompt repeated; one prompt with one
    completion that is larger has a micro-batch of its own.
    """
    pieces = [piece for group in groups for piece in _cut(group, tokens_per_microbatch)]
    return [packed_batch(bin) for bin in _first_fit(pieces, tokens_per_microbatch)]


def pad(groups: list[Group], *, tokens_per_microbatch: int) -> list[PackedBatch]:
    """Lay groups out as right-padded rows, longest first, rows x longest <= ``tokens_per_microbatch``."""
    rows = [Group(group.prompt, [completion]) for group in groups for completion in group.completions]
    rows.sort(key=num_tokens, reverse=True)
    batches: list[list[Group]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * num_tokens(batches[-1][0]) <= tokens_per_microbatch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [padded_batch(batch) for batch in batches]


LAYOUTS: dict[str, Callable[..., list[PackedBatch]]] = {"packed": pack, "padded": pad}


def num_tokens(group: Group) -> int:
    """Input tokens of a group in the packed layout: the prompt once, each completion without its last token."""
    return len(group.prompt.ids) + sum(len(completion.ids) - 1 for completion in group.completions)


def num_padded_tokens(groups: list[Group]) -> int:
    """Input tokens when every completion is a row padded to the longest prompt and the longest completion (TRL's)."""
    completions = [completion for group in groups for completion in group.completions]
    longest_prompt = max(len(group.prompt.ids) for group in groups)
    return len(completions) * (longest_prompt + max(len(completion.ids) for completion in completions))


def packed_batch(groups: list[Group]) -> PackedBatch:
    """One packed row."""
    ids: list[int] = []
    positions: list[int] = []
    scored_at: list[int] = []
    prompt_of: list[int] = []
    completion_of: list[int] = []
    spans: list[tuple[range, list[range]]] = []
    num_completions = 0
    for number, group in enumerate(groups):
        prompt = range(len(ids), len(ids) + len(group.prompt.ids))
        spans.append((prompt, []))
        ids += group.prompt.ids
        positions += range(len(prompt))
        completion_of += [-1] * len(prompt)
        for completion in group.completions:
            span = range(len(ids), len(ids) + len(completion.ids) - 1)
            spans[-1][1].append(span)
            ids += completion.ids[:-1]
            positions += range(len(prompt), len(prompt) + len(span))
            completion_of += [num_completions] * len(span)
            scored_at += [prompt[-1], *span]
            num_completions += 1
        prompt_of += [number] * (len(ids) - len(prompt_of))
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        prefix_layout=PrefixLayout(
            spans,
            prompt_of=torch.tensor(prompt_of),
            completion_of=torch.tensor(completion_of),
            position_of=torch.tensor(positions),
        ),
        scored_at=torch.tensor(scored_at),
        **_completion_tensors([completion for group in groups for completion in group.completions]),
    )


def padded_batch(groups: list[Group]) -> PackedBatch:
    """One padded batch; prompts start in column 0, so position ids count columns and padding comes last."""
    rows = [(group.prompt.ids, completion) for group in groups for completion in group.completions]
    longest = max(len(prompt) + len(completion.ids) - 1 for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    scored_at: list[int] = []
    for number, (prompt, completion) in enumerate(rows):
        ids = prompt + completion.ids[:-1]
        input_ids[number, : len(ids)] = torch.tensor(ids)
        attention_mask[number, : len(ids)] = 1
        scored_at += range(number * longest + len(prompt) - 1, number * longest + len(ids))
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.arange(longest).expand(len(rows), -1),
        attention_mask=attention_mask,
        prefix_layout=None,
        scored_at=torch.tensor(scored_at),
        **_completion_tensors([completion for _, completion in rows]),
    )


def _cut(group: Group, budget: int) -> list[Group]:
    pieces = [Group(group.prompt, [])]
    for completion in group.completions:
        if pieces[-1].completions and num_tokens(pieces[-1]) + len(completion.ids) - 1 > budget:
            pieces.append(Group(group.prompt, []))
        pieces[-1].completions.append(completion)
    return pieces


def _first_fit(pieces: list[Group], budget: int) -> list[list[Group]]:
    """First-fit decreasing bin packing; ties keep their order."""
    bins: list[list[Group]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=num_tokens, reverse=True):
        size = num_tokens(piece)
        number = next((i for i, left in enumerate(room) if left >= size), len(bins))
        if number == len(bins):
            bins.append([])
            room.append(budget)
        bins[number].append(piece)
        room[number] -= size
    return bins


def _completion_tensors(completions: list[Completion]) -> dict:
    sequence = [number for number, completion in enumerate(completions) for _ in completion.ids]
    logprobs = [completion.rollout_logprobs for completion in completions if completion.rollout_logprobs is not None]
    has_logprobs = len(logprobs) == len(completions)
    return {
        "targets": torch.tensor([token for completion in completions for token in completion.ids]),
        "sequence": torch.tensor(sequence),
        "num_sequences": len(completions),
        "advantages": torch.tensor([completion.advantage for completion in completions]),
        "rollout_logprobs": torch.tensor([x for values in logprobs for x in values]) if has_logprobs else None,
    }
