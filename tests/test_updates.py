"""The updates that Trainer is handed: in which order, on which item, and after a resume from any step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from grpo_hf.training.trainer import GRPOTrainer, Updates
from tests.streams import STOP, FakeEngine
from tests.tiny import tiny_trainer

PROMPTS = [{"prompt": f"w{number} w{number + 1}"} for number in range(7)]
ROLLOUTS = 3
"""Of a pass: 7 prompts, 2 at a time."""


class Run:
    """A trainer over canned completions, and the loop that Trainer drives its updates by, which takes no step."""

    def __init__(self, folder: Path, *, updates: int = 1, iterations: int = 1, accumulation: int = 1, **settings: Any):
        sizes = {
            "per_device_train_batch_size": 8 // (updates * accumulation),
            "steps_per_generation": updates * accumulation,
            "gradient_accumulation_steps": accumulation,
            "num_iterations": iterations,
            "max_completion_length": 3,
            "keep_zero_signal": True,
        }
        self.trainer: GRPOTrainer = tiny_trainer(folder, dataset=PROMPTS, **(sizes | settings))
        self.trainer.state.max_steps = 10**6
        self.engine = self.trainer.stream.sampler.engine = FakeEngine(
            lambda ids, seed, n: [(seed + n) % 89, *[STOP] * ((seed + n) % 3)]
        )

    def epoch(self) -> Iterator[dict[str, Any]]:
        """One pass of the prompts; an update is finished when the next item is asked for."""
        for item in Updates(self.trainer):
            yield item
            self.trainer.state.global_step += "update" in item

    def rollout(self) -> int:
        assert self.trainer.rollout is not None
        return self.trainer.rollout.index

    def save(self) -> Path:
        """A checkpoint as it is now."""
        self.trainer._save_checkpoint(self.trainer.model, None)
        return Path(str(self.trainer.args.output_dir), f"checkpoint-{self.trainer.state.global_step}")

    def resume(self, checkpoint: Path) -> None:
        """Go on from there, as in a process of its own."""
        self.trainer.stream.reset()
        self.trainer.rollout, self.trainer.state.global_step = None, int(checkpoint.name.split("-")[1])
        self.trainer._load_optimizer_and_scheduler(str(checkpoint))


@pytest.fixture
def only_our_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's own parts of a checkpoint, a model and an optimizer, are left out: no step is taken here."""
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, *args: self._checkpoint_folder(None).mkdir(parents=True))
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda self, checkpoint: None)


def tokens(item: dict[str, Any]) -> list[tuple[int, ...]]:
    """What identifies an update."""
    return [sample.ids for sample in item["update"].samples]


def test_length_of_an_epoch(tmp_path: Path) -> None:
    assert len(Updates(Run(tmp_path).trainer)) == ROLLOUTS
    run = Run(tmp_path, updates=2, iterations=3, accumulation=4)
    assert len(Updates(run.trainer)) == ROLLOUTS * 2 * 3 * 4 == len(list(run.epoch()))


@pytest.mark.parametrize(
    ("updates", "iterations", "order"),
    [(1, 1, [0]), (2, 1, [0, 1]), (1, 2, [0, 0]), (2, 2, [0, 1, 0, 1])],
)
def test_order_of_updates(tmp_path: Path, updates: int, iterations: int, order: list[int]) -> None:
    """A rollout's updates in order, that many times over; weights are synced once a rollout."""
    run = Run(tmp_path, updates=updates, iterations=iterations)
    numbers, rollouts = [], []
    for item in run.epoch():
        assert run.trainer.rollout is not None
        numbers.append([update is item["update"] for update in run.trainer.rollout.updates].index(True))
        rollouts.append(run.rollout())
    assert numbers == order * ROLLOUTS
    assert rollouts == [rollout for rollout in range(ROLLOUTS) for _ in order]
    assert run.engine.synced == [rollout * len(order) for rollout in range(ROLLOUTS)]


