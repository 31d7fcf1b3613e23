"""Training with tools, environments and rollout functions, whole: what is trained on, what is logged, and what a resumed run
and a failing tool leave as it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from grpo_hf import GRPOTrainer
from grpo_hf.episodes.metrics import record_calls
from grpo_hf.episodes.tools import in_process
from grpo_hf.types import Group
from tests.agents import ROWS, STOPS, Room, agent_tokenizer, agent_trainer, dice, look
from tests.runs import StopAfter, logs, same, timeless, values, weights
from tests.tiny_models import gradient_of, relative_error

COUNTED: list[int] = []


@in_process
def counted(place: int) -> str:
    """Look somewhere.

    Args:
        place: Where.
    """
    COUNTED.append(place)
    return "one"


counted.__name__ = "look"


def sampled_ids(groups: list[Group]) -> int:
    return sum(turn.num_tokens for group in groups for item in group.completions for turn in item.turns)


def targets(trainer: GRPOTrainer) -> int:
    assert trainer.rollout is not None
    return sum(int(sample.is_target.sum()) for update in trainer.rollout.updates for sample in update.samples)


# ---- What is trained on


def test_every_sampled_id_is_trained_on_and_no_other(tmp_path: Path) -> None:
    trainer = agent_trainer(tmp_path, tools=[dice, look], keep_zero_signal=True, max_steps=1)
    trainer.train()
    groups = trainer.rollout.sampled
    answered = [not flag for group in groups for item in group.completions for flag in item.is_sampled]
    assert any(answered), "tools answered"
    assert targets(trainer) == sampled_ids(groups) == values(trainer, "tokens/sampled")[0]
    assert values(trainer, "tools/turns")[0] > 1


def test_every_sampled_id_is_trained_on_where_the_template_rewrites_history(tmp_path: Path) -> None:
    """One that drops a word of earlier messages: an episode becomes several histories."""
    tokenizer = agent_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "(message.content if loop.last else (message.content | replace('one', '')))"
    )
    trainer = agent_trainer(
        tmp_path,
        tools=[dice, look],
        keep_zero_signal=True,
        max_steps=1,
        num_generations=8,
        tokenizer=tokenizer,
    )
    trainer.train()
    groups = trainer.rollout.sampled
    assert any(item.earlier for group in groups for item in group.completions), "some were rewritten"
    assert targets(trainer) == sampled_ids(groups)


def test_gradients_through_the_tree_are_those_of_rows(tmp_path: Path) -> None:
    packed = agent_trainer(tmp_path / "a", tools=[dice, look], max_steps=1, learning_rate=0.0, token_layout="packed")
    packed.train()
    update = packed.rollout.updates[0]
    assert sum(len(sample.ids) for sample in update.samples) > 1.2 * values(packed, "tokens/forwarded")[0], (
        "shared beginnings"
    )
    found = []
    for settings in ({"token_layout": "packed"}, {"token_layout": "padded", "tokens_per_microbatch": 1}):
        trainer = agent_trainer(tmp_path / str(len(found)), tools=[dice, look], **settings)
        trainer.policy.forward_backward(update, step=1)
        found.append(gradient_of(trainer.model))
    assert relative_error(found[0], found[1]) < 1e-5


# ---- Environments


def test_an_environment_judges_its_episodes(tmp_path: Path) -> None:
    trainer = agent_trainer(tmp_path, reward=None, environment_factory=Room, eval_dataset=ROWS, save_rollouts=True)
    trainer.train()
    assert trainer.reward_func_names == ["Room"]
    for group in trainer.rollout.sampled:
        assert group.completions[0].prompt_messages[-1]["content"] == group.prompt.raw[-1]["content"] + " two"
        for item in group.completions:
            places = {c.arguments["place"] for turn in item.turns for c in turn.calls if c.outcome == "ok"}
            assert item.rewards["Room"] == len(places)
    assert values(trainer, "tools/reset/outcomes/ok") == [1.0, 1.0]
    assert trainer.evaluate()["eval_rewards/Room/mean"] >= 0


class Other(Room):
    """With another reward."""

    def get_reward(self) -> float:
        """Always the same."""
        return -1.0


def test_rows_choose_their_environment(tmp_path: Path) -> None:
    rows = [row | {"environment": name} for row, name in zip(ROWS, ["room", "other"] * 2, strict=True)]
    seen: list[str] = []

    def names(completions: Any, environments: Any, **kwargs: Any) -> list[float]:
        seen.extend(type(item).__name__ for item in environments)
        return [0.0 for _ in completions]

    trainer = agent_trainer(
        tmp_path, rows=rows, reward=[{"name": names, "in_process": True}], environment_factory={"room": Room, "other": Other}
    )
    trainer.train()
    assert trainer.reward_func_names == ["names", "Room", "Other"]
    assert trainer.environments is not None and list(trainer.environments) == ["room", "other"]
    for group in trainer.rollout.sampled:
        mine, others = ("Room", "Other") if group.prompt.row["environment"] == "room" else ("Other", "Room")
        for item in group.completions:
            assert item.rewards[mine] == item.rewards[mine] and item.rewards[others] != item.rewards[others], "NaN"
    assert set(seen) == {"Room", "Other"}


def test_an_environment_brings_its_own_data(tmp_path: Path) -> None:
    trainer = agent_trainer(tmp_path, rows=None, reward=None, environment_factory=Room)
    trainer.train()
    assert len(trainer.prompts) == 2 and logs(trainer)[-1]["step"] == 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "text instead of chats": (
        {"rows": [{"prompt": "one"}] * 8, "tools": [look]},
        r"tools need chat prompts.*\[\{'role': 'user', 'content': ",
    ),
    "a row of no environment": (
        {"rows": [row | {"environment": "rom"} for row in ROWS], "reward": None, "environment_factory": {"room": Room}},
        r"row 0 of the train_dataset has environment='rom', which .* not know; .* \(nearest: room\)",
    ),
    "no end without data": (
        {"rows": None, "reward": None, "environment_factory": Room, "max_steps": -1},
        "without a train_dataset max_steps says how long to train",
    ),
    "environments without a name": ({"environment_factory": {}}, r"environment_factory=\{\} names no environment"),
    "fewer turns than none": (
        {"tools": [look], "max_tool_calling_iterations": -1},
        "max_tool_calling_iterations=-1, but max_tool_calling_iterations >= 0 is needed",
    ),
    "a rollout function that is none": ({"rollout_func": "mine"}, r"rollout_func is a function .*; got 'mine'"),
    "no reward": ({"reward": None, "tools": [look]}, "No reward source provided"),
    "sampling ahead": (
        {"tools": [look], "rollout_ahead": 1, "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://h:1"},
        "rollout_ahead=1 would sample later turns from weights that have changed",
    ),
    "a rollout function beside tools": (
        {"tools": [look], "rollout_func": lambda prompts, trainer: {}},
        "a rollout_func makes whole completions, with calls of tools",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent_trainer(tmp_path, **given)


def test_a_template_that_cannot_show_tools_is_refused(tmp_path: Path) -> None:
    tokenizer = agent_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="does not show the tools that it is given"):
        agent_trainer(tmp_path, tools=[look], tokenizer=tokenizer)


# ---- Rollout functions


def test_a_rollout_function_samples_itself(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        numbers = range(len(prompts))
        seen["prompts"], seen["trainer"] = prompts, trainer
        return {
            "prompt_ids": [[4, 5]] * len(prompts),
            "completion_ids": [[6, 7 + n % 3, 14, STOPS[0]] for n in numbers],
            "logprobs": [[-1.0, -2.0, 0.0, -0.5]] * len(prompts),
            "env_mask": [[1, 1, 0, 1]] * len(prompts),
            "luck": [float(n % 4) for n in numbers],
        }

    def lucky(completions: Any, luck: list[float], **kwargs: Any) -> list[float]:
        return luck

    made_up = {"engine_weights": "warn"}
    trainer = agent_trainer(tmp_path, rollout_func=rollout, reward=lucky, guards=made_up, keep_zero_signal=True)
    trainer.train()
    assert len(seen["prompts"]) == 8 and seen["trainer"] is trainer
    assert seen["prompts"][0] == seen["prompts"][3] and seen["prompts"][0][0]["role"] == "user"
    assert values(trainer, "reward") == [1.5, 1.5]
    assert targets(trainer) == 8 * 3, "what the mask leaves out is not trained on"
    for sample in trainer.rollout.updates[0].samples:
        assert list(sample.ids[:2]) == [4, 5] and sample.is_target.tolist() == [False, False, True, True, False, True]


def made_up(prompts: list[Any], **more: Any) -> dict[str, Any]:
    count = len(prompts)
    return {
        "prompt_ids": [[4, 5]] * count,
        "completion_ids": [[6, 7, STOPS[0]]] * count,
        "logprobs": [[-1.0, -1.0, -1.0]] * count,
        **more,
    }


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda prompts: None, r"rollout_func returned 'None' \(NoneType\); return a dict with prompt_ids"),
        (lambda prompts: made_up(prompts, luck=3), r"rollout_func returned '3' \(int\) as 'luck'; return a list"),
    ],
)
def test_what_a_rollout_function_may_not_return(tmp_path: Path, returned: Any, message: str) -> None:
    trainer = agent_trainer(tmp_path, rollout_func=lambda prompts, trainer: returned(prompts))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_rollout_function_may_return_arrays(tmp_path: Path) -> None:
    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        return {name: np.array(values) for name, values in made_up(prompts, luck=np.arange(len(prompts)) % 4).items()}

    def lucky(completions: Any, luck: list[int], **kwargs: Any) -> list[float]:
        return [float(value) for value in luck]

    trainer = agent_trainer(tmp_path, rollout_func=rollout, reward=lucky, guards={"engine_weights": "warn"}, max_steps=1)
    trainer.train()
    assert values(trainer, "reward") == [1.5]


# ---- Resuming


@pytest.mark.parametrize("environment", [None, Room], ids=["tools", "environment"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, environment: Any) -> None:
    """Also where a tool returns random numbers, and a rollout is in the middle of being trained on."""
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2}
    agents: dict[str, Any] = {"tools": [dice, look]} if environment is None else {"environment_factory": environment}
    options |= agents | {"per_device_train_batch_size": 4}
    whole = agent_trainer(tmp_path / "whole", **options)
    whole.train()
    agent_trainer(tmp_path / "stopped", callbacks=[StopAfter(3)], **options).train()
    resumed = agent_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    expected, got = ({line["step"]: timeless(line) for line in logs(trainer)} for trainer in (whole, resumed))
    assert got == expected
    assert same(weights(resumed.model), weights(whole.model))


def test_what_a_checkpoint_holds_is_not_called_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2}
    options |= {"tools": [counted], "per_device_train_batch_size": 4}
    COUNTED.clear()
    agent_trainer(tmp_path / "whole", **options).train()
    whole = list(COUNTED)
    COUNTED.clear()
    agent_trainer(tmp_path / "stopped", callbacks=[StopAfter(3)], **options).train()
    assert whole == COUNTED and whole, "the second rollout was made before step 3"
    COUNTED.clear()
    agent_trainer(tmp_path / "stopped", **options).train(resume_from_checkpoint=True)
    assert not COUNTED


def other_look(place: int) -> str:
    """Look somewhere.

    Args:
        place: Where.
    """
    return "two"


other_look.__name__ = "look"


def test_another_tool_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    agent_trainer(tmp_path, tools=[look], callbacks=[StopAfter(1)], **options).train()
    with pytest.raises(ValueError, match=r"is of another run: tools\.look"):
        agent_trainer(tmp_path, tools=[other_look], **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"is of another run: .*tools"):
        agent_trainer(tmp_path, tools=[look, dice], **options).train(resume_from_checkpoint=True)


# ---- Failures


class Hangs(Room):
    """Never answers."""

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        time.sleep(600)
        return ""


class Dies(Room):
    """Kills its process."""

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        os.kill(os.getpid(), signal.SIGKILL)
        return ""


class Raises(Room):
    """Fails."""

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        raise RuntimeError("broken")


class Floods(Room):
    """Returns 10 MB."""

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        return "one" * 3_400_000


class Prints(Room):
    """Talks to itself."""

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        print("noise " * 1000)
        return super().look(place)


class NeverBegins(Room):
    """Its reset raises."""

    def reset(self, **row: Any) -> str:
        """Fail."""
        raise RuntimeError("no room")


class Picky(Room):
    """One row's reset raises."""

    def reset(self, size: int = 1, **row: Any) -> str:
        """Begin, or not."""
        if size == 2:
            raise RuntimeError("no room")
        return super().reset(size)


