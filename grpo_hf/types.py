"""The carriers that travel from dataset row to loss; every other module passes these along.

Prompt -> Completion, Group -> TrainingSample -> PackedBatch -> TokenBatch

Importing this loads no torch: verifiers and their workers need the first carriers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
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


CALL_FAILURES = ("error", "timeout", "crash")
"""How a tool's call can end but for ok: it raised or was asked for wrongly, ran past its deadline, or its process died."""


@dataclass
class ToolCall:
    """A function that the model asked for, and what became of it."""

    name: str
    """Of the function."""
    arguments: dict[str, Any]
    """By the names of its parameters."""
    outcome: str = ""
    """How it ended: ok, or one of CALL_FAILURES; "" where it was not run."""
    content: str = ""
    """What the model was told."""
    seconds: float = 0.0
    """From its start to its end."""
    message: str = ""
    """What went wrong, with the traceback where there is one."""


@dataclass
class Turn:
    """One answer of the model within an episode."""

    num_tokens: int
    """That it sampled."""
    truncated: bool
    """True when a length limit ended it, not a stop token."""
    calls: list[ToolCall] = field(default_factory=list)
    """What it asked for, in order."""
    seconds: float = 0.0
    """From the request for it to its end."""


@dataclass
class Branch:
    """A history that the chat template has shown otherwise since; what was sampled in it is trained on in it."""

    ids: list[int]
    """The whole sequence, the prompt included."""
    is_sampled: list[bool]
    """Which of them the model sampled in it."""
    rollout_logprobs: list[float | None] | None
    """The engine's log-prob of each of these, in nats."""


@dataclass
class Completion:
    """One sampled answer to a prompt, or a whole episode: answers and what tools said to them."""

    ids: list[int]
    """What follows on the prompt: sampled token ids, the stop token included when there is one, and in an episode the ids
    of what tools answered, as its last turn has seen them."""
    truncated: bool
    """True when the length limit ended it, not a stop token."""
    text: str = ""
    """Decoded without special tokens; of an episode the last answer."""
    rollout_logprobs: list[float | None] | None = None
    """The engine's log-prob of each id that the model sampled (``is_sampled``), in nats, from what it sampled from; None
    where it has none."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Score by reward name; NaN where a reward does not apply or its outcome leaves the completion out."""
    outcomes: dict[str, str] = field(default_factory=dict)
    """How the verifier's call ended, by reward name: one of grpo_hf.rewards.outcomes.OUTCOMES."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What verifiers have logged beside it with log_extra, by column."""
    valid: bool = True
    """False where the outcome of a verifier's call leaves it out of its group and of the loss."""
    reward: float = float("nan")
    """Weighted sum of the scores that are not NaN; NaN when there is none, which leaves it out of its group and the loss."""
    advantage: float | None = None
    """What the loss multiplies this completion's tokens by; None until its group has been compared."""
    is_sampled: list[bool] | None = None
    """Which of ``ids`` the model sampled, where some are what tools answered; None: all."""
    prompt_ids: list[int] | None = None
    """The prompt's ids where they are its own, since an environment has said something to it; None: the group's."""
    prompt_messages: list[Message] | None = None
    """The same as messages; None: the group's."""
    earlier: list[Branch] = field(default_factory=list)
    """Histories that were rewritten between two turns; none of their sampled ids is among ``ids`` as sampled."""
    messages: list[Message] | None = None
    """What was said after the prompt, tools' answers included; None without tools."""
    turns: list[Turn] = field(default_factory=list)
    """The model's answers one by one; none without tools."""
    reset: ToolCall | None = None
    """How its environment began; None without one."""
    environment: Any = None
    """How its environment ended, a grpo_hf.episodes Finished; None without one."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What a rollout function said of it beside its ids; verifiers take it as they take the row's columns."""


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
    """The text; for a chat prompt ``[{"role": "assistant", "content": text}]``, of an episode all messages (TRL's form)."""
    text: str
    """The completion as text, whatever the prompt's form; of an episode the last answer."""
    completion_ids: list[int]
    """Token ids after the prompt."""
    row: dict[str, Any]
    """All columns of the dataset row."""
    environment: Any = None
    """How the episode's environment ended, and what it says of its reward; None without one."""


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One sequence of tokens that is trained on: no text, no dataset row.

    A completion is one sample as a rule, and several where its history was rewritten between turns: they share a beginning,
    and each sampled token is a target in one of them.
    """

    ids: tuple[int, ...]
    """The whole sequence: prompt, what the model wrote, what tools answered."""
    is_target: Bool[Tensor, " time"]
    """Which of them the model chose and are trained on; never the first, which nothing predicts."""
    advantages: Float[Tensor, " time"]
    """What the loss multiplies a target by; 0 where there is none."""
    completion: int
    """The completion that it is of, by its number in the rollout, over all processes."""
    group: int
    """The group that the completion is of, likewise."""
    completion_length: int
    """Targets of the whole completion, in all its samples."""
    versions: Int[Tensor, " target"]
    """Updates that had been finished when the weights were taken that chose each target."""
    rollout_logprobs: Float[Tensor, " target"] | None = None
    """The engine's log-prob of each target, in nats; NaN where it gave none, None where it gave none at all."""
    old_logprobs: Float[Tensor, " target"] | None = None
    """The trainer's before the rollout's first update; None in that update, which takes its own."""
    ref_logprobs: Float[Tensor, " target"] | None = None
    """The reference model's; None without a KL term."""
    teacher_logprobs: Float[Tensor, " target"] | None = None
    """The teacher's; None without one."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The targets of one micro-batch as a loss sees them, in nats where they are log-probs.

    One entry for each time that a token is trained on: two completions that begin alike have an entry each.
    """

    logprobs: Float[Tensor, " token"]
    """log π_θ; carries the gradient."""
    entropy: Float[Tensor, " token"]
    """The entropy of π_θ where the token was chosen; carries the gradient."""
    advantages: Float[Tensor, " token"]
    """A constant."""
    old_logprobs: Float[Tensor, " token"]
    """log π_old, of the weights that sampled; a constant, equal to ``logprobs`` on a rollout's first update."""
    completion: Int[Tensor, " token"]
    """The completion that each token belongs to, counted from 0 in this batch, which holds all of a completion's tokens
    wherever something is summed over it."""
    lengths: Int[Tensor, " completion"]
    """Targets of each completion, those without gradient that are not in the batch too."""
    rollout_logprobs: Float[Tensor, " token"] | None = None
    """log μ, the engine's; NaN where it gave none; a constant."""
    ref_logprobs: Float[Tensor, " token"] | None = None
    """log π_ref; a constant."""
    teacher_logprobs: Float[Tensor, " token"] | None = None
    """log π_teacher; a constant."""
    selected: dict[str, Float[Tensor, " token"]] = field(default_factory=dict)
    """What each selection of the objective has said of the tokens when it saw all of the update's; constants."""
    log_ratio: Float[Tensor, " token"] | None = None
    """log(π_θ / π_old) by token, or by completion, repeated over its tokens; carries the gradient; set by the objective."""
    ratio_of_completions: bool = False
    """Which of the two ``log_ratio`` is; set by the objective."""


