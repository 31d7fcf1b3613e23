"""A plain training loop, for rivals that are a way to lay tokens out or a head, and no trainer.

For each micro-batch: the decoder's forward, the head on the hidden states that predict a target, the losses, the backward
pass; then AdamW. Nothing else: no logging, no gradient norm. The loss is the trainers' default (ratio clipped to 1 ± 0.2,
targets of the rollout over its updates as denominator, and with a KL coefficient its estimate k3 times the ratio).
Completions without signal are forwarded, since none of these rivals leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.cases import Case, Data, Transcript, base_of, load_model, text_of
from benchmarks.sides.clock import Clock

EPSILON = 0.2
POSITIONS = 256
"""Positions that the head scores at a time; larger pieces of logits spend a CPU's time on fresh memory."""


@dataclass(frozen=True)
class Sample:
    """One completion behind its prompt."""

    prompt: list[int]
    completion: Transcript
    advantage: float
    group: int
    """Number of the prompt in the rollout."""

    @property
    def ids(self) -> list[int]:
        """The whole sequence."""
        return self.prompt + self.completion.ids


@dataclass
class MicroBatch:
    """What is forwarded at a time."""

    inputs: dict[str, Any]
    """What the decoder is called with."""
    scored_at: Int[Tensor, " position"]
    """Where, in the flattened rows, the hidden states are that predict a target."""
    labels: Int[Tensor, " position"]
    """The token that each of them is to predict."""
    terms: Int[Tensor, " target"]
    """For each target its place in ``scored_at``: two completions that begin alike have a target each at one position."""
    advantages: Float[Tensor, " target"]
    old_logprobs: Float[Tensor, " target"] | None = None
    """None: the current ones."""
    ref_logprobs: Float[Tensor, " target"] | None = None
    """None: no KL term."""


Head = Callable[[Float[Tensor, "position dim"], nn.Module, MicroBatch, float, float], None]
"""Hidden states that take the gradient, the head, the micro-batch, beta and the denominator: makes the backward pass."""


def train(
    case: Case,
    model: str,
    data: Data,
    clock: Clock,
    *,
    lay_out: Callable[[Case, Sequence[Sample]], Iterable[MicroBatch]],
    prepare: Callable[[Any], None] = lambda model: None,
    head: Head | None = None,
    old_logprobs: bool = True,
) -> None:
    """Train until the clock ends it; ``old_logprobs``: after a rollout's first update, take those of the weights that
    sampled from a pass without gradient."""
    policy = load_model(case, model).train()
    prepare(policy)
    reference = deepcopy(policy).requires_grad_(False) if case.beta else None
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0, fused=True)
    clock.watch(policy)
    steps = 0
    while True:
        clock.wait()
        updates = [list(lay_out(case, samples)) for samples in samples_of(case, data)]
        for batch in updates[1:] if old_logprobs else []:
            for micro_batch in batch:
                micro_batch.old_logprobs = logprobs_of(policy, micro_batch)
        targets = sum(len(micro_batch.terms) for batch in updates for micro_batch in batch) / case.updates
        for batch in updates:
            for micro_batch in batch:
                if reference is not None:
                    micro_batch.ref_logprobs = logprobs_of(reference, micro_batch)
                forward_backward(policy, micro_batch, head or plain_head, case.beta, targets)
            clock.before_step(policy, steps)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        clock.after_step(steps)


def samples_of(case: Case, data: Data) -> list[list[Sample]]:
    """A rollout's completions with their advantages, (reward - mean) / (std + 1e-4), by update."""
    updates: list[list[Sample]] = [[] for _ in range(case.updates)]
    for number, (prompt, group) in enumerate(zip(data.prompts, data.completions, strict=True)):
        rewards = data.reward([text_of(prompt)] * len(group), [text_of(made.ids) for made in group])
        mean, spread = fmean(rewards), stdev(rewards) + 1e-4
        advantages = [(reward - mean) / spread for reward in rewards]
        updates[number // case.groups] += [Sample(prompt, *pair, number) for pair in zip(group, advantages, strict=True)]
    return updates


def micro_batch_of(inputs: dict[str, Any], samples: Sequence[Sample], predicted_at: Sequence[Sequence[int]]) -> MicroBatch:
    """A layout in which each target has a position of its own; ``predicted_at``: where each completion's tokens are."""
    found = [
        (place, token, sample.advantage)
        for sample, places in zip(samples, predicted_at, strict=True)
        for place, token, is_target in zip(places, sample.completion.ids, sample.completion.is_sampled, strict=True)
        if is_target
    ]
    places, labels, advantages = map(torch.tensor, zip(*found, strict=True))
    return MicroBatch(inputs, places, labels, torch.arange(len(labels)), advantages)


def hidden_of(model: Any, batch: MicroBatch) -> Float[Tensor, "position dim"]:
    """The last hidden states that predict a target."""
    states = base_of(model).get_decoder()(**batch.inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[batch.scored_at]


@torch.no_grad()
def logprobs_of(model: Any, batch: MicroBatch) -> Float[Tensor, " target"]:
    """Without gradient."""
    hidden, head = hidden_of(model, batch), base_of(model).get_output_embeddings()
    pairs = zip(hidden.split(POSITIONS), batch.labels.split(POSITIONS), strict=True)
    return torch.cat([-F.cross_entropy(head(states), labels, reduction="none") for states, labels in pairs])[batch.terms]


def forward_backward(model: Any, batch: MicroBatch, head: Head, beta: float, targets: float) -> None:
    """The head has its backward pass first, so that no more logits are held than it makes at a time."""
    hidden = hidden_of(model, batch)
    leaf = hidden.detach().requires_grad_()
    head(leaf, base_of(model).get_output_embeddings(), batch, beta, targets)
    hidden.backward(leaf.grad)


def plain_head(hidden: Tensor, head: nn.Module, batch: MicroBatch, beta: float, targets: float) -> None:
    """torch's own cross entropy, and the backward pass of each piece of positions before the next."""
    for start in range(0, len(hidden), POSITIONS):
        here = slice(start, start + POSITIONS)
        logprobs = -F.cross_entropy(head(hidden[here]), batch.labels[here], reduction="none")
        chosen = (batch.terms >= start) & (batch.terms < start + POSITIONS)
        logprobs = logprobs[batch.terms[chosen] - start]
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[chosen]
        advantages, ratio = batch.advantages[chosen], (logprobs - old).exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
        if batch.ref_logprobs is not None:
            behind = batch.ref_logprobs[chosen] - logprobs
            losses = losses + beta * ratio * (behind.exp() - behind - 1)
        (losses.sum() / targets).backward()
