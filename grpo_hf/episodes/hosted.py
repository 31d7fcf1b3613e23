"""Environments of the package `verifiers`, played by their own rollout: it asks for turns, and the trainer's engine takes
them. Needs `pip install "verifiers>=0.2,<0.3"`.

An environment brings its data set, its episodes and its reward. They run in one thread of the trainer's process, on an event
loop; an episode is a coroutine there and, for the sampler, a generator like any other.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from grpo_hf.episodes.chat import Chat
from grpo_hf.episodes.episode import Ask, Episode, History, Rules
from grpo_hf.rewards.signature import Reward, describe
from grpo_hf.rollout.prompts import derived_seed
from grpo_hf.types import Completion, Message, Prompt, ToolCall, Turn

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "verifiers:"
SCORE, MEASURED = "environment_reward", "environment_metrics"
"""Columns of an episode: what the environment's rubric says of it, and what else it has measured."""
NEEDED = 'pip install "verifiers>=0.2,<0.3"'


@dataclass
class Wanted:
    """A turn that an environment asks for."""

    messages: list[Message]
    """The conversation so far, as the environment has it."""
    schemas: list[dict[str, Any]]
    """Of the tools that it shows."""
    reply: asyncio.Future[tuple[Message, list[ToolCall], Completion] | None]
    """What the model says; None where there is no room for it."""


@dataclass
class Ended:
    """How an environment's rollout has ended."""

    outcome: str
    """ok, error or timeout."""
    reward: float = float("nan")
    """Its rubric's."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else its rubric has measured."""
    message: str = ""
    """What went wrong."""


