"""Scored groups -> updates: advantages over all processes, training samples, selection, denominators."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from grpo_hf.algorithm.advantages import credited
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.packing.layout import num_tokens
from grpo_hf.rollout.peers import Peers
from grpo_hf.types import Branch, Completion, Group, TrainingSample

if TYPE_CHECKING:
    from grpo_hf.algorithm.advantages import Credit


@dataclass
class Update:
    """What one optimizer step trains on, on this process; it is laid out when it is run."""

    samples: list[TrainingSample]
    """Never empty."""
    denominators: Denominators
    """Of the loss; counted before samples without signal were dropped, but without those that have no reward."""
    idle: bool = False
    """The samples add nothing to the gradient: they give the process something to run, for momentum goes on, and other
    processes wait for this one."""


@dataclass(frozen=True)
class Plan:
    """How a rollout becomes updates."""

    credit: Credit
    """One of ADVANTAGES."""
    reward_weights: Sequence[float]
    """One for each reward."""
    updates_per_rollout: int
    """Optimizer steps that share the rollout's completions between them."""
    max_completion_length: int
    """For the constant-length aggregation."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""
    keep_zero_signal: bool = False
    """Forward what has advantage 0 too, for a KL or entropy term, or to check that dropping it is exact."""
    whole_completions: bool = False
    """The loss takes something over whole completions: none of their tokens may be left out."""
    balance: bool = False
    """Let processes train on each other's groups, so that all have about as many tokens."""

    def updates(self, groups: list[Group], version: int, peers: Peers) -> list[Update]:
        """Set every completion's advantage and cut the rollout, sampled by the weights of ``version``, into updates.

        A completion without a reward (NaN) has no part in the loss.
        """
        assign_advantages(groups, self.credit, self.reward_weights, peers)
        completions = [item for group in groups for item in group.completions]
        count, cuts = len(completions), self.updates_per_rollout
        # In order, of all processes where they share the work, into equal parts; a cut may run through a group.
        first, total = (peers.rank * count, peers.count * count) if self.balance else (0, count)
        ends = [min(max(part * total // cuts - first, 0), count) for part in range(cuts + 1)]
        parts = [slice(start, end) for start, end in pairwise(ends)]
        tokens = [sum(num_sampled(item) for item in completions[part] if self._counts(item)) for part in parts]
        sequences = sum(not math.isnan(item.reward) for item in completions)
        everyone = peers.gather((tokens, sequences, count, len(groups)))
        of_updates = [sum(column) for column in zip(*(tokens for tokens, *_ in everyone), strict=True)]
        firsts = [sum(counts[place] for counts in everyone[: peers.rank]) for place in (2, 3)]
        samples = numbered_samples(groups, version, *firsts)
        trainable = [sample for own in samples for sample in own]
        if not trainable and not all(item.valid for item in completions):
            trainable = [stand_in(groups[0].prompt.ids, version)]
        if not trainable:
            raise ValueError(f"no token of {count} completions was sampled by the model (is_sampled): nothing to train on")
        smallest = min(trainable, key=lambda sample: len(sample.ids))
        updates = []
        for part, of_update, local in zip(parts, of_updates, tokens, strict=True):
            pairs = zip(completions[part], samples[part], strict=True)
            counted = [sample for item, own in pairs if self._counts(item) for sample in own]
            kept = [pruned for sample in counted if (pruned := self._pruned(sample))]
            if self.balance:
                kept = balanced(kept, peers)
            denominators = Denominators(
                tokens=sum(of_updates) / cuts,
                update_tokens=of_update,
                sequences=max(sum(counts[1] for counts in everyone), 1) / cuts,
                local_tokens=local,
                num_processes=peers.count,
                max_completion_length=self.max_completion_length,
            )
            updates.append(Update(kept or [smallest], denominators, idle=not kept))
        return updates

    def _counts(self, completion: Completion) -> bool:
        masked = self.mask_truncated_completions and completion.truncated
        return num_sampled(completion) > 0 and not math.isnan(completion.reward) and not masked

    def _pruned(self, sample: TrainingSample) -> TrainingSample | None:
        """As far as it has a gradient; None where it has none."""
        if self.keep_zero_signal:
            return sample
        signal = sample.advantages.nonzero()
        if not len(signal):
            return None
        return sample if self.whole_completions else until(sample, int(signal[-1]) + 1)


def assign_advantages(groups: list[Group], credit: Credit, weights: Sequence[float], peers: Peers) -> None:
    """Set `completion.advantage` from the scores of all processes, each of which holds as many groups; 0 without reward."""
    mine = [[(scores_of(item), num_sampled(item)) for item in group.completions] for group in groups]
    rows = [row for part in peers.gather(mine) for row in part]
    scores = torch.tensor([[scored for scored, _ in row] for row in rows], dtype=torch.float64)
    lengths = torch.tensor([[length for _, length in row] for row in rows], dtype=torch.float64)
    advantages = credited(credit, scores, torch.tensor(weights, dtype=torch.float64), lengths)
    for group, row in zip(groups, advantages[peers.rank * len(groups) :].tolist(), strict=False):
        for completion, advantage in zip(group.completions, row, strict=True):
            completion.advantage = advantage


def numbered_samples(
    groups: Sequence[Group], version: int, first_completion: int = 0, first_group: int = 0
) -> list[list[TrainingSample]]:
    """The samples of each completion, numbered on from these: one as a rule, see samples_of."""
    members = [
        (group.prompt.ids, item, number) for number, group in enumerate(groups, first_group) for item in group.completions
    ]
    return [
        samples_of(prompt, item, version, completion=place, group=number)
        for place, (prompt, item, number) in enumerate(members, first_completion)
    ]


def samples_of(
    prompt: Sequence[int], item: Completion, version: int, *, completion: int, group: int
) -> list[TrainingSample]:
    """A completion as it is trained on: a sample for each history that something was sampled in, none where nothing was.

    Raises ValueError when it was never given an advantage, or has more or fewer log-probs than sampled ids.
    """
    if item.advantage is None:
        raise ValueError(f"completion {completion} has no advantage; assign_advantages compares it with its group")
    own = list(prompt if item.prompt_ids is None else item.prompt_ids)
    sampled = [False] * len(own) + (item.is_sampled or [True] * len(item.ids))
    histories = [*item.earlier, Branch([*own, *item.ids], sampled, item.rollout_logprobs)]
    total, samples = num_sampled(item), []
    for history in histories:
        ids, count = history.ids, sum(history.is_sampled)
        logprobs = history.rollout_logprobs and [math.nan if value is None else value for value in history.rollout_logprobs]
        if len(history.is_sampled) != len(ids) or (logprobs and len(logprobs) != count):
            raise ValueError(
                f"completion {completion} has {len(ids)} ids with its prompt, is_sampled for {len(history.is_sampled)} of "
                f"them, and {len(logprobs or ())} log-probs for the {count} that were sampled; give one for each"
            )
        is_target = torch.tensor(history.is_sampled)
        if count:
            samples.append(
                TrainingSample(
                    ids=tuple(ids),
                    is_target=is_target,
                    advantages=torch.where(is_target, item.advantage, 0.0),
                    completion=completion,
                    group=group,
                    completion_length=total,
                    versions=torch.full((count,), version),
                    rollout_logprobs=None if not logprobs else torch.tensor(logprobs, dtype=torch.float32),
                )
            )
    return samples


def stand_in(prompt: Sequence[int], version: int) -> TrainingSample:
    """What an idle update forwards where no episode has begun, since each of their environments has failed at its reset."""
    nothing = Completion([prompt[-1]], truncated=True, advantage=0.0)
    return samples_of(prompt, nothing, version, completion=0, group=0)[0]


def scores_of(completion: Completion) -> list[float]:
    """Its scores, in the order of the rewards; NaN where a verifier's outcome leaves the completion out."""
    return [score if completion.valid else math.nan for score in completion.rewards.values()]


def num_sampled(completion: Completion) -> int:
    """Tokens that the model chose, in all histories of an episode."""
    last = len(completion.ids) if completion.is_sampled is None else sum(completion.is_sampled)
    return last + sum(sum(branch.is_sampled) for branch in completion.earlier)


def until(sample: TrainingSample, stop: int) -> TrainingSample:
    """The first ``stop`` tokens of a sample, with what belongs to them."""
    targets = int(sample.is_target[:stop].sum())
    names = ("versions", "rollout_logprobs", "old_logprobs", "ref_logprobs", "teacher_logprobs")
    per_target: dict[str, Any] = {name: value[:targets] for name in names if (value := getattr(sample, name)) is not None}
    per_token: dict[str, Any] = {name: getattr(sample, name)[:stop] for name in ("ids", "is_target", "advantages")}
    return replace(sample, **per_token, **per_target)


def balanced(samples: list[TrainingSample], peers: Peers) -> list[TrainingSample]:
    """This process's share of the samples of all processes; the loss is a sum over all, so its gradient stays the same."""
    return shares([sample for part in peers.gather(samples) for sample in part], peers.count)[peers.rank]


def shares(samples: list[TrainingSample], count: int) -> list[list[TrainingSample]]:
    """Longest processing time first (Graham 1969): each group, the largest first, to whoever has the fewest tokens."""
    groups: dict[int, list[TrainingSample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    sizes = {number: num_tokens(group) for number, group in groups.items()}
    parts: list[list[TrainingSample]] = [[] for _ in range(count)]
    totals = [0] * count
    for number in sorted(groups, key=lambda number: sizes[number], reverse=True):
        place = totals.index(min(totals))
        parts[place] += groups[number]
        totals[place] += sizes[number]
    return parts
