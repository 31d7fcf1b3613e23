"""The carriers that travel from dataset row to loss; every other module passes these along.

    Prompt -> Completion, Group -> PackedBatch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Message = dict[str, Any]


@dataclass
class Prompt:
    """One dataset row, ready to be sampled from."""

    ids: list[int]
    """Token ids, chat template applied."""
    raw: str | list[Message]
    """The dataset's own prompt: a string, or chat messages."""
    row: dict[str, Any]
    """All columns of the dataset row; verifiers take their parameters from here."""
    index: int
    """Row number in the dataset."""


@dataclass
class Completion:
    """One sampled answer to a prompt."""

    ids: list[int]
    """Sampled token ids, the stop token included when there is one."""
    truncated: bool
    """True when the length limit ended it, not a stop token."""
    text: str = ""
    """Decoded without special tokens."""
    rollout_logprobs: list[float] | None = None
    """The engine's log-prob of each id, in nats, under the distribution that it sampled from."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Score by reward name; NaN where a reward does not apply."""
    reward: float = float("nan")
    """Weighted sum of the scores that are not NaN; NaN when there is none."""
    advantage: float = 0.0
    """What the loss multiplies this completion's tokens by."""


@dataclass
class Group:
    """A prompt and the completions sampled for it: the unit that rewards are compared within."""

    prompt: Prompt
    completions: list[Completion]


@dataclass(frozen=True)
class Sample:
    """One completion as a verifier sees it."""

    prompt: str | list[Message]
    """The dataset's own prompt."""
    completion: str | list[Message]
    """The text, or ``[{"role": "assistant", "content": text}]`` for a chat prompt (TRL's form)."""
    text: str
    """The completion as text, whatever the prompt's form."""
    completion_ids: list[int]
    """Sampled token ids."""
    row: dict[str, Any]
    """All columns of the dataset row."""