class HostedEnvironment:
    """An environment of the package by its name: data set, episodes and reward in one."""

    def __init__(self, name: str, options: dict[str, Any], *, timeout: float):
        try:
            import verifiers  # type: ignore[import-not-found]

            from grpo_hf.episodes.hosted_client import EngineClient
        except ImportError as error:
            raise ImportError(f"environments={PREFIX + name!r} needs a package that is not installed: {NEEDED}") from error
        self.name, self.options, self.timeout = name, options, timeout
        self.environment = verifiers.load_environment(name, **options)
        if self.environment.requires_group_rollouts:
            raise ValueError(f"{PREFIX}{name} scores a group's rollouts together, and here each is scored when it ends")
        self.client = EngineClient
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=f"{PREFIX}{name}", daemon=True).start()

    def dataset(self) -> Dataset:
        """Its rows to train on."""
        return self.environment.get_dataset()

    def held_out(self) -> Dataset | None:
        """Its rows to evaluate on; None where it has no others."""
        return None if self.environment.eval_dataset is None else self.environment.get_eval_dataset()

    @property
    def reward(self) -> Reward:
        """Its rubric's, under its name; what else it measures is logged beside it."""

        def judged(completion: str, environment_reward: float, environment_metrics: dict, log_metric: Any) -> float:
            for name, value in environment_metrics.items():
                log_metric(f"{self.name}/{name}", value)
            return environment_reward

        return replace(describe(self.name, judged), in_process=True)

    def play(self, prompt: Prompt, seed: int, *, chat: Chat, rules: Rules) -> Episode:
        """One episode of a row; the first turn has ``seed``."""
        turns: asyncio.Queue[Wanted | Ended] = asyncio.Queue()
        running = self._start(self._rollout(prompt, turns))
        try:
            return (yield from self._turns(seed, turns, chat, rules))
        finally:
            running.cancel()

    def _start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _rollout(self, prompt: Prompt, turns: asyncio.Queue[Wanted | Ended]) -> None:
        row = {name: value for name, value in prompt.row.items() if value is not None} | {"example_id": prompt.index}
        try:
            made = await self.environment.run_rollout(row, self.client(turns), "policy", {})
        except Exception as error:  # somebody else's code
            turns.put_nowait(Ended("error", message=repr(error)))
            return
        if (problem := made.get("error")) is not None:
            turns.put_nowait(Ended("error", message=str(problem)))
            return
        metrics = {name: float(value) for name, value in (made.get("metrics") or {}).items() if value is not None}
        turns.put_nowait(Ended("ok", float(made["reward"] or 0.0), metrics))

    async def _next(self, turns: asyncio.Queue[Wanted | Ended]) -> Wanted | Ended:
        try:
            return await asyncio.wait_for(turns.get(), self.timeout)
        except TimeoutError:
            return Ended("timeout", message=f"nothing for tool_timeout={self.timeout} s")

    def _turns(self, seed: int, asked: asyncio.Queue[Wanted | Ended], chat: Chat, rules: Rules) -> Episode:
        turns: list[Turn] = []
        ours: list[Message] = []
        theirs: list[Message] = []
        history: History | None = None
        opening, truncated, text = 0, False, ""
        while isinstance(wanted := (yield self._start(self._next(asked))), Wanted):
            goes_on = history is not None and _goes_on(theirs, wanted.messages)
            if history is not None and goes_on:
                new = [as_chat(message, wanted.messages) for message in wanted.messages[len(theirs) + 1 :]]
                ids, rewritten = chat.follow(history.ids, ours, new, wanted.schemas)
            else:
                new = [as_chat(message, wanted.messages) for message in wanted.messages]
                ids, rewritten = chat.opening(new, wanted.schemas), history is not None
            start = history.opening if history is not None and goes_on else len(ids)
            room = min(rules.max_completion_length - (len(ids) - start), rules.max_model_length - len(ids))
            if room < 1:
                truncated = True
                self._reply(wanted, None)
                continue
            if history is None:
                history, opening = History(ids, len(ids), [False] * len(ids)), len(new)
            else:
                history.go_on(ids, rewritten)
                history.opening = start
            ours, theirs = [*ours, *new] if goes_on else new, wanted.messages
            turn_seed = derived_seed(seed, "turn", len(turns)) if turns else seed
            answer: Completion = yield Ask(ids, turn_seed, room)
            history.sampled(answer)
            message, calls = chat.read(answer.ids, wanted.schemas, ids)
            ours = [*ours, message]
            text = str(chat.tokenizer.decode(answer.ids, skip_special_tokens=True))
            turns.append(Turn(len(answer.ids), answer.truncated, calls))
            truncated = answer.truncated
            self._reply(wanted, (message, calls, answer))
        ended: Ended = wanted
        about = ToolCall("rollout", {}, ended.outcome, message=ended.message)
        columns = {SCORE: ended.reward, MEASURED: ended.metrics}
        if history is None:
            about.outcome = "error" if ended.outcome == "ok" else ended.outcome
            return Completion([], truncated=truncated, messages=[], reset=about, valid=False, columns=columns)
        return history.completion(
            truncated=truncated,
            text=text,
            prompt_messages=ours[:opening],
            messages=ours[opening:],
            turns=turns,
            reset=about,
            valid=ended.outcome == "ok",
            columns=columns,
        )

    def _reply(self, wanted: Wanted, said: tuple[Message, list[ToolCall], Completion] | None) -> None:
        def give() -> None:
            if not wanted.reply.done():
                wanted.reply.set_result(said)

        self.loop.call_soon_threadsafe(give)

    def close(self) -> None:
        """End its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def load_hosted(spec: Any, *, timeout: float) -> HostedEnvironment | None:
    """`verifiers:NAME`, or {name: verifiers:NAME, OPTION: VALUE, ...}; None for None. Raises ValueError for others."""
    if spec is None:
        return None
    options = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = str(options.pop("name", None))
    if not name.startswith(PREFIX):
        raise ValueError(
            f"environments={spec!r} names no environment: write {PREFIX}NAME, of the package `verifiers`, or give a class "
            "of your own as environment_factory"
        )
    return HostedEnvironment(name.removeprefix(PREFIX), options, timeout=timeout)


def _goes_on(before: list[Message], now: list[Message]) -> bool:
    """Whether a conversation is the one before, the model's answer to it, and something new."""
    size = len(before)
    return now[:size] == before and len(now) > size + 1 and now[size]["role"] == "assistant"


def as_chat(message: Message, conversation: list[Message]) -> Message:
    """A message of the package's as chat templates show it."""
    made = {key: message[key] for key in ("role", "content", "reasoning_content") if message.get(key) is not None}
    if isinstance(content := made.get("content"), list):
        made["content"] = "".join(part.get("text", "") for part in content)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
            for call in calls
        ]
    if message["role"] == "tool":
        called = {call["id"]: call["name"] for item in conversation for call in item.get("tool_calls") or ()}
        made["name"] = called.get(message["tool_call_id"], "")
    return {"content": "", **made}
