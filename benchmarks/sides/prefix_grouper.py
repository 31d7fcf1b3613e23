"""PrefixGrouper, in the plain loop, with torch's SDPA as its attention function: a group is a row, its prompt once.

A row holds as much of a group as the case's budget allows, a micro-batch as many rows; within one PrefixGrouper pads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.cases import Case, Data, base_of
from benchmarks.sides import plain
from benchmarks.sides.clock import Clock
from benchmarks.sides.plain import MicroBatch, Sample

NAME = "bench_prefix_grouper"


def train(case: Case, model: str, folder: str, data: Data, clock: Clock) -> None:
    """Its attention is registered with transformers, as its own documentation does."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    plain.train(
        case,
        model,
        data,
        clock,
        lay_out=lay_out,
        prepare=lambda policy: base_of(policy).set_attn_implementation(NAME),
    )


def lay_out(case: Case, samples: Sequence[Sample]) -> Iterator[MicroBatch]:
    """Right-padded rows of a prompt and its completions."""
    from prefix_grouper import PrefixGrouper

    for rows in batches_of(case, samples):
        longest = max(map(length_of, rows))
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        places = []
        for number, row in enumerate(rows):
            prompt = row[0].prompt
            ids, positions = list(prompt), list(range(len(prompt)))
            for sample in row:
                first = number * longest + len(ids)
                places.append([number * longest + len(prompt) - 1, *range(first, first + len(sample.completion.ids) - 1)])
                ids += sample.completion.ids
                positions += range(len(prompt), len(sample.ids))
            input_ids[number, : len(ids)] = torch.tensor(ids)
            position_ids[number, : len(ids)] = torch.tensor(positions)
        grouper = PrefixGrouper([[len(row[0].prompt), *(len(sample.completion.ids) for sample in row)] for row in rows])
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "grouper": grouper, "masks": masks_of(grouper)}
        yield plain.micro_batch_of(inputs, [sample for row in rows for sample in row], places)


def batches_of(case: Case, samples: Sequence[Sample]) -> list[list[list[Sample]]]:
    """Rows of one prompt, at most the budget long, longest first; then micro-batches, padded, of at most the budget."""
    rows: list[list[Sample]] = []
    for _, group in groupby(samples, key=lambda sample: sample.group):
        rows.append([])
        for sample in group:
            if rows[-1] and length_of([*rows[-1], sample]) > case.tokens:
                rows.append([])
            rows[-1].append(sample)
    batches: list[list[list[Sample]]] = []
    for row in sorted(rows, key=length_of, reverse=True):
        if batches and (len(batches[-1]) + 1) * length_of(batches[-1][0]) <= case.tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def length_of(row: Sequence[Sample]) -> int:
    """Tokens of a prompt and its completions."""
    return len(row[0].prompt) + sum(len(sample.completion.ids) for sample in row)


def masks_of(grouper: Any) -> dict[bool, Tensor | None]:
    """By whether completions are asking: the keys that each query sees, made once for all layers. None: causal, no padding.

    PrefixGrouper pads prompts on the left and completions on the right; a query of padding sees itself.
    """
    prompt, whole = grouper.prefix_attn_mask, grouper.suffix_attn_mask
    width, length = prompt.shape[1], whole.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    itself = torch.eye(width, dtype=torch.bool)
    prompts = None if bool(prompt.all()) else (causal[:width, :width] & prompt[:, None] | itself)[:, None]
    return {False: prompts, True: (causal[width:] & whole[:, None])[:, None]}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    grouper: Any,
    masks: Any,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """PrefixGrouper takes prompts and completions apart, asks each, and puts their answers together."""
    ask: Callable[..., Tensor] = partial(_ask, masks=masks, scaling=scaling)
    return grouper.forward(ask, query, key, value), None


def _ask(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, *, masks: Any, scaling: float) -> Tensor:
    mask = masks[query.shape[2] != key.shape[2]]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2)


def num_tokens(case: Case, data: Data) -> int:
    """Padded rows of groups."""
    batches = batches_of(case, plain.samples_of(case, data)[0])
    return sum(len(rows) * max(map(length_of, rows)) for rows in batches)