def test_accumulation_puts_an_update_on_the_last_item(tmp_path: Path) -> None:
    assert [sorted(item) for item in Run(tmp_path, accumulation=2).epoch()] == [[], ["update"]] * ROLLOUTS


def test_epochs_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    run = Run(tmp_path, updates=2)
    rollouts = [run.rollout() for _ in range(3) for _item in run.epoch()]
    assert rollouts == [number for number in range(3 * ROLLOUTS) for _ in range(2)]


@pytest.mark.parametrize(("updates", "iterations", "accumulation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_resume_from_any_number_of_finished_updates(
    tmp_path: Path, only_our_parts: None, updates: int, iterations: int, accumulation: int
) -> None:
    run = Run(tmp_path, updates=updates, iterations=iterations, accumulation=accumulation)
    expected, checkpoints = [], []
    for _ in range(2):
        for item in run.epoch():
            if "update" in item:
                expected.append(tokens(item))
                run.trainer.state.global_step += 1
                checkpoints.append(run.save())
                run.trainer.state.global_step -= 1
    for finished, checkpoint in enumerate(checkpoints[:-1], start=1):
        run.resume(checkpoint)
        syncs = len(run.engine.synced)
        inside = finished % (updates * iterations)
        assert (run.trainer.rollout is not None) is bool(inside), "held only between its updates"
        left = len(expected) // 2 - finished % (len(expected) // 2)  # in this pass
        rest = [tokens(item) for item in run.epoch() if "update" in item]
        assert rest == expected[finished : finished + left]
        assert len(run.engine.synced) - syncs == (left - (-finished % (updates * iterations))) // (updates * iterations)


def test_inside_a_rollout_a_resumed_run_trains_what_the_launcher_has_wrapped(tmp_path: Path, only_our_parts: None) -> None:
    """As for a rollout that is made anew: without the wrapper, processes would not share their gradients."""
    run = Run(tmp_path, iterations=2)
    next(iter(run.epoch()))
    run.trainer.state.global_step = 1
    run.resume(run.save())
    run.trainer.model_wrapped = torch.nn.Sequential(run.trainer.model)
    next(iter(run.epoch()))
    assert run.engine.synced == [0], "the rollout was there"
    assert run.trainer.policy.wrapped is run.trainer.model_wrapped


def test_a_checkpoint_keeps_what_the_first_pass_left_behind(tmp_path: Path, only_our_parts: None) -> None:
    """Old log-probs are part of a rollout; its groups, text and all, are done with."""
    run = Run(tmp_path, iterations=2)
    item = next(iter(run.epoch()))
    run.trainer.training_step(run.trainer.model, item)
    run.trainer.state.global_step = 1
    kept = [sample.old_logprobs for sample in item["update"].samples]
    assert all(isinstance(values, torch.Tensor) and values.isfinite().all() for values in kept)
    run.resume(run.save())
    rollout = run.trainer.rollout
    assert rollout is not None
    assert all(torch.equal(a.old_logprobs, b) for a, b in zip(rollout.updates[0].samples, kept, strict=True))
    assert (rollout.groups, rollout.sampled, rollout.tally) == ([], [], {})


def test_a_checkpoint_holds_what_was_sampled_ahead(tmp_path: Path, only_our_parts: None) -> None:
    run = Run(tmp_path)
    run.trainer.args.rollout_ahead = 1
    expected, checkpoints = [], []
    for item in run.epoch():
        expected.append((tokens(item), run.trainer.rollout.version))  # type: ignore[union-attr]
        run.trainer.state.global_step += 1
        checkpoints.append(run.save())
        run.trainer.state.global_step -= 1
    assert [version for _, version in expected] == [0, 0, 1]
    run.resume(checkpoints[0])
    syncs = len(run.engine.synced)
    again = [(tokens(item), run.trainer.rollout.version) for item in run.epoch()]  # type: ignore[union-attr]
    assert again == expected[1:]
    assert len(run.engine.synced) - syncs == 2, "rollout 2's and rollout 3's; rollout 1 was there"
