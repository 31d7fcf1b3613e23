"""Made-up tokens, on which an objective is tried before a run: what it needs, and whether a function of the user's fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_hf.algorithm.advantages import credited
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

LOSS_FORM = "a loss is def loss(batch: TokenBatch, *, epsilon=0.2) -> (losses [token], metrics {name: values [token]})"
CREDIT_FORM = (
    "credit is def credit(scores [prompts group objective], weights [objective], *, lengths) -> advantages [prompts group], "
    "where it may leave out lengths [prompts group]"
)
OWN_METRICS = ("loss", "reward", "entropy", "kl", "teacher_kl", "policy_loss", "entropy_coef")
"""What the run logs itself, which a metric of that name would be mixed into, and which guards look at."""
TRIAL_SCALES = (1.0, 0.2, 6.0)
"""Of what is tried: with the last, ratios up to e^10 and entropies up to 13 nats, more than a vocabulary of 400,000 has."""
TRIAL_DENOMINATORS = Denominators(10, 4, 10, num_processes=1, max_completion_length=4, update_tokens=10)


def trial_batch(scale: float = 1.0) -> TokenBatch:
    """Ten tokens of four completions: ratios on both sides of 1, inside and outside the usual clips, under advantages of
    both signs; engine weights that cancel over the second completion and over no other. ``scale`` times the entropies, the
    log-probs and their differences."""
    logprobs = scale * torch.tensor([-0.7, -1.1, -2.3, -0.4, -1.6, -0.9, -0.2, -3.1, -1.3, -0.6])
    entropy = scale * torch.tensor([1.1, 0.8, 1.9, 0.3, 1.2, 0.7, 0.4, 2.2, 1.5, 0.9])
    constant, logprobs, entropy = logprobs, logprobs.clone().requires_grad_(), entropy.requires_grad_()
    return TokenBatch(
        logprobs=logprobs,
        entropy=entropy,
        advantages=torch.tensor([1.3, -0.9, -0.9, 0.6, 0.6, 0.6, -1.4, -1.4, -1.4, -1.4]),
        old_logprobs=constant - scale * torch.tensor([-0.5, 0.6, 0.3, 0.5, -1.2, -0.1, 0.1, -0.9, 1.7, 0.05]),
        completion=torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
        lengths=torch.tensor([1, 2, 3, 4]),
        rollout_logprobs=constant - scale * torch.tensor([-0.3, 1.3, -0.4, 0.3, -1.1, -0.2, 0.2, -0.7, 1.1, 0.1]),
        ref_logprobs=constant + scale * torch.tensor([0.2, -0.6, 0.9, -0.1, 0.4, 0.3, -1.2, 0.7, 0.5, -0.8]),
        teacher_logprobs=constant + scale * torch.tensor([0.3, 0.1, -0.5, 0.6, -0.2, 0.8, 0.1, -0.4, 0.9, -0.3]),
    )


def one_token_each(batch: TokenBatch) -> TokenBatch:
    """The same tokens, each apart from the others of its completion, whose length it keeps."""
    return replace(batch, completion=torch.arange(len(batch.completion)), lengths=batch.lengths[batch.completion])


def gradient_of(objective: Callable[..., tuple[Tensor, Any]], batch: TokenBatch) -> Float[Tensor, "two token"]:
    """d loss / d log π_θ, and d loss / d entropy below it."""
    loss, _ = objective(batch, TRIAL_DENOMINATORS)
    return torch.stack(torch.autograd.grad(loss, [batch.logprobs, batch.entropy], materialize_grads=True))


def options_of(function: Callable[..., Any], settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The keyword-only parameters of a loss or credit that settings have the name of, with their values.

    Raises:
        ValueError: it has an option that is neither a setting nor has a default.
    """
    parameters = inspect.signature(function).parameters.values()
    options = [item for item in parameters if item.kind is item.KEYWORD_ONLY]
    unknown = [item.name for item in options if item.name not in settings and item.default is item.empty]
    if unknown:
        raise ValueError(f"{what}: its option {unknown[0]!r} is no setting; give it a default")
    return {item.name: settings[item.name] for item in options if item.name in settings}


def check_arguments(function: Callable[..., Any], count: int, wanted: str) -> None:
    """Raises ValueError for a function that does not take just so many arguments by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(function)
    positional = [item for item in signature.parameters.values() if item.kind in kinds]
    needed = [item for item in positional if item.default is item.empty]
    if not len(needed) <= count <= len(positional):
        raise ValueError(f"{wanted}; {signature} takes {len(needed) or len(positional)} arguments by position")


def check_loss(loss: Callable[..., Any], batch: TokenBatch, what: str) -> None:
    """Raises ValueError for a loss that makes something else of a batch than losses [token] with a gradient, and metrics."""
    result = loss(batch)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise ValueError(f"{what}: {LOSS_FORM}, and it returned {_described(result)}")
    losses, metrics = result
    for name in OWN_METRICS:
        if name in metrics:
            raise ValueError(f"{what}: its metric {name!r} is one that every run logs itself; give it another name")
    for name, values in {"losses": losses, **metrics}.items():
        if not isinstance(values, Tensor) or values.shape != batch.logprobs.shape:
            raise ValueError(f"{what}: for {len(batch.logprobs)} tokens its {name} are {_described(values)}; {LOSS_FORM}")
    if not losses.requires_grad:
        raise ValueError(f"{what}: its losses have no gradient; make them of batch.logprobs, log_ratio or entropy")


def check_credit(credit: Callable[..., Any], num_objectives: int, group: int, what: str) -> None:
    """Raises ValueError for credit that makes something else of scores than advantages [prompts group]."""
    scores = torch.rand(group + 1, group, num_objectives, generator=torch.Generator().manual_seed(0))
    advantages = credited(credit, scores, torch.ones(num_objectives), torch.ones(scores.shape[:2]))
    if not isinstance(advantages, Tensor) or advantages.shape != scores.shape[:2]:
        raise ValueError(f"{what}: of scores {list(scores.shape)} it made {_described(advantages)}; {CREDIT_FORM}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
