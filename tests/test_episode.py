"""An episode by hand: what it asks for, what bounds it, and what becomes of it when a call or its environment fails."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from grpo_hf.episodes.chat import Chat
from grpo_hf.episodes.episode import Ask, Rules, ToolFailedError, observed, play
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.episodes.toolbox import Toolbox
from grpo_hf.rollout.prompts import derived_seed
from grpo_hf.types import Completion, Prompt
from tests.agents import TOKENS, Room, agent_tokenizer, call, dice, look

ROW = {"prompt": [{"role": "user", "content": "one"}], "size": 1}
END = "<|im_end|>"


def ids_of(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


class Raising(Room):
    """Its reset raises."""

    def reset(self, **row: Any) -> str:
        """Fail."""
        raise RuntimeError("no room")


def played(
    *turns: list[str],
    tools: Any = (dice, look),
    environments: Any = None,
    rules: dict[str, Any] | None = None,
    template: str = "qwen2.5",
) -> tuple[Completion, list[Ask]]:
    """An episode in which the model says these turns, and what it was asked for."""
    tokenizer = agent_tokenizer(template)
    toolbox = Toolbox(tools, environments, ToolSettings(workers=1))
    limits = {"max_completion_length": 200, "max_model_length": 300} | (rules or {})
    episode = play(Prompt([], ROW["prompt"], ROW, 0), 7, chat=Chat(tokenizer), toolbox=toolbox, rules=Rules(**limits))
    said, asks, answer = iter(turns), [], None
    try:
        while True:
            wanted = episode.send(answer)
            if isinstance(wanted, Future):
                answer = wanted.result(timeout=60)
                continue
            asks.append(wanted)
            ids = ids_of(*next(said))[: wanted.max_tokens]
            cut = len(ids) == wanted.max_tokens and ids[-1] != TOKENS.index(END)
            answer = Completion(ids, truncated=cut, rollout_logprobs=[-0.5] * len(ids))
    except StopIteration as end:
        return end.value, asks
    finally:
        toolbox.close()


def test_a_turn_is_asked_for_with_all_that_came_before_it() -> None:
    one, two = ["one", call("look", place=1), END], ["two", END]
    episode, asks = played(one, two)
    assert [ask.seed for ask in asks] == [7, derived_seed(7, "turn", 1)]
    assert asks[1].ids[: len(asks[0].ids) + 3] == asks[0].ids + ids_of(*one), "sampled ids stay as they are"
    assert asks[1].max_tokens == asks[0].max_tokens - (len(asks[1].ids) - len(asks[0].ids))
    assert [message["role"] for message in episode.messages or ()] == ["assistant", "tool", "assistant"]
    assert episode.messages[1] == {"role": "tool", "name": "look", "content": "one"}  # type: ignore[index]
    assert asks[0].ids + episode.ids == asks[1].ids + ids_of(*two)
    sampled = [token for token, flag in zip(episode.ids, episode.is_sampled or (), strict=True) if flag]
    assert sampled == ids_of(*one, *two) and len(episode.rollout_logprobs or ()) == 5
    assert (episode.truncated, episode.text, len(episode.turns), episode.valid) == (False, "two", 2, True)


def test_several_calls_are_answered_in_order() -> None:
    episode, _ = played([call("look", place=2), call("look", place=1), END], [END])
    assert [message["content"] for message in episode.messages or () if message["role"] == "tool"] == ["two", "one"]
    assert [item.outcome for item in episode.turns[0].calls] == ["ok", "ok"]


def test_what_goes_wrong_is_said_to_the_model() -> None:
    turn = [call("look", place=3), call("nothing"), call("look", wrong=1), END]
    episode, _ = played(turn, [END])
    assert [item.outcome for item in episode.turns[0].calls] == ["error"] * 3
    contents = [str(message["content"]) for message in episode.messages or () if message["role"] == "tool"]
    assert "KeyError" in contents[0] and "there is no tool 'nothing'" in contents[1] and "'place'" in contents[2]
    assert all("error" in text for text in contents) and episode.valid


def test_at_the_limit_of_iterations_the_last_call_is_not_run() -> None:
    episode, asks = played(*[[call("look", place=1), END]] * 2, rules={"max_tool_calling_iterations": 1})
    assert len(asks) == 2 and [item.outcome for turn in episode.turns for item in turn.calls] == ["ok", ""]
    assert not episode.truncated
    none, asks = played([call("look", place=1), END], rules={"max_tool_calling_iterations": 0})
    assert len(asks) == 1 and len(none.messages or ()) == 1


def test_results_that_leave_no_room_for_an_answer_are_undone() -> None:
    _, asks = played([call("look", place=1), END], ["two", END])
    just_enough = len(asks[1].ids) - len(asks[0].ids) + 1
    kept, again = played([call("look", place=1), END], ["two", END], rules={"max_completion_length": just_enough})
    assert len(again) == 2 and again[1].max_tokens == 1 and kept.truncated, "its only token is no end"
    undone, once = played([call("look", place=1), END], rules={"max_completion_length": just_enough - 1})
    assert len(once) == 1 and undone.truncated and undone.ids == ids_of(call("look", place=1), END)
    assert undone.is_sampled == [True, True] and [m["role"] for m in undone.messages or ()] == ["assistant"]
    assert undone.turns[0].calls[0].outcome == "ok", "the call was made all the same"
    context = len(asks[0].ids) + just_enough - 1
    assert played([call("look", place=1), END], rules={"max_model_length": context})[0].ids == undone.ids


def test_a_turn_that_is_cut_off_calls_nothing() -> None:
    episode, _ = played(["one", call("look", place=1), "two"], rules={"max_completion_length": 2})
    assert episode.truncated and not episode.turns[0].calls and len(episode.ids) == 2


POLICIES = {"tell": (True, 2), "drop": (False, 1)}


@pytest.mark.parametrize(("policy", "valid", "turns"), [(name, *values) for name, values in POLICIES.items()], ids=POLICIES)
def test_what_becomes_of_a_call_that_fails(policy: str, valid: bool, turns: int) -> None:
    episode, asks = played([call("look", place=3), END], [END], rules={"policy": {"error": policy}})
    assert (episode.valid, len(asks)) == (valid, turns)


def test_a_call_that_fails_can_stop_the_run() -> None:
    with pytest.raises(
        ToolFailedError, match=r"the tool 'look' has ended in error, at which tool_policy stops the run: [\s\S]*KeyError"
    ):
        played([call("look", place=3), END], rules={"policy": {"error": "stop"}})


def test_an_environment_speaks_first_keeps_its_state_and_judges_itself() -> None:
    episode, _ = played([call("look", place=1), END], [call("look", place=2), END], [END], tools=(), environments=Room)
    assert episode.prompt_messages == [{"role": "user", "content": "one two"}]
    assert episode.environment.verdict.score == 2.0 and (episode.reset.outcome, episode.valid) == ("ok", True)  # type: ignore


def test_a_reset_that_raises_costs_its_episode() -> None:
    episode, asks = played(tools=(), environments=Raising)
    assert not asks and not episode.valid and not episode.ids
    assert episode.reset is not None and episode.reset.outcome == "error" and "no room" in episode.reset.message


def test_an_observation_that_fills_the_context_costs_its_episode() -> None:
    episode, asks = played(tools=(), environments=Room, rules={"max_model_length": 5})
    assert not asks and episode.reset is not None and "the context has 5" in episode.reset.message


@pytest.mark.parametrize(
    ("content", "observation", "expected"),
    [
        ("a", "b", "ab"),
        ("a", [{"type": "text", "text": "b"}], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        ([{"type": "text", "text": "a"}], "b", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
    ],
)
def test_an_observation_joins_the_last_message(content: Any, observation: Any, expected: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    assert observed(messages, observation) == [messages[0], {"role": "user", "content": expected}]
    assert observed(messages, "") == messages and observed(messages, None) == messages
