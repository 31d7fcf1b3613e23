"""The lecture's experiments as tables of settings, what solves its task, and its two small examples."""

from __future__ import annotations

from dataclasses import replace

import torch

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.losses import LEVELS
from grpo_hf.toy.train import ToySettings
from grpo_hf.types import TokenBatch

Table = dict[str, ToySettings]

LECTURE: dict[str, Table] = {
    "the four deltas (naive loss)": {
        "raw rewards": ToySettings(advantage="raw"),
        "centered": ToySettings(advantage="centered"),
        "normalized": ToySettings(advantage="group"),
        "max only": ToySettings(advantage="max_only"),
    },
    "the loss (centered; naive is above)": {
        "unclipped ratio": ToySettings(advantage="centered", loss="unclipped"),
        "clipped ratio, epsilon 0.1": ToySettings(advantage="centered", loss="dapo", loss_options={"epsilon": 0.1}),
    },
    "KL to a reference copied every 10 epochs (centered, naive)": {
        "KL, beta 0.1": ToySettings(advantage="centered", beta=0.1),
        "KL, beta 1": ToySettings(advantage="centered", beta=1.0),
    },
}
"""By heading, then by row. Ratios are exp(log π - log π_old), where the lecture's code divides the log-probs."""

SOLVING = ToySettings(
    reward="distance",
    advantage="group",
    loss="dapo",
    loss_options={"epsilon": 0.1},
    temperature=30.0,
    learning_rate=1e-2,
    num_steps=4,
)
"""Sorts all three prompts, in no more samples than the lecture's experiments.

At the start the lecture's policy is all but certain of its wrong answers: its logits have a standard deviation of about
5. A temperature of 30 lets every group explore; the distance reward gives no point for what must be unlearned later.
"""

BACK_TO_THE_LECTURE: Table = {
    "solving setting": SOLVING,
    "but temperature 1": replace(SOLVING, temperature=1.0),
    "but inclusion + ordering reward": replace(SOLVING, reward="inclusion_ordering"),
    "but raw rewards as advantages": replace(SOLVING, advantage="raw"),
    "but naive loss": replace(SOLVING, loss="reinforce", loss_options={}),
    "but learning rate 0.001": replace(SOLVING, learning_rate=1e-3),
    "temperature 1, entropy bonus 0.3": replace(SOLVING, temperature=1.0, entropy_bonus=0.3),
}
"""The solving setting, then one ingredient at a time as the lecture has it; last, another way to explore."""

EXAMPLE_REWARDS = ((11.0, 9.0), (0.0, 2.0))
"""The lecture's two states with two actions each."""


def frozen_ratio_gradients(weight: float = 2.0) -> tuple[float, float]:
    """d/dw of the ratio π_w / π_old at π_w = π_old = σ(w): with π_old left to depend on w, and with it held constant.

    The first is 0: numerator and denominator move together. The second is d/dw log σ(w) = 1 - σ(w).
    """
    w = torch.tensor(weight, requires_grad=True)
    logprobs = torch.nn.functional.logsigmoid(w).reshape(1)
    not_held = (logprobs - logprobs).exp().sum()
    one = torch.ones(1, dtype=torch.long)
    batch = TokenBatch(logprobs, torch.zeros(1), torch.ones(1), old_logprobs=logprobs, completion=0 * one, lengths=one)
    held = LEVELS["token"](batch).exp().sum()
    gradients = [torch.autograd.grad(ratio, w, retain_graph=True)[0].item() for ratio in (not_held, held)]
    return gradients[0], gradients[1]


def variance_example() -> tuple[float, float]:
    """Variance of what multiplies the gradient in the lecture's example: raw rewards 28.33, centered 1.33."""
    scores, one = torch.tensor(EXAMPLE_REWARDS).unsqueeze(-1), torch.ones(1)
    return ADVANTAGES["raw"](scores, one).var().item(), ADVANTAGES["centered"](scores, one).var().item()
