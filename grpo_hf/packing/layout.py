"""Training samples -> micro-batches under a token budget; pure, and the same numbers on every process.

packed    one row, each token of the samples' tree once    attention reads TokenTree
padded    one row a sample, padded to the longest          for models whose attention cannot be told the tree
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from grpo_hf.packing.tree import Ids, Run, cut, token_runs, without_short_runs
from grpo_hf.types import Node, PackedBatch, TokenTree, TrainingSample

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

TOKENS_PER_MICROBATCH = {"cpu": 2048, "cuda": 8192}
"""Budget by device: with more tokens a CPU spends its time on fresh memory (`python -m benchmarks.scaling --axis budget`); a
GPU wants many."""

LEAST_SAVED = 2
"""Tokens that a run has to save to be worth a node, whose own calls in every layer take a CPU as long as a token or two
(`python -m benchmarks.nodes`)."""


def default_budget(device: torch.device, *, longest_prompt: int, longest_group: int, shared: int = 0) -> int:
    """tokens_per_microbatch that suits the device and the prompts.

    No group is cut so small that its prompt, which is in every piece, is more than a quarter of it; and what all prompts
    begin with (``shared`` tokens), which is in every micro-batch, is an eighth as far as twice the usual budget goes.
    """
    suits = TOKENS_PER_MICROBATCH["cpu" if device.type == "cpu" else "cuda"]
    return max(suits, min(4 * longest_prompt, longest_group), min(8 * shared, 2 * suits))


def pack(samples: Sequence[TrainingSample], *, tokens_per_microbatch: int) -> list[PackedBatch]:
    """Lay samples out as token trees of at most ``tokens_per_microbatch`` tokens, those together that share the most.

    A tree that is larger than the budget is cut between its subtrees, their common path repeated. The samples of one
    completion stay together; where they are larger than the budget they have a micro-batch of their own.
    """
    members = list(_by_completion(samples).values())
    first = [inputs_of(samples[numbers[0]]) for numbers in members]
    extra = [num_tokens([samples[n] for n in numbers]) - len(ids) for numbers, ids in zip(members, first, strict=True)]
    parts = cut(first, extra, tokens_per_microbatch)
    return [packed_batch(samples, [n for unit in part for n in members[unit]], tokens_per_microbatch) for part in parts]


def pad(samples: Sequence[TrainingSample], *, tokens_per_microbatch: int) -> list[PackedBatch]:
    """Lay samples out as right-padded rows, longest first, rows x longest <= ``tokens_per_microbatch``; the samples of one
    completion stay together."""
    length = {number: len(inputs_of(sample)) for number, sample in enumerate(samples)}
    units = sorted(_by_completion(samples).values(), key=lambda unit: max(length[n] for n in unit), reverse=True)
    batches: list[list[int]] = []
    for unit in units:
        if batches and (len(batches[-1]) + len(unit)) * max(length[n] for n in batches[-1]) <= tokens_per_microbatch:
            batches[-1] += unit
        else:
            batches.append(list(unit))
    return [padded_batch(samples, batch) for batch in batches]


LAYOUTS: dict[str, Callable[..., list[PackedBatch]]] = {"packed": pack, "padded": pad}


def inputs_of(sample: TrainingSample) -> Ids:
    """The tokens that are forwarded: all before the last target."""
    return sample.ids[: int(sample.is_target.nonzero()[-1])]


def num_tokens(samples: Iterable[TrainingSample]) -> int:
    """Tokens of the samples' tree."""
    return sum(map(len, token_runs([inputs_of(sample) for sample in samples])))


def packed_batch(
    samples: Sequence[TrainingSample], members: Sequence[int] | None = None, budget: int | None = None
) -> PackedBatch:
    """One row: the tree of those samples (None: of all); runs that are not worth a node are repeated where it fits."""
    members = range(len(samples)) if members is None else members
    sequences = [inputs_of(samples[number]) for number in members]
    runs = token_runs(sequences)
    repeated = without_short_runs(runs, LEAST_SAVED)
    if budget is None or sum(map(len, repeated)) <= budget:
        runs = repeated
    nodes, places = lay_out(runs)
    ids = torch.tensor([token for run in runs for token in sequences[run.sequence][run.start : run.stop]])
    depth = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    reach = torch.cat([torch.full((len(node.span),), node.end) for node in nodes])
    return _batch(
        samples,
        members,
        [places[number] for number in range(len(sequences))],
        input_ids=ids[None],
        position_ids=depth[None],
        attention_mask=None,
        tree=TokenTree(nodes, reach, depth, longest=max(map(len, sequences))),
    )


