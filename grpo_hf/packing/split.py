"""One micro-batch -> several smaller ones of the same completions, with the log-probs that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from grpo_hf.packing.layout import num_tokens, packed_batch, padded_batch
from grpo_hf.types import Completion, Group, PackedBatch, Prompt

PER_TOKEN = ("rollout_logprobs", "old_logprobs", "ref_logprobs")


def split(batch: PackedBatch, *, tokens_per_microbatch: int) -> list[PackedBatch]:
    """Cut a micro-batch between its completions, in order, into parts of at most ``tokens_per_microbatch`` tokens; one
    prompt with one completion that is larger is a part of its own."""
    build = padded_batch if batch.prefix_layout is None else packed_batch
    parts, start = [], 0
    for groups in _parts(_groups(batch), tokens_per_microbatch, padded=batch.prefix_layout is None):
        part = build(groups).to(batch.targets.device)
        span = slice(start, start + len(part.targets))
        kept = {name: values[span] for name in PER_TOKEN if (values := getattr(batch, name)) is not None}
        parts.append(replace(part, weight=batch.weight, **kept))
        start = span.stop
    return parts


def _groups(batch: PackedBatch) -> list[Group]:
    """The groups that a micro-batch was laid out from, as token ids."""
    lengths = torch.bincount(batch.sequence, minlength=batch.num_sequences).tolist()
    firsts = [places[0] for places in batch.scored_at.split(lengths)]  # where each prompt's last token lies
    groups: dict[int, Group] = {}
    for first, ids, advantage in zip(firsts, batch.targets.split(lengths), batch.advantages.tolist(), strict=True):
        owner, prompt = _prompt(batch, int(first))
        group = groups.setdefault(owner, Group(Prompt(prompt, raw="", row={}, index=owner), []))
        group.completions.append(Completion(ids.tolist(), truncated=False, advantage=advantage))
    return list(groups.values())


def _prompt(batch: PackedBatch, last: int) -> tuple[int, list[int]]:
    """The prompt whose last token lies there: its number, and its ids."""
    layout = batch.prefix_layout
    if layout is None:
        row, column = divmod(last, batch.input_ids.shape[1])
        return row, batch.input_ids[row, : column + 1].tolist()
    number = int(layout.prompt_of[last])
    return number, batch.input_ids[0, (layout.prompt_of == number) & (layout.completion_of == -1)].tolist()


def _parts(groups: list[Group], budget: int, *, padded: bool) -> Iterator[list[Group]]:
    part: list[Group] = []
    for group in groups:
        for completion in group.completions:
            more = _with(part, group, completion)
            if part and _size(more, padded=padded) > budget:
                yield part
                more = _with([], group, completion)
            part = more
    yield part


def _with(part: list[Group], group: Group, completion: Completion) -> list[Group]:
    if part and part[-1].prompt is group.prompt:
        return [*part[:-1], Group(group.prompt, [*part[-1].completions, completion])]
    return [*part, Group(group.prompt, [completion])]


def _size(groups: list[Group], *, padded: bool) -> int:
    sizes = [num_tokens(group) for group in groups]
    return len(sizes) * max(sizes) if padded else sum(sizes)
