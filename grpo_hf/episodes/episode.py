"""An episode: turns of the model and what tools say to them, as a generator that asks and is answered.

It yields an `Ask` and is sent the completion, or a future and is sent its result; it returns the whole as one Completion.
So it knows of no engine, no other episode and no waiting.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from grpo_hf.episodes.chat import Chat
from grpo_hf.episodes.toolbox import Session, Toolbox
from grpo_hf.rollout.prompts import derived_seed
from grpo_hf.types import Branch, Completion, Message, Prompt, ToolCall, Turn

POLICIES = ("tell", "drop", "stop")
"""tell: the model is told what went wrong, and goes on. drop: the episode ends, and is left out of its group and of the
loss. stop: the run ends. An episode whose environment is lost is dropped in any case."""


class ToolFailedError(RuntimeError):
    """A call has ended as tool_policy does not accept."""

    def __init__(self, calls: Sequence[ToolCall], policy: Mapping[str, str]):
        call = next(call for call in calls if policy.get(call.outcome) == "stop")
        super().__init__(
            f"the tool {call.name!r} has ended in {call.outcome}, at which tool_policy stops the run: {call.message}"
        )


@dataclass(frozen=True)
class Ask:
    """A turn that the model shall take."""

    ids: list[int]
    """Everything so far."""
    seed: int
    """Of its sampling."""
    max_tokens: int
    """That it may have."""


Episode: TypeAlias = Generator["Ask | Future[Any]", Any, Completion]


@dataclass(frozen=True)
class Rules:
    """What bounds an episode, and what becomes of it when a call goes wrong."""

    max_completion_length: int
    """Tokens after the prompt at most, those of tools included."""
    max_model_length: int
    """Tokens at most with the prompt."""
    max_tool_calling_iterations: int | None = None
    """Turns whose calls are run; None: no limit."""
    policy: Mapping[str, str] = field(default_factory=dict)
    """What becomes of a call that ends in error, timeout or crash: one of POLICIES; "tell" where it says nothing."""
    keeps_environments: bool = False
    """Whether verifiers are to see the environment as the episode has left it."""


@dataclass
class History:
    """The token ids of an episode, appended to, and begun anew where the template shows what was said otherwise."""

    ids: list[int]
    """All of them."""
    opening: int
    """How many are the prompt's."""
    is_sampled: list[bool]
    """Which of them the model sampled in this history."""
    logprobs: list[float | None] = field(default_factory=list)
    """Of these."""
    earlier: list[Branch] = field(default_factory=list)
    """Histories before this one."""
    has_logprobs: bool = True
    """False where the engine gave none."""

    @property
    def length(self) -> int:
        """Tokens after the prompt."""
        return len(self.ids) - self.opening

    def sampled(self, turn: Completion) -> None:
        """The model's own ids, as they are."""
        self.ids = [*self.ids, *turn.ids]
        self.is_sampled += [True] * len(turn.ids)
        self.logprobs += turn.rollout_logprobs or [None] * len(turn.ids)
        self.has_logprobs = self.has_logprobs and turn.rollout_logprobs is not None

    def go_on(self, ids: list[int], rewritten: bool) -> None:
        """What the next turn is sampled from: these ids and more, or, where history was rewritten, others."""
        if rewritten:
            self.earlier.append(self._branch())
            self.is_sampled, self.logprobs = [], []
        self.ids, self.is_sampled = ids, self.is_sampled + [False] * (len(ids) - len(self.is_sampled))

    def _branch(self) -> Branch:
        return Branch(self.ids, self.is_sampled, self.logprobs if self.has_logprobs else None)

    def completion(self, **fields: Any) -> Completion:
        """The whole, as it is trained on."""
        last = self._branch()
        return Completion(
            ids=last.ids[self.opening :],
            prompt_ids=last.ids[: self.opening],
            is_sampled=last.is_sampled[self.opening :],
            rollout_logprobs=last.rollout_logprobs,
            earlier=self.earlier,
            **fields,
        )


def play(prompt: Prompt, seed: int, *, chat: Chat, toolbox: Toolbox, rules: Rules) -> Episode:
    """One episode of a chat prompt: the model answers, what it calls is run, the results are shown to it, until it calls
    nothing, a limit is reached or a call ends it. The first turn has ``seed``, as a completion without tools would."""
    session = toolbox.open(prompt.row, derived_seed(seed, "environment"))
    try:
        return (yield from _play(prompt, seed, session, chat, toolbox.schemas(prompt.row), rules))
    finally:
        session.close()


def _play(prompt: Prompt, seed: int, session: Session, chat: Chat, schemas: list[dict[str, Any]], rules: Rules) -> Episode:
    turns: list[Turn] = []
    said: list[Message] = []
    start: ToolCall = yield session.observation
    if start.outcome != "ok":
        return Completion([], truncated=False, messages=[], reset=start, valid=False)
    asked = observed(prompt.raw, start.content)
    ids = chat.opening(asked, schemas)
    history = History(ids, len(ids), [False] * len(ids))
    room = min(rules.max_completion_length, rules.max_model_length - len(ids))
    if room < 1:
        start.outcome = "error"
        start.message = (
            f"with the observation the prompt is {len(ids)} tokens long; the context has {rules.max_model_length}"
        )
        return Completion([], truncated=True, messages=[], reset=start, valid=False)
    policies: set[str] = set()
    while True:
        began = time.perf_counter()
        turn_seed = derived_seed(seed, "turn", len(turns)) if turns else seed
        context = history.ids
        answer: Completion = yield Ask(context, turn_seed, room - history.length)
        history.sampled(answer)
        message, calls = chat.read(answer.ids, schemas, context)
        said.append(message)
        turns.append(turn := Turn(len(answer.ids), answer.truncated, seconds=time.perf_counter() - began))
        truncated = answer.truncated
        if answer.truncated or not calls:
            break
        if rules.max_tool_calling_iterations is not None and len(turns) > rules.max_tool_calling_iterations:
            turn.calls = calls
            break
        running = [session.call(call, derived_seed(turn_seed, "call", place)) for place, call in enumerate(calls)]
        for future in running:
            turn.calls.append((yield future))
        policies |= {rules.policy.get(call.outcome, "tell") for call in turn.calls}
        if "stop" in policies:
            raise ToolFailedError(turn.calls, rules.policy)
        if session.lost or "drop" in policies:
            break
        results = [{"role": "tool", "name": call.name, "content": call.content} for call in turn.calls]
        following, rewritten = chat.follow(history.ids, [*asked, *said], results, schemas)
        if len(following) - history.opening >= room:  # undone: no token could follow on it
            truncated = True
            break
        said += results
        history.go_on(following, rewritten)
    ending = yield session.finish(rules.keeps_environments)
    text = chat.tokenizer.decode(answer.ids, skip_special_tokens=True)
    return history.completion(
        truncated=truncated,
        text=text,
        prompt_messages=asked,
        messages=said,
        turns=turns,
        reset=start if ending else None,
        environment=ending,
        valid=not (session.lost or "drop" in policies),
    )


def observed(prompt: Any, observation: str | Sequence[Any]) -> list[Message]:
    """The messages, what the environment said at its reset joined to the last one's content (TRL's)."""
    if not observation:
        return list(prompt)
    *before, last = prompt
    content = last["content"]
    if isinstance(observation, str) != isinstance(content, str):
        observation, content = (
            [{"type": "text", "text": part}] if isinstance(part, str) else part for part in (observation, content)
        )
    return [*before, {**last, "content": content + observation}]
