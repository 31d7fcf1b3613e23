"""The lecture's training loop on ``grpo_hf.algorithm``: the functions that the language-model trainer calls."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.logits import entropy
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import Objective, grpo_objective
from grpo_hf.reward_fns.sorting import distance, inclusion_ordering
from grpo_hf.toy.model import SortingModel, response_logprobs, sample, side_by_side
from grpo_hf.types import TokenBatch

REWARDS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "inclusion_ordering": inclusion_ordering,
    "distance": distance,
}
LECTURE_PROMPTS = ((1, 0, 2), (3, 2, 4), (1, 2, 3))
FLATTEN = "seed prompts group pos -> (seed prompts group pos)"
"""All tokens of an epoch in one row, as in the language-model trainer."""


@dataclass(frozen=True)
class ToySettings:
    """One experiment; the defaults are the lecture's first."""

    reward: str = "inclusion_ordering"
    """A name of REWARDS."""
    advantage: str = "raw"
    """A name of ADVANTAGES: the lecture's delta."""
    loss: str = "reinforce"
    """A name of LOSSES: "reinforce", "unclipped" and "dapo" are the lecture's naive, unclipped and clipped losses."""
    loss_options: Mapping[str, float] = field(default_factory=dict)
    """Keyword options of the loss, such as epsilon."""
    level: str = "token"
    """A name of LEVELS."""
    aggregation: str = "token_mean"
    """A name of AGGREGATIONS; the lecture takes the mean over all tokens."""
    kl: str = "k3"
    """A name of KL_ESTIMATORS."""
    beta: float = 0.0
    """Weight of the KL to the reference. The lecture sums it over an answer's positions where this takes their mean."""
    reference_period: int = 10
    """Epochs between copies of the policy into the reference."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy that is added to the objective."""
    temperature: float = 1.0
    """Divides the logits where answers are sampled and where they are scored."""
    learning_rate: float = 1e-3
    """Of Adam."""
    num_epochs: int = 100
    """Times that new answers are sampled."""
    num_steps: int = 10
    """Updates on each epoch's answers."""
    num_responses: int = 10
    """Answers to each prompt in an epoch."""
    prompts: tuple[tuple[int, ...], ...] = LECTURE_PROMPTS
    """Number lists of one length; the model is to write each in order."""
    embedding_dim: int = 10
    """Width of the model."""


@dataclass
class ToyResult:
    """What a run left, for every seed."""

    rewards: Float[Tensor, "epoch seed"]
    """Mean reward of the sampled answers."""
    num_sorted: Int[Tensor, "epoch seed"]
    """Prompts that the greedy policy sorts exactly, before each epoch's updates; the last row is after training."""
    greedy: Int[Tensor, "seed prompts pos"]
    """The trained policy's greedy answers."""
    lecture_reward: Float[Tensor, " seed"]
    """Mean inclusion and ordering reward of the greedy answers, whatever reward was trained on."""
    samples_per_prompt: int
    """Answers sampled to each prompt in the whole run."""
    seconds: float
    """Wall time of all seeds together."""