def test_a_rollout_whose_resets_all_raise_costs_a_step_and_not_the_run(tmp_path: Path) -> None:
    trainer = agent_trainer(
        tmp_path, reward=None, environment_factory=Picky, per_device_train_batch_size=4, max_steps=4, shuffle_dataset=False
    )
    trainer.train()
    assert values(trainer, "tools/reset/outcomes/error") == [0.0, 0.0, 1.0, 0.0]
    assert values(trainer, "grad_norm")[2] == 0.0 and logs(trainer)[-1]["step"] == 4


KINDS = {kind.__name__: kind for kind in (Room, Hangs, Dies, Raises, Floods, Prints, NeverBegins)}


def test_bad_environments_cost_their_own_episodes_beside_two_hundred_good_ones(tmp_path: Path) -> None:
    rows = [ROWS[n % 4] | {"environment": name} for n, name in enumerate(["Room"] * 20 + list(KINDS)[1:])]
    trainer = agent_trainer(
        tmp_path,
        rows=Dataset.from_list(rows),
        environment_factory=KINDS,
        num_generations=10,
        per_device_train_batch_size=10 * len(rows),
        max_steps=1,
        tool_timeout=2.0,
        tool_environments=64,
    )
    prompts, sampling = [trainer.prompts[n] for n in range(len(rows))], trainer.stream.sampling

    def sampled(count: int) -> dict[int, list[Any]]:
        return dict(trainer.stream.sampler.episodes(prompts[:count], [1000 * n for n in range(count)], 10, sampling))

    alone, mixed = sampled(20), sampled(len(rows))
    for number, group in alone.items():
        for one, two in zip(group, mixed[number], strict=True):
            assert (one.ids, one.messages, one.valid) == (two.ids, two.messages, True)
            assert one.environment.verdict.score == two.environment.verdict.score
    groups = {prompt.row["environment"]: Group(prompt, mixed[n]) for n, prompt in enumerate(prompts)}
    outcomes = {
        name: {call.outcome for item in groups[name].completions for turn in item.turns for call in turn.calls}
        for name in list(KINDS)[1:]
    }
    assert outcomes["Hangs"] - {""} >= {"timeout"} and outcomes["Dies"] - {""} >= {"crash"}
    assert outcomes["Raises"] >= {"error"} and outcomes["Floods"] >= {"ok"} and outcomes["Prints"] >= {"ok"}
    assert all(not item.valid and item.reset.outcome == "error" for item in groups["NeverBegins"].completions)
    lost = [item for name in ("Hangs", "Dies") for item in groups[name].completions if item.turns and item.turns[-1].calls]
    assert any(not item.valid for item in lost), "its environment is lost, and its episode with it"
    record_calls(trainer.metrics, [Group(prompt, mixed[n]) for n, prompt in enumerate(prompts)], trainer.toolbox.names)
    line = trainer.metrics.flush(lambda mine: [mine], steps=1)
    for outcome in ("ok", "error", "timeout", "crash"):
        assert line[f"tools/look/outcomes/{outcome}"] > 0
    assert line["tools/reset/outcomes/error"] == pytest.approx(1 / 26)
