"""A run that is stopped and resumed gives the numbers and the weights of one that was not, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from grpo_hf import GRPOTrainer
from tests.runs import StopAfter, logs, lora, same, timeless, weights
from tests.tiny import tiny_trainer
from tests.tiny_models import tiny_model


def numbers(trainer: GRPOTrainer) -> dict[int, dict[str, float]]:
    """Every logged number by step, less the times."""
    return {entry["step"]: timeless(entry) for entry in logs(trainer)}


# settings, steps between checkpoints, step that the run is stopped after, checkpoint that it goes on from
STOPS = {
    "between rollouts": ({}, 1, 3, 3),
    "steps after the checkpoint are done again": ({}, 2, 5, 4),
    "inside a rollout, second iteration": ({"num_iterations": 2}, 3, 4, 3),
    "inside a rollout, second update": ({"steps_per_generation": 2}, 3, 3, 3),
    "inside a rollout, accumulating": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "num_generations": 8},
        1,
        3,
        3,
    ),
    "in a later pass over the prompts": ({"num_iterations": 2, "num_train_epochs": 2}, 1, 9, 9),
    "reference model": ({"beta": 0.1, "num_iterations": 2}, 3, 3, 3),
    "moving reference model": ({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}, 3, 4, 3),
    "lora": ({"peft_config": lora, "num_iterations": 2}, 3, 3, 3),
    "lora, reference": ({"peft_config": lora, "beta": 0.1}, 3, 3, 3),
    "padded layout": ({"token_layout": "padded", "num_iterations": 2}, 3, 3, 3),
    "gradient checkpointing, bf16": ({"gradient_checkpointing": True, "bf16": True, "num_iterations": 2}, 3, 3, 3),
}


@pytest.mark.parametrize(("settings", "every", "stop", "checkpoint"), STOPS.values(), ids=STOPS)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, settings: dict, every: int, stop: int, checkpoint: int) -> None:
    options = dict(settings)
    peft_config = options.pop("peft_config", lambda: None)
    if "num_train_epochs" in options:
        options["max_steps"] = -1
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": every, "learning_rate": 1e-2} | options

    def trainer(folder: str, *callbacks: TrainerCallback) -> GRPOTrainer:
        return tiny_trainer(tmp_path / folder, peft_config=peft_config(), callbacks=callbacks, **options)

    whole = trainer("whole")
    whole.train()
    stopped = trainer("stopped", StopAfter(stop))
    stopped.train()
    assert stopped.state.global_step == stop < whole.state.global_step
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{checkpoint}"))

    assert resumed.state.global_step == whole.state.global_step
    expected, got = numbers(whole), numbers(resumed)
    assert got.keys() == expected.keys()
    for step in expected:
        assert got[step] == expected[step]
    assert same(weights(resumed.model), weights(whole.model))
    if whole.ref_model is not None:
        assert same(weights(resumed.ref_model), weights(whole.ref_model))


def test_a_tied_weight_is_not_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, model=tiny_model("qwen2"), callbacks=[StopAfter(1)], **options).train()
    resumed = tiny_trainer(tmp_path, model=tiny_model("qwen2"), **options)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 2
    assert "missing keys" not in caplog.text
    head, embedding = resumed.model.get_output_embeddings(), resumed.model.get_input_embeddings()
    assert head.weight is embedding.weight


def test_it_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, callbacks=[StopAfter(2)], **options).train()
    resumed = tiny_trainer(tmp_path, **options)
    first: list[int] = []
    resumed.add_callback(FirstStep(first))
    resumed.train(resume_from_checkpoint=True)
    assert first == [2]
    with pytest.raises(ValueError, match="no whole checkpoint"):
        tiny_trainer(tmp_path / "other", **options).train(resume_from_checkpoint=True)


class FirstStep(TrainerCallback):
    """Notes the finished steps at the start."""

    def __init__(self, noted: list[int]):
        self.noted = noted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.noted.append(state.global_step)


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = tiny_trainer(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    tiny_trainer(tmp_path / "short", max_steps=2, **options).train()
    longer = tiny_trainer(tmp_path / "short", max_steps=4, **options)
    longer.train(resume_from_checkpoint=True)
    assert same(weights(longer.model), weights(whole.model))


def test_a_streamed_data_set_is_read_in_order_and_again_where_it_goes_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"w{number}"} for number in range(11, 41)]
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}

    def trainer(folder: str, *callbacks: TrainerCallback, **more: Any) -> GRPOTrainer:
        streamed = Dataset.from_list(rows).to_iterable_dataset()
        return tiny_trainer(tmp_path / folder, dataset=streamed, callbacks=callbacks, **(settings | more))

    whole = trainer("whole")
    assert [prompt["prompt"] for prompt in whole.prompts.dataset] == [row["prompt"] for row in rows[:8]], "what 4 steps need"
    whole.train()
    asked = [whole.prompts[row].raw for step in range(4) for row in whole.stream.order.prompts(step)]
    assert asked == [row["prompt"] for row in rows[:8]]
    trainer("stopped", StopAfter(2)).train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match="which has no length, and max_steps=-1: set max_steps, or"):
        trainer("none", max_steps=-1)
    with pytest.raises(ValueError, match="dynamic_sampling and curricula choose among rows"):
        trainer("none", dynamic_sampling=True)