def train(settings: ToySettings, seeds: Sequence[int] = (0,)) -> ToyResult:
    """Train one model per seed, side by side; a seed's numbers do not depend on which others run beside it."""
    start = time.perf_counter()
    prompts = torch.tensor(settings.prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    model = side_by_side([new_model(settings, generator) for generator in generators])
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    objective, denominators = make_objective(settings), denominators_of_a_seed(settings)
    group, temperature = settings.num_responses, settings.temperature
    rewards_by_epoch, sorted_by_epoch, ref_logprobs = [], [], None

    for epoch in range(settings.num_epochs):
        if settings.beta and epoch % settings.reference_period == 0:
            reference = copy.deepcopy(model).requires_grad_(False)

        # Sample: one group of responses a prompt, with its log-probs under the policy that drew it.
        with torch.no_grad():
            logits = model(prompts)
            draws = zip(logits, generators, strict=True)
            responses = torch.stack([sample(rows, group, temperature, g) for rows, g in draws])
            old_logprobs = rearrange(response_logprobs(logits, responses, temperature), FLATTEN)
            if settings.beta:
                ref_logprobs = rearrange(response_logprobs(reference(prompts), responses, temperature), FLATTEN)

        # Score, and compare within groups; a seed is a batch of its own, should the batch's statistics matter.
        rewards = score(settings.reward, settings.prompts, responses)
        scores, one = rearrange(rewards, "seed prompts group -> seed prompts group 1"), torch.ones(1)
        advantages = torch.stack([ADVANTAGES[settings.advantage](of_seed, one) for of_seed in scores])
        advantages = repeat(advantages, "seed prompts group -> (seed prompts group pos)", pos=responses.shape[-1])
        rewards_by_epoch.append(rewards.mean((1, 2)))
        sorted_by_epoch.append(count_sorted(settings.prompts, logits))

        # Learn: the first step is on-policy, the others move away from the policy that drew the responses.
        completion = repeat(torch.arange(rewards.numel()), "completion -> (completion pos)", pos=responses.shape[-1])
        for _ in range(settings.num_steps):
            logits = model(prompts)
            of_position = entropy(logits, temperature)
            batch = TokenBatch(
                logprobs=rearrange(response_logprobs(logits, responses, temperature), FLATTEN),
                entropy=repeat(of_position, "seed prompts pos -> (seed prompts group pos)", group=group),
                advantages=advantages,
                old_logprobs=old_logprobs,
                completion=completion,
                lengths=completion.bincount(),
                ref_logprobs=ref_logprobs,
            )
            loss, _ = objective(batch, denominators)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        logits = model(prompts)
    greedy = logits.argmax(-1)
    lecture_rewards = score("inclusion_ordering", settings.prompts, greedy.unsqueeze(2))
    return ToyResult(
        rewards=torch.stack(rewards_by_epoch),
        num_sorted=torch.stack([*sorted_by_epoch, count_sorted(settings.prompts, logits)]),
        greedy=greedy,
        lecture_reward=lecture_rewards.mean((1, 2)),
        samples_per_prompt=settings.num_epochs * settings.num_responses,
        seconds=time.perf_counter() - start,
    )


def new_model(settings: ToySettings, generator: torch.Generator) -> SortingModel:
    """The lecture's sizes: as many numbers as the prompts need, answers as long as prompts."""
    length = len(settings.prompts[0])
    return SortingModel(
        vocab_size=max(max(prompt) for prompt in settings.prompts) + 1,
        embedding_dim=settings.embedding_dim,
        prompt_length=length,
        response_length=length,
        generator=generator,
    )


def make_objective(settings: ToySettings) -> Objective:
    """The loss of a run."""
    loss, _ = LOSSES[settings.loss]
    return grpo_objective(
        partial(loss, **settings.loss_options),
        settings.aggregation,
        level=settings.level,
        beta=settings.beta,
        kl_estimator=settings.kl,
        kl_bias_correction=False,
        entropy_coef=settings.entropy_bonus,
    )


def denominators_of_a_seed(settings: ToySettings) -> Denominators:
    """The counts of one seed: the sum over seeds is then a sum of whole losses."""
    length, sequences = len(settings.prompts[0]), len(settings.prompts) * settings.num_responses
    tokens = sequences * length
    return Denominators(tokens, sequences, tokens, num_processes=1, max_completion_length=length, update_tokens=tokens)


def score(
    reward: str, prompts: Sequence[Sequence[int]], responses: Int[Tensor, "seed prompts group pos"]
) -> Float[Tensor, "seed prompts group"]:
    """The reward of every response to its prompt."""
    reward_fn = REWARDS[reward]
    return torch.tensor(
        [
            [[reward_fn(prompt, response) for response in group] for prompt, group in zip(prompts, of_seed, strict=True)]
            for of_seed in responses.tolist()
        ]
    )


def count_sorted(prompts: Sequence[Sequence[int]], logits: Float[Tensor, "seed prompts pos vocab"]) -> Int[Tensor, " seed"]:
    """Prompts whose greedy answer is the sorted prompt."""
    expected = torch.tensor([sorted(prompt) for prompt in prompts])
    return (logits.argmax(-1) == expected).all(-1).sum(-1)
