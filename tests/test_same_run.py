"""Whether a run that resumes is the one that was saved, and what becomes of settings that are changed on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from grpo_hf.rewards import get_reward
from grpo_hf.training.fingerprint import digest_of_code
from grpo_hf.training.same_run import check_same_run
from tests.runs import StopAfter, logs, values
from tests.tiny import tiny_model, tiny_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}
ROWS = [{"prompt": f"w{number} w2", "answer": f"w{number}"} for number in range(6)]

# ---- Code


def made_of(source: str) -> Callable[..., Any]:
    """The function `reward` of a program."""
    space: dict[str, Any] = {"__name__": "tests.program"}
    exec(source, space)
    return space["reward"]


def test_the_same_code_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever file it is in; comments and docstrings are no code."""
    digests = []
    for name, comment in (("a", '"""Says."""'), ("b", "# says")):
        (tmp_path / f"{name}.py").write_text(f"{comment}\ndef reward(completion):\n    {comment}\n    return 1.0\n")
        digests.append(digest_of_code(get_reward(f"{tmp_path / name}.py:reward")))
    assert digests[0] == digests[1]


SOURCE = """
BEST = {'a': 1}
def helper(x): return x + BEST['a']
def reward(completion, scale=1): return scale * helper(len(completion))
"""
OTHER_CODE = {
    "the body": SOURCE.replace("scale *", "2 * scale *"),
    "a default": SOURCE.replace("scale=1", "scale=2"),
    "a table": SOURCE.replace("'a': 1", "'a': 2"),
    "a function that it calls": SOURCE.replace("x +", "x -"),
}


@pytest.mark.parametrize("source", OTHER_CODE.values(), ids=OTHER_CODE)
def test_other_code_under_the_same_name(source: str) -> None:
    assert digest_of_code(made_of(SOURCE)) == digest_of_code(made_of(SOURCE)) != digest_of_code(made_of(source))


def enclosing(limit: Any) -> Callable[..., float]:
    return lambda completion: float(len(completion) < limit)


OPTIONS: dict[str, tuple[Any, Any]] = {
    "of a partial": (partial(made_of(SOURCE), scale=2), partial(made_of(SOURCE), scale=3)),
    "enclosed": (enclosing(3), enclosing(4)),
    "of a built-in": ({"name": "regex", "pattern": "a"}, {"name": "regex", "pattern": "b"}),
    "of a combinator": (
        {"name": "weighted_sum", "rewards": ["format", "exact_match"], "weights": [1, 2]},
        {"name": "weighted_sum", "rewards": ["format", "exact_match"], "weights": [1, 3]},
    ),
    "of a part": (
        {"name": "clip", "reward": {"name": "regex", "pattern": "a"}},
        {"name": "clip", "reward": {"name": "regex", "pattern": "b"}},
    ),
}


@pytest.mark.parametrize(("one", "other"), OPTIONS.values(), ids=OPTIONS)
def test_other_options_of_the_same_verifier(one: Any, other: Any) -> None:
    assert digest_of_code(get_reward(one)) == digest_of_code(get_reward(one)) != digest_of_code(get_reward(other))


# ---- Runs


def exact(completion: str, answer: str) -> float:
    return float(answer in completion)


def lora(**changed: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | changed)


def other_base() -> Any:
    """In one row of its embeddings."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 0.1
    return model


def loss_of(source: str) -> Callable[..., Any]:
    return made_of(f"def reward(batch): return {source} * batch.advantages, {{}}")


BASE: dict[str, Any] = {"reward": exact, "dataset": ROWS}
# what the run is, what the one that resumes has otherwise, what is said of it
OTHER_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gold answers": ({}, {"dataset": [row | {"answer": "w9"} for row in ROWS]}, "columns that verifiers read"),
    "code of a reward": (
        {"reward": made_of(SOURCE)},
        {"reward": partial(made_of(SOURCE), scale=2)},
        "code and options of the rewards.reward ",
    ),
    "code of a loss": (
        {"loss_type": loss_of("-batch.logprobs")},
        {"loss_type": loss_of("-2 * batch.logprobs")},
        "code of the user's own functions",
    ),
    "base weights under LoRA": ({"peft_config": lora}, {"model": other_base}, "frozen weights"),
    "reference weights": ({"beta": 0.1}, {"model": other_base}, "weights of the reference"),
    "lora_alpha": (
        {"peft_config": lora},
        {"peft_config": partial(lora, lora_alpha=16)},
        r"adapters\.default\.lora_alpha 8 -> 16\. Set",
    ),
    "lora_dropout": ({"peft_config": lora}, {"peft_config": partial(lora, lora_dropout=0.1)}, "adapters"),
    "rslora": ({"peft_config": lora}, {"peft_config": partial(lora, use_rslora=True)}, "adapters"),
}


def trainer(folder: Path, **settings: Any) -> Any:
    """A tiny one; models and adapters are made anew for each."""
    made = {name: value() if name in ("model", "peft_config") else value for name, value in (BASE | settings).items()}
    return tiny_trainer(folder, **made)


@pytest.mark.parametrize(("settings", "changed", "said"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_is_refused(tmp_path: Path, settings: dict, changed: dict, said: str) -> None:
    one, same, other = (trainer(tmp_path, **part).run for part in (settings, settings, settings | changed))
    assert not check_same_run(one, same, "it").names
    with pytest.raises(ValueError, match=f"it is of another run: {said}"):
        check_same_run(one, other, "it")


def test_all_weights_come_from_the_checkpoint_whatever_the_model_was(tmp_path: Path) -> None:
    assert not check_same_run(trainer(tmp_path).run, trainer(tmp_path, model=other_base).run, "it").names


# ---- Changed on purpose


def test_changed_settings_are_those_that_the_run_goes_on_with(tmp_path: Path) -> None:
    """Learning rate, its schedule and weight decay, which optimizer and schedule bring back from the checkpoint."""
    options = {"max_steps": 4, "learning_rate": 0.01, "lr_scheduler_type": "linear", **SAVING}
    tiny_trainer(tmp_path, callbacks=[StopAfter(2)], **options).train()
    run = tiny_trainer(tmp_path, **options | {"max_steps": 8, "learning_rate": 0.1, "weight_decay": 0.5})
    run.train(resume_from_checkpoint="auto")
    linear = [0.1 * (8 - step) / 8 for step in range(2, 8)]  # of the finished steps
    assert values(run, "learning_rate") == pytest.approx([0.01, 0.0075, *linear])
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.5, 0.0}


def test_the_advice_of_guards_can_be_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Between rollouts; within one, its log-probs are of the settings before."""
    options = {"max_steps": 4, "num_iterations": 2, **SAVING}
    tiny_trainer(tmp_path, callbacks=[StopAfter(3)], **options).train()
    advice = {"beta": 0.1, "temperature": 1.2, "entropy_coef": 0.01, "epsilon_high": 0.3, "sync_ref_model": True}
    run = tiny_trainer(tmp_path, **options | advice, ref_model_sync_steps=1)
    with pytest.raises(ValueError, match=r"checkpoint-3 is in the middle of a rollout, .*beta 0.0 -> 0.1; .*multiple of"):
        run.train(resume_from_checkpoint="auto")
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "changed settings: beta 0.0 -> 0.1; entropy_coef 0.0 -> 0.01; epsilon_high None -> 0.3" in caplog.text
    assert [line["step"] for line in logs(run) if "kl" in line] == [3, 4]
    back = tiny_trainer(tmp_path, **options | advice | {"sync_ref_model": False})
    with pytest.raises(ValueError, match="holds a moving reference, which this run has none of"):
        back.train(resume_from_checkpoint="auto")
