"""The token trie that TRL's AsyncGRPOTrainer packs rows with, in the plain loop, with an attention on torch's SDPA.

The trie and its layout are TRL's; its own attention is a kernel for Hopper GPUs, and its head is slower on a CPU than the
plain loop's. AsyncGRPOTrainer takes its generator's log-probs for the old ones, so no pass is spent on them here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.cases import Case, Data, base_of
from benchmarks.sides import plain
from benchmarks.sides.clock import Clock
from benchmarks.sides.plain import MicroBatch, Sample


@dataclass
class Paths:
    """Which keys the segments of a row's trie see: their own and those of their path from the root."""

    keys_at: Tensor
    """Where the keys of all segments are, one path after another."""
    queries: list[int]
    """Tokens of each segment."""
    keys: list[int]
    """Tokens of each path."""
    masks: list[Tensor | None]
    """For each segment who sees whom; None where all keys are seen, or the path is the segment itself, which is causal."""
    mask: Tensor
    """Who sees whom in the whole row."""


def by_segment(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scaling: float) -> Tensor:
    """One gather of all paths' keys, then a call for each segment."""
    parts = (
        query.split(paths.queries, dim=2),
        key.index_select(2, paths.keys_at).split(paths.keys, dim=2),
        value.index_select(2, paths.keys_at).split(paths.keys, dim=2),
        paths.masks,
    )
    outs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=q.shape[2] == k.shape[2], scale=scaling, enable_gqa=True
        )
        for q, k, v, mask in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2)


def by_mask(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scaling: float) -> Tensor:
    """One call for the row."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=paths.mask, scale=scaling, enable_gqa=True)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {"bench_by_segment": by_segment, "bench_by_mask": by_mask}


def train(case: Case, model: str, folder: str, data: Data, clock: Clock) -> None:
    """With the attention that is the faster one for the case's first micro-batch."""
    for name, attend in ATTENTIONS.items():
        AttentionInterface.register(name, _as_interface(attend))
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    trial = next(lay_out(case, plain.samples_of(case, data)[0]))
    plain.train(
        case,
        model,
        data,
        clock,
        lay_out=lay_out,
        prepare=lambda policy: base_of(policy).set_attn_implementation(fastest(policy, trial)),
        old_logprobs=False,
    )


def fastest(policy: Any, batch: MicroBatch) -> str:
    """The name of the attention whose second forward and backward pass took the least time."""
    seconds = {}
    for name in ATTENTIONS:
        base_of(policy).set_attn_implementation(name)
        for _ in range(2):
            start = time.perf_counter()
            plain.hidden_of(policy, batch).sum().backward()
            seconds[name] = time.perf_counter() - start
    policy.zero_grad()
    print(f"attention: {seconds}")
    return min(seconds, key=seconds.__getitem__)


def lay_out(case: Case, samples: Sequence[Sample]) -> Iterator[MicroBatch]:
    """TRL's rows; a position that several completions share is scored once."""
    for row in rows_of(case, samples):
        packed = row.pack()
        scored_at = (packed["shift_labels"] != -100).nonzero()[:, 0]
        yield MicroBatch(
            inputs={
                "input_ids": packed["input_ids"][None],
                "position_ids": packed["position_ids"][None],
                "paths": paths_of(packed),
            },
            scored_at=scored_at,
            labels=packed["shift_labels"][scored_at],
            terms=torch.searchsorted(scored_at, packed["token_index"]),
            advantages=packed["advantages"],
        )


def rows_of(case: Case, samples: Sequence[Sample]) -> Iterator[Any]:
    """Completions in their order, in a row while it holds no more than the budget, and two tokens a completion: TRL's trie
    repeats a token at each fork, and holds last tokens, which no other token needs."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for sample in samples:
        prompt = [False] * len(sample.prompt)
        entry = {
            "input_ids": torch.tensor(sample.ids),
            "completion_mask": torch.tensor(prompt + sample.completion.is_sampled),
            "old_log_probs": torch.zeros(len(sample.ids)),
            "advantage": sample.advantage,
            "group_id": sample.group,
        }
        if row.samples and not row.fits(entry, case.tokens + 2 * len(row.samples) + 1):
            yield row
            row = TreeRow()
        row.add(entry)
    yield row


def paths_of(packed: dict[str, Tensor]) -> Paths:
    """TRL's segments and paths, and their masks, made once for all layers."""
    starts, key_ends = packed["tree_cu_seqlens_q"].tolist(), packed["tree_cu_seqlens_k"].tolist()
    keys_at = packed["tree_kv_index"]
    queries, keys = ([end - start for start, end in pairwise(ends)] for ends in (starts, key_ends))
    whole = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    masks: list[Tensor | None] = []
    for start, q, path in zip(starts, queries, keys_at.split(keys), strict=False):
        seen = torch.ones(q, len(path), dtype=torch.bool).tril(len(path) - q)
        whole[start : start + q, path] = seen
        masks.append(None if q in (1, len(path)) else seen)
    return Paths(keys_at, queries, keys, masks, whole)


def _as_interface(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, paths: Paths, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return attend(query, key, value, paths, scaling).transpose(1, 2).contiguous(), None

    return run


def num_tokens(case: Case, data: Data) -> int:
    """Tokens of the rows' tries."""
    return sum(len(row.tokens) for row in rows_of(case, plain.samples_of(case, data)[0]))