def moved_to(carrier: Any, device: torch.device, non_blocking: bool = True) -> Any:
    """The same carrier with every tensor on ``device``, those of the carriers in it too."""
    values = {item.name: getattr(carrier, item.name) for item in fields(carrier)}
    return replace(carrier, **{k: v.to(device, non_blocking=non_blocking) for k, v in values.items() if hasattr(v, "to")})


@dataclass
class Node:
    """A run of tokens that the sequences below it have in common."""

    span: range
    """Where it lies in the row."""
    parent: int
    """The number of the node that it follows on; -1 where it begins sequences."""
    end: int
    """Where its subtree ends in the row: everything from the span's end to here follows on it."""


@dataclass
class TokenTree:
    """A row that holds each token of many sequences once, laid out depth first.

    The token at k is seen by the one at q if and only if k <= q < reach[k].
    """

    nodes: list[Node]
    """Depth first, as they lie in the row."""
    reach: Int[Tensor, " time"]
    """Where the subtree of each token ends."""
    depth: Int[Tensor, " time"]
    """How many tokens come before each in its sequences: its position."""
    longest: int
    """Tokens of the longest sequence."""
    block_masks: dict[int | None, Any] = field(default_factory=dict)
    """FlexAttention's masks by sliding window, made on first use and shared by the layers."""

    to = moved_to


@dataclass
class PackedBatch:
    """One micro-batch, laid out for one forward pass: a token tree (rows = 1) or padded rows.

    What comes after a sample's last target is never an input, and neither is that target: they predict nothing.
    """

    input_ids: Int[Tensor, "rows time"]
    """The tokens."""
    position_ids: Int[Tensor, "rows time"]
    """Each token's place in its own sequence."""
    attention_mask: Int[Tensor, "rows time"] | None
    """1 on real tokens; None for a tree, which has no others."""
    tree: TokenTree | None
    """The row's structure; None for padded rows."""
    scored_at: Int[Tensor, " scored"]
    """Positions in the flattened rows whose hidden states predict targets, each once."""
    scored: Int[Tensor, " token"]
    """For each target, the number in ``scored_at`` of the position that predicts it."""
    targets: Int[Tensor, " token"]
    """The samples' targets, one sample after the other."""
    advantages: Float[Tensor, " token"]
    """Of each target."""
    completion: Int[Tensor, " token"]
    """The completion that each target is of, counted from 0 in this batch."""
    lengths: Int[Tensor, " completion"]
    """Targets of each completion, in and outside this batch."""
    samples: list[int]
    """Which of the packed samples are here, in the order of their targets."""
    num_targets: list[int]
    """How many targets each of them has."""
    shared_by: Int[Tensor, " position"]
    """Of each position of the flattened rows, how many of the samples have it; 0 of padding."""
    rollout_logprobs: Float[Tensor, " token"] | None = None
    """See TrainingSample."""
    old_logprobs: Float[Tensor, " token"] | None = None
    """See TrainingSample."""
    ref_logprobs: Float[Tensor, " token"] | None = None
    """See TrainingSample."""
    teacher_logprobs: Float[Tensor, " token"] | None = None
    """See TrainingSample."""
    weight: float = 1.0
    """Factor on this micro-batch's loss: 0 on one that only gives a process something to run, else 1."""

    @property
    def num_tokens(self) -> int:
        """Token positions that a forward pass computes."""
        return self.input_ids.numel()

    to = moved_to

    def tokens(self, logprobs: Float[Tensor, " token"], entropy: Float[Tensor, " token"]) -> TokenBatch:
        """What the objective sees, given a forward pass's log-probs and entropy of the targets; where the samples are of
        the current weights, π_old is π_θ held constant."""
        return TokenBatch(
            logprobs=logprobs,
            entropy=entropy,
            advantages=self.advantages,
            old_logprobs=logprobs.detach() if self.old_logprobs is None else self.old_logprobs,
            completion=self.completion,
            lengths=self.lengths,
            rollout_logprobs=self.rollout_logprobs,
            ref_logprobs=self.ref_logprobs,
            teacher_logprobs=self.teacher_logprobs,
        )

    def by_sample(self, values: Float[Tensor, " token"]) -> dict[int, Tensor]:
        """A value a target -> those of each packed sample, by its number."""
        return dict(zip(self.samples, values.split(self.num_targets), strict=True))
