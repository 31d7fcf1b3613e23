"""Invariant 8: "The toy model and the language model go through the same functions of algorithm/." """

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.toy.experiments import SOLVING
from grpo_hf.toy.hf_model import SortingConfig, SortingForCausalLM
from grpo_hf.toy.train import train
from grpo_hf.training.trainer import GRPOTrainer
from tests.tiny import Gradients, tiny_tokenizer, tiny_trainer

NUMBERS = [[1, 0, 2], [3, 2, 4], [1, 2, 3]]


def toy_trainer(folder: Path, **settings) -> GRPOTrainer:
    """The lecture's model, prompts and rewards under GRPOTrainer, with the setting that solves them."""
    torch.manual_seed(0)
    return tiny_trainer(
        folder,
        model=SortingForCausalLM(SortingConfig()),
        tokenizer=tiny_tokenizer("01234"),
        reward="sort_distance",  # type: ignore[arg-type]
        dataset=[{"prompt": " ".join(map(str, numbers)), "numbers": numbers} for numbers in NUMBERS],
        max_completion_length=3,
        num_generations=10,
        per_device_train_batch_size=30,
        num_iterations=SOLVING.num_steps,
        temperature=SOLVING.temperature,
        learning_rate=SOLVING.learning_rate,
        lr_scheduler_type="constant",
        **(dict(SOLVING.loss_options) | settings),
    )


def toy_loop_moves(folder: Path) -> bool:
    short = replace(SOLVING, num_epochs=10)
    return not torch.equal(train(short).greedy, train(replace(short, learning_rate=0.0)).greedy)


def toy_trainer_moves(folder: Path) -> bool:
    return has_gradient(toy_trainer(folder))


def language_model_moves(folder: Path) -> bool:
    return has_gradient(tiny_trainer(folder))


def has_gradient(trainer: GRPOTrainer) -> bool:
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return any(bool(part.any()) for part in kept.steps[0].values())


@pytest.mark.parametrize("moves", [toy_loop_moves, toy_trainer_moves, language_model_moves])
def test_one_entry_changes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: Callable[[Path], bool]) -> None:
    """A loss, or an advantage, of zeros stops the toy's own loop and both models under GRPOTrainer."""
    assert moves(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "dapo", (lambda batch, **options: (0 * batch.logprobs, {}), "token_mean"))
        assert not moves(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(ADVANTAGES, "group", lambda scores, weights: torch.zeros(scores.shape[:2]))
        assert not moves(tmp_path)


def test_the_toy_learns_under_the_trainer(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=160, logging_steps=SOLVING.num_steps)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "loss" in line]
    assert len(rewards) == 40
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5, rewards
