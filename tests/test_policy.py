"""The model that is trained: its micro-batches, and log-probs that find their way back to their samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.packing.choose import choose_layout
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Update
from grpo_hf.training.models import causal_lm
from grpo_hf.training.policy import Policy
from grpo_hf.types import TrainingSample
from tests.peers import on_processes
from tests.runs import lora
from tests.samples import random_samples, samples_that_share
from tests.tiny_models import gradient_of, relative_error, tiny_model

COUNTS = Denominators(10, 4, 10, num_processes=1, max_completion_length=8, update_tokens=10)


def make_policy(model: nn.Module | None = None, *, budget: int = 60, layout: str = "packed", **options: Any) -> Policy:
    model = model or tiny_model()
    choose_layout(causal_lm(model), [[1, 2, 3]], layout)
    return Policy(
        model,
        accelerator=Accelerator(cpu=True),
        objective=grpo_objective(*LOSSES["dapo"]),
        layout=layout,
        tokens_per_microbatch=budget,
        temperature=0.7,
        **options,
    )


@torch.no_grad()
def by_rows(model: nn.Module, samples: list[TrainingSample]) -> list[torch.Tensor]:
    """The log-probs of each sample's targets, one sample at a time."""
    found = []
    for item in samples:
        ids = torch.tensor([item.ids])
        logprobs = token_logprobs(model(input_ids=ids).logits[0, :-1], ids[0, 1:], 0.7)
        found.append(logprobs[item.is_target[1:]])
    return found


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_logprobs_find_their_samples(layout: str) -> None:
    """Whatever micro-batches they were in: the policy's own for all updates but the first, whose weights these are."""
    samples = samples_that_share(3)
    reference = tiny_model(seed=1)
    choose_layout(reference, [[1, 2, 3]], layout)
    policy = make_policy(budget=12, layout=layout, reference=reference, needs_reference=True)
    first, second = policy.annotated([Update(samples, COUNTS), Update(samples, COUNTS)], step=1)
    assert len(policy.microbatches(second)) > 1
    assert all(item.old_logprobs is None for item in first.samples)
    for name, model in (("old_logprobs", policy.inner), ("ref_logprobs", reference)):
        for item, expected in zip(second.samples, by_rows(model, samples), strict=True):
            torch.testing.assert_close(getattr(item, name), expected, rtol=1e-4, atol=1e-5)
    for item, other in zip(first.samples, second.samples, strict=True):
        assert torch.equal(item.ref_logprobs, other.ref_logprobs)
        assert (item.ids, item.completion) == (other.ids, other.completion)
    report = policy.forward_backward(second, step=1)
    assert report.logprobs.keys() == set(range(len(samples)))
    for number, item in enumerate(second.samples):
        torch.testing.assert_close(report.logprobs[number], item.old_logprobs, rtol=1e-4, atol=1e-5)


def test_under_lora_the_reference_is_the_model_without_its_adapter() -> None:
    samples = random_samples()
    model = get_peft_model(tiny_model(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy = make_policy(model, needs_reference=True)
    (update,) = policy.annotated([Update(samples, COUNTS)], step=1)
    for item, expected in zip(update.samples, by_rows(tiny_model(), samples), strict=True):
        torch.testing.assert_close(item.ref_logprobs, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_forwarded_for_logprobs_that_nobody_needs() -> None:
    """On-policy and without a KL term: π_old is the policy's own, from the forward pass that trains."""
    policy = make_policy()
    forwards: list[int] = []
    policy.inner.get_decoder().register_forward_hook(lambda *args: forwards.append(1))  # type: ignore[operator]
    (update,) = policy.annotated([Update(random_samples(), COUNTS)], step=1)
    assert forwards == []
    assert len(policy.forward_backward(update, step=1).batches) == len(forwards) > 0


def test_an_idle_update_has_a_gradient_of_zeros_and_no_metrics() -> None:
    policy = make_policy()
    report = policy.forward_backward(Update(random_samples()[:1], COUNTS, idle=True), step=1)
    assert [batch.weight for batch in report.batches] == [0.0]
    assert report.loss == 0 and report.values() == {}
    gradient = gradient_of(policy.inner)
    assert len(gradient) > 10 and not any(bool(part.any()) for part in gradient.values())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_as_many_microbatches_each_where_forwards_are_run_together(layout: str) -> None:
    """Those that only make up the number have weight 0, and leave the gradient as it is."""
    own = [random_samples([(7, [5, 1, 3])]), random_samples([(3, [30, 30, 30, 30])], seed=1)]

    models = [tiny_model(), tiny_model()]  # here, since threads would share the random numbers

    def work(peers: Peers, sharded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        policy = make_policy(models[peers.rank], layout=layout, sharded=sharded, peers=peers)
        policy.inner.zero_grad()
        update = Update(own[peers.rank], COUNTS)
        batches = policy.microbatches(update)
        policy.forward_backward(update, step=1)
        return [batch.weight for batch in batches], gradient_of(policy.inner)

    free = on_processes(lambda peers: work(peers, False))
    together = on_processes(lambda peers: work(peers, True))
    numbers = [len(weights) for weights, _ in free]
    assert numbers[0] < numbers[1], "nothing has to be made up"
    assert [weights for weights, _ in together] == [[1.0] * n + [0.0] * (max(numbers) - n) for n in numbers]
    for (_, expected), (_, gradient) in zip(free, together, strict=True):
        assert relative_error(gradient, expected) < 1e-6


def test_a_budget_that_was_halved_is_kept() -> None:
    policy = make_policy(budget=60)
    state = policy.state_dict()
    assert state["halved_budget"] is None
    policy.load_state_dict(state | {"halved_budget": 16})
    assert (policy.tokens_per_microbatch, policy.was_halved) == (16, True)
    smaller = make_policy(budget=10)
    smaller.load_state_dict(state | {"halved_budget": 16})
    assert smaller.tokens_per_microbatch == 10, "the run's own is smaller"
