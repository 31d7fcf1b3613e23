"""Environments of the package `verifiers` train as others do: their data, their episodes, their rewards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_hf import GRPOTrainer
from grpo_hf.episodes.hosted import as_chat, load_hosted
from grpo_hf.training.config import GRPOConfig
from tests.agents import agent_model, agent_tokenizer

HAS_PACKAGE = pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason='pip install "verifiers>=0.2,<0.3"')
SINGLE = """
import verifiers as vf
from datasets import Dataset

def load_environment(rows=4, **options):
    def says_it(completion, answer):
        return float(answer in completion[-1].content)
    data = Dataset.from_list([{"question": f"say w{n}", "answer": f"w{n}"} for n in range(rows)])
    return vf.SingleTurnEnv(dataset=data, eval_dataset=data, rubric=vf.Rubric(funcs=[says_it]), **options)
"""
TOOLS = """
import verifiers as vf
from datasets import Dataset

def dice(place: int) -> str:
    \"\"\"Throw dice.

    Args:
        place: where
    \"\"\"
    return f"{place} w7"

def load_environment():
    async def calls(state):
        return sum(len(step["completion"][0].tool_calls or []) for step in state["trajectory"])
    data = Dataset.from_list([{"question": f"throw w{n}", "answer": ""} for n in range(4)])
    return vf.ToolEnv(dataset=data, tools=[dice], max_turns=3, rubric=vf.Rubric(funcs=[calls]))
"""
TALK = """
import asyncio
import verifiers as vf
from datasets import Dataset

class Talk(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        if state["answer"] == "breaks":
            raise vf.Error("it is broken")
        if state["answer"] == "hangs":
            await asyncio.sleep(60)
        return [{"role": "user", "content": "more"}]

def load_environment():
    def turns(state):
        return float(len(state["trajectory"]))
    rows = [{"question": f"talk w{n}", "answer": answer} for n, answer in enumerate(["", "breaks", "hangs", ""])]
    return Talk(dataset=Dataset.from_list(rows), max_turns=3, rubric=vf.Rubric(funcs=[turns]))
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return f"verifiers:{name}"

    return write


def trainer_of(folder: Path, environments: Any, **settings: Any) -> GRPOTrainer:
    sizes = {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 60, "max_steps": 2}
    quiet = {"use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "write_report": False}
    args = GRPOConfig(output_dir=str(folder), report_to="none", logging_steps=1, **(sizes | quiet | settings))
    return GRPOTrainer(agent_model(), None, args, processing_class=agent_tokenizer(), environments=environments)


@HAS_PACKAGE
@pytest.mark.parametrize(("name", "text"), [("single_turn", SINGLE), ("throws_dice", TOOLS)])
def test_an_environment_trains(tmp_path: Path, environment: Any, name: str, text: str) -> None:
    trainer = trainer_of(tmp_path / "run", environment(name, text))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line[f"rewards/{name}/mean"] == pytest.approx(line["reward"])
    assert line["tools/reset/outcomes/ok"] == 1.0
    assert any((value != before[key]).any() for key, value in trainer.model.state_dict().items()) or line["reward_std"] == 0
    for group in trainer.rollout.groups:
        for item in group.completions:
            assert sum(turn.num_tokens for turn in item.turns) == sum(item.is_sampled) + sum(
                sum(branch.is_sampled) for branch in item.earlier
            ), "every sampled token is trained on once"
    if name == "throws_dice":
        items = [item for group in trainer.rollout.groups for item in group.completions]
        called = [item for item in items if item.turns[0].calls]
        assert called and all(item.reward == sum(len(turn.calls) for turn in item.turns) for item in items)
        assert any("w7" in message["content"] for item in called for message in item.messages if message["role"] == "tool")


@HAS_PACKAGE
def test_what_breaks_or_hangs_costs_its_own_episode(tmp_path: Path, environment: Any) -> None:
    trainer = trainer_of(tmp_path / "run", environment("talk_on", TALK), tool_timeout=2.0, max_completion_length=200)
    trainer.rollout = trainer.make_rollout(0)
    by_answer = {
        group.prompt.row["answer"] + str(group.prompt.index): group.completions
        for group in trainer.stream.make(1, version=0).sampled
    }
    for name, items in by_answer.items():
        for item in items:
            if len(item.turns) > 1 or not name[0].isalpha():
                assert item.valid and item.reward == len(item.turns)
            else:
                assert not item.valid and item.reset.outcome == {"b": "error", "h": "timeout"}[name[0]]
    assert {len(item.turns) for name, items in by_answer.items() if not name[0].isalpha() for item in items} == {3}


@HAS_PACKAGE
def test_options_and_held_out_rows(tmp_path: Path, environment: Any) -> None:
    spec = {"name": environment("options_too", SINGLE), "rows": 8, "system_prompt": "be brief"}
    trainer = trainer_of(tmp_path / "run", spec, max_completion_length=20)
    assert len(trainer.prompts) == 8 and trainer.prompts[0].raw[0] == {"role": "system", "content": "be brief"}
    metrics = trainer.evaluate()
    assert "eval_rewards/options_too/mean" in metrics


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="environments='echo' names no environment: write verifiers:NAME"):
        load_hosted("echo", timeout=1.0)
    with pytest.raises(ValueError, match="brings data, tools and episodes of its own; leave out train_dataset"):
        args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
        GRPOTrainer(agent_model(), None, args, [{"prompt": "a"}], None, agent_tokenizer(), environments="verifiers:x")
    assert load_hosted(None, timeout=1.0) is None


def test_messages_as_chat_templates_show_them() -> None:
    call = {"id": "call_1_0", "name": "dice", "arguments": '{"sides": 6}'}
    said = {"role": "assistant", "content": "I throw.", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1_0", "content": [{"type": "text", "text": "4"}]}
    assert as_chat(said, [said, result])["tool_calls"] == [
        {"type": "function", "function": {"name": "dice", "arguments": {"sides": 6}}}
    ]
    assert as_chat(result, [said, result]) == {"role": "tool", "name": "dice", "content": "4"}