def lay_out(runs: Sequence[Run]) -> tuple[list[Node], dict[int, Int[Tensor, " depth"]]]:
    """Where each run lies in the row, and by sequence where its tokens do."""
    nodes: list[Node] = []
    places: dict[int, Tensor] = {}
    path: list[Tensor] = []  # of each run, the places of all tokens from the root to its end
    for run in runs:
        start = nodes[-1].span.stop if nodes else 0
        span = range(start, start + len(run))
        nodes.append(Node(span, run.parent, span.stop))
        own = torch.arange(span.start, span.stop)
        path.append(own if run.parent < 0 else torch.cat([path[run.parent], own]))
        for sequence in run.ends:
            places[sequence] = path[-1]
    for node in reversed(nodes):
        if node.parent >= 0:
            nodes[node.parent].end = max(nodes[node.parent].end, node.end)
    return nodes, places


def padded_batch(samples: Sequence[TrainingSample], members: Sequence[int] | None = None) -> PackedBatch:
    """One row a sample; sequences start in column 0, so position ids count columns and padding comes last."""
    members = range(len(samples)) if members is None else members
    sequences = [inputs_of(samples[number]) for number in members]
    longest = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return _batch(
        samples,
        members,
        [torch.arange(row * longest, row * longest + len(ids)) for row, ids in enumerate(sequences)],
        input_ids=input_ids,
        position_ids=torch.arange(longest).expand(len(sequences), -1),
        attention_mask=attention_mask,
        tree=None,
    )


def _batch(
    every: Sequence[TrainingSample],
    members: Sequence[int],
    places: Sequence[Int[Tensor, " time"]],
    *,
    input_ids: Int[Tensor, "rows time"],
    **rows: object,
) -> PackedBatch:
    """A layout with the members' targets; ``places`` say where in the flattened rows the inputs of each lie."""
    samples = [every[number] for number in members]
    at = [sample.is_target.nonzero().squeeze(1) for sample in samples]
    counts = [len(targets) for targets in at]
    inputs = [place[: len(inputs_of(sample))] for place, sample in zip(places, samples, strict=True)]
    scored_at = torch.cat([place[targets - 1] for place, targets in zip(places, at, strict=True)])
    scored_at, scored = scored_at.unique(return_inverse=True)
    lengths = {sample.completion: sample.completion_length for sample in samples}
    completions = {number: place for place, number in enumerate(lengths)}
    completion = torch.tensor([completions[sample.completion] for sample in samples])
    return PackedBatch(
        input_ids=input_ids,
        **rows,  # type: ignore[arg-type]
        scored_at=scored_at,
        scored=scored,
        targets=torch.cat([torch.tensor(sample.ids)[targets] for sample, targets in zip(samples, at, strict=True)]),
        advantages=torch.cat([sample.advantages[targets] for sample, targets in zip(samples, at, strict=True)]),
        completion=completion.repeat_interleave(torch.tensor(counts)),
        lengths=torch.tensor(list(lengths.values())),
        samples=list(members),
        num_targets=counts,
        shared_by=torch.cat(inputs).bincount(minlength=input_ids.numel()),
        rollout_logprobs=_joined([sample.rollout_logprobs for sample in samples], counts),
        old_logprobs=_joined([sample.old_logprobs for sample in samples], counts),
        ref_logprobs=_joined([sample.ref_logprobs for sample in samples], counts),
        teacher_logprobs=_joined([sample.teacher_logprobs for sample in samples], counts),
    )


def _joined(values: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """The samples' values one after the other, NaN for samples without; None where no sample has any."""
    if all(value is None for value in values):
        return None
    pairs = zip(values, counts, strict=True)
    return torch.cat([torch.full((count,), torch.nan) if value is None else value for value, count in pairs])


def _by_completion(samples: Sequence[TrainingSample]) -> dict[int, list[int]]:
    """The numbers of each completion's samples."""
    units: dict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        units[sample.completion].append(number)
    return units
