"""Scored groups -> updates: advantages over all processes, selection, denominators, micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.packing.layout import LAYOUTS, num_tokens
from grpo_hf.rollout.balance import balanced
from grpo_hf.rollout.peers import Peers
from grpo_hf.types import Completion, Group, PackedBatch


@dataclass
class Update:
    """What one optimizer step runs on this process."""

    microbatches: list[PackedBatch]
    """Never empty; on the CPU until they are run."""
    denominators: Denominators
    """Of the loss; counted before completions without signal were dropped, but without those that have no reward."""


@dataclass(frozen=True)
class Plan:
    """How a rollout becomes updates."""

    advantage: str
    """A name of ADVANTAGES."""
    updates_per_rollout: int
    """Optimizer steps that share the rollout's completions between them."""
    layout: str
    """A name of LAYOUTS."""
    tokens_per_microbatch: int
    """Token budget of one forward pass."""
    max_completion_length: int
    """For the constant-length aggregation."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""
    keep_zero_signal: bool = False
    """Forward completions with advantage 0 too, for a KL or entropy term, or to check that dropping them is exact."""
    balance: bool = False
    """Let processes train on each other's groups, so that all have about as many tokens."""
    same_number: bool = False
    """Give every process as many micro-batches, for forward passes that all of them have to run together."""

    def updates(self, groups: list[Group], peers: Peers) -> list[Update]:
        """Set every completion's advantage and cut the rollout into updates; no reward (NaN): no part in the loss."""
        assign_advantages(groups, self.advantage, peers)
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(len(completion.ids) for completion in completions if self._counts(completion))
        sequences = sum(not math.isnan(completion.reward) for completion in completions)
        tokens, sequences = map(sum, zip(*peers.gather((tokens, sequences)), strict=True))
        parts = _split(groups, self.updates_per_rollout)
        batches = [self._microbatches(part, peers) for part in parts]
        if self.same_number:
            numbers = [max(column) for column in zip(*peers.gather([len(batch) for batch in batches]), strict=True)]
            batches = [batch + _idle(batch, number - len(batch)) for batch, number in zip(batches, numbers, strict=True)]
        return [
            Update(
                microbatches=batch,
                denominators=Denominators(
                    tokens=tokens / self.updates_per_rollout,
                    sequences=max(sequences, 1) / self.updates_per_rollout,
                    local_tokens=sum(len(c.ids) for group in part for c in group.completions if self._counts(c)),
                    num_processes=peers.count,
                    max_completion_length=self.max_completion_length,
                ),
            )
            for part, batch in zip(parts, batches, strict=True)
        ]

    def _microbatches(self, groups: list[Group], peers: Peers) -> list[PackedBatch]:
        kept = [
            Group(group.prompt, completions)
            for group in groups
            if (completions := [item for item in group.completions if self._has_gradient(item)])
        ]
        if self.balance:
            kept = balanced(kept, peers)
        pack = LAYOUTS[self.layout]
        if kept:
            return pack(kept, tokens_per_microbatch=self.tokens_per_microbatch)
        # The step still takes place, with gradient 0: optimizer momentum goes on, and other processes wait for this one.
        singles = [Group(group.prompt, [completion]) for group in groups for completion in group.completions]
        (batch,) = pack([min(singles, key=num_tokens)], tokens_per_microbatch=self.tokens_per_microbatch)
        batch.weight = 0.0
        return [batch]

    def _counts(self, completion: Completion) -> bool:
        return not (math.isnan(completion.reward) or (self.mask_truncated_completions and completion.truncated))

    def _has_gradient(self, completion: Completion) -> bool:
        return self._counts(completion) and (self.keep_zero_signal or completion.advantage != 0.0)


def _idle(batches: list[PackedBatch], count: int) -> list[PackedBatch]:
    """Micro-batches that add nothing to the gradient."""
    return [replace(min(batches, key=lambda batch: batch.num_tokens), weight=0.0) for _ in range(count)]


def assign_advantages(groups: list[Group], form: str, peers: Peers) -> None:
    """Set `completion.advantage` from the rewards of all processes, each of which holds as many groups."""
    everyone = peers.gather([[completion.reward for completion in group.completions] for group in groups])
    advantages: Float[Tensor, "prompts group"] = ADVANTAGES[form](torch.tensor([row for part in everyone for row in part]))
    for group, row in zip(groups, advantages[peers.rank * len(groups) :].tolist(), strict=False):
        for completion, advantage in zip(group.completions, row, strict=True):
            completion.advantage = advantage


def _split(groups: list[Group], parts: int) -> list[list[Group]]:
    """Cut the completions, in order, into equal parts; a group that a cut runs through has its prompt in both."""
    size = sum(len(group.completions) for group in groups) // parts
    updates: list[list[Group]] = [[] for _ in range(parts)]
    place = 0
    for group in groups:
        for completion in group.completions:
            part = updates[place // size]
            if not part or part[-1].prompt is not group.prompt:
                part.append(Group(group.prompt, []))
            part[-1].completions.append(completion)
            place += 1
    return updates
