"""Guards, a full disk and memory that runs out: each provoked in a tiny run."""

from __future__ import annotations

import errno
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_hf import GRPOConfig
from grpo_hf.training import checkpoints, guards
from grpo_hf.training.checkpoints import checkpoints_in, damage, is_finished, newest_checkpoint
from grpo_hf.training.guards import GUARDS, GuardError, Seen, chosen_guards, is_disk_full
from grpo_hf.training.policy import with_logprobs
from tests.runs import AfterStep, logs, same, timeless, values, weights
from tests.test_bad_input import poison
from tests.tiny import Gradients, relative_error, tiny_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}


# ---- Settings

BAD = {
    "an unknown guard": ({"kll": "warn"}, r"no guard 'kll', only not_finite, .*engine_weights \(nearest: kl\)"),
    "an unknown action": ({"not_finite": "stpo"}, r"action 'stpo', which is not one of warn, skip, stop \(nearest: stop\)"),
    "a skip that comes too late": ({"reward_collapse": "skip"}, "cannot skip a step: its value is known only after it"),
    "another key": ({"entropy_collapse": {"limit": 1.0}}, "neither one of warn, skip, stop nor {action"),
    "no number": ({"entropy_collapse": {"threshold": "low"}}, "the threshold 'low'; give a number"),
    "nothing to look at": ({"kl": "stop"}, "guards has 'kl', which has nothing to look at with beta=0"),
    "no names": ("stop", "guards='stop' must map guards to what they do"),
}


@pytest.mark.parametrize(("setting", "message"), BAD.values(), ids=BAD)
def test_settings_that_cannot_be(tmp_path: Path, setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), guards=setting, use_cpu=True)


def test_settings_change_the_defaults() -> None:
    chosen = chosen_guards({"kl": {"threshold": 3}, "entropy_collapse": "skip"})
    assert (chosen["kl"].threshold, chosen["kl"].action) == (3, GUARDS["kl"].action)
    assert (chosen["entropy_collapse"].threshold, chosen["entropy_collapse"].action) == (0.01, "skip")
    assert {name for name, guard in GUARDS.items() if guard.action == "stop"} == {"not_finite", "engine_weights"}


# ---- Each guard, tripped by a run


def engine_is_off(run: Any, *, by: float) -> None:
    """Gives every sample an engine's log-probs that are not the trainer's."""
    original = run.make_rollout

    def make_rollout(index: int) -> Any:
        rollout = original(index)
        for update in rollout.updates:
            found: dict[int, Any] = {}
            for batch in run.policy.microbatches(update):
                found |= batch.by_sample(run.policy.logprobs(batch) - by)
            update.samples = with_logprobs(update.samples, rollout_logprobs=found)
        return rollout

    run.make_rollout = make_rollout


def worse_and_worse() -> dict[str, Any]:
    """Scores that are good for the first two rollouts."""
    calls = []

    def falling(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        return [float(len(calls) <= 2)] * len(completions)

    return {"name": falling, "in_process": True}


def no_change(run: Any) -> None:
    """Nothing is put wrong."""


STEP_GUARDS = {
    "not_finite": ({"callbacks": [poison(1)]}, None, no_change, "the gradient norm of step 2 is nan"),
    "not_finite, a limit": ({}, 1e-9, no_change, r"the loss of step 1 is .*, of less than 1e-09 that are allowed"),
    "entropy_collapse": ({}, 99.0, no_change, r"the mean token entropy of step 1 is \d.* nats, below 99"),
    "kl": ({"beta": 0.1}, 1e-9, no_change, r"the mean KL divergence from the reference in step 2 is .* nats, above 1e-09"),
    "engine_mismatch": (
        {},
        None,
        lambda run: engine_is_off(run, by=0.15),
        r"the engine's log-probs of its samples differ from the trainer's by 0.15 on average in step 1, above 0.1",
    ),
    "engine_weights": (
        {},
        None,
        lambda run: engine_is_off(run, by=0.5),
        r"by 0.5 on average in step 1, above 0.2: it has other weights than the trainer.* 'warn'",
    ),
}


def guarded_run(folder: Path, guard: str, action: str, **more: Any) -> Any:
    """A run of three steps in which the guard trips."""
    settings, threshold, break_it, _ = STEP_GUARDS[guard]
    setting = {"action": action} | ({} if threshold is None else {"threshold": threshold})
    chosen = {guard.split(",")[0]: setting}
    run = tiny_trainer(folder, **({"guards": chosen, "max_steps": 3, "weight_decay": 0.1} | settings | more))
    break_it(run)
    return run


@pytest.mark.parametrize("guard", STEP_GUARDS)
def test_a_guard_stops_the_run_and_the_work_is_saved(tmp_path: Path, guard: str) -> None:
    run = guarded_run(tmp_path, guard, "stop", save_strategy="steps", save_steps=100)
    with pytest.raises(GuardError, match=STEP_GUARDS[guard][-1]):
        run.train()
    done = run.state.global_step
    newest = newest_checkpoint(tmp_path)
    assert newest == (tmp_path / f"checkpoint-{done}" if done else None)


@pytest.mark.parametrize("guard", STEP_GUARDS)
def test_a_guard_skips_the_step(tmp_path: Path, guard: str, caplog: pytest.LogCaptureFixture) -> None:
    run, seen = guarded_run(tmp_path, guard, "skip"), []
    run.add_callback(AfterStep(lambda state, model: seen.append(weights(model))))
    start = weights(run.model)
    with caplog.at_level(logging.WARNING):
        run.train()
    skipped = values(run, "guards/skipped_steps")
    assert skipped == values(run, f"guards/{guard.split(',')[0]}")
    assert sum(skipped) >= 1
    for before, after, left_out in zip([start, *seen], seen, skipped, strict=False):
        assert same(before, after) == bool(left_out)  # AdamW's momentum and weight decay do nothing either
    assert "(the step is skipped)" in caplog.text
    assert all(math.isfinite(loss) for loss in values(run, "loss"))


@pytest.mark.parametrize("guard", ["entropy_collapse", "kl", "engine_mismatch", "engine_weights"])
def test_a_guard_warns_once_and_changes_nothing(tmp_path: Path, guard: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = guarded_run(tmp_path / "a", guard, "warn")
        run.train()
    assert caplog.text.count(f"guard {guard} (training goes on)") == 1
    other = guarded_run(tmp_path / "b", guard, "warn", guards={"engine_weights": "warn"})
    other.train()
    assert same(weights(run.model), weights(other.model))
    assert values(run, f"guards/{guard}")[-1] == 1.0
    assert "guards/skipped_steps" not in logs(run)[0]


def test_samples_of_older_weights_are_no_mismatch() -> None:
    far = {"sampling/sampling_logp_difference": 1.0}
    for guard in (guards.engine_mismatch, guards.engine_weights):
        stale, fresh = (guard(Seen(1, far | {"sampling/staleness": n}), 0.1) for n in (1, 0))
        assert stale is None
        assert fresh is not None
        assert fresh.tripped


def test_metrics_of_guards_are_there_when_their_inputs_are(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path)
    run.train()
    found = {name: value for name, value in logs(run)[0].items() if name.startswith("guards/")}
    assert found == {"guards/not_finite": 0.0, "guards/entropy_collapse": 0.0}


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_collapse_of_the_reward(
    tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guards, "REWARD_WINDOW", 2)
    run = tiny_trainer(
        tmp_path, reward=worse_and_worse(), max_steps=5, guards={"reward_collapse": action}, save_strategy="epoch"
    )
    message = "mean reward of the last 2 log lines up to step 4 is 0, below 0.5 of its best, 1"
    with caplog.at_level(logging.WARNING):
        if action == "stop":
            with pytest.raises(GuardError, match=message):
                run.train()
            assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        else:
            run.train()
            assert message in caplog.text
    tripped = [line.get("guards/reward_collapse") for line in logs(run)]
    assert tripped == [None, 0.0, 0.0, 1.0] + [1.0] * (action == "warn")


def test_a_run_goes_on_where_a_guard_has_stopped_it(tmp_path: Path) -> None:
    """What was sampled for the step is kept, and counted once."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    with pytest.raises(GuardError):
        tiny_trainer(tmp_path / "a", callbacks=[poison(2)], **options).train()
    resumed, whole = tiny_trainer(tmp_path / "a", **options), tiny_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert same(weights(resumed.model), weights(whole.model))
    assert timeless(logs(resumed)[-1]) == timeless(logs(whole)[-1])


# ---- A full disk


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, steps: set[int]) -> None:
    """Writing a part of these steps' checkpoints fails."""
    original = getattr(checkpoints, name)

    def write(*arguments: Any) -> None:
        folder = next(item for item in arguments if isinstance(item, Path))
        if int(folder.name.split("-")[1]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        original(*arguments)

    monkeypatch.setattr(checkpoints, name, write)


@pytest.mark.parametrize("part", ["save_part", "finish"])
def test_a_run_outlives_a_full_disk(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full_disk(monkeypatch, part, {2})
    run = tiny_trainer(tmp_path, max_steps=3, save_total_limit=2, **SAVING)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-1"]
    assert [damage(path) for path in checkpoints_in(tmp_path)] == [None, None]
    assert run.args.save_total_limit == 2
    said = f"{tmp_path / 'checkpoint-2'} cannot be saved, the disk has "
    assert said in caplog.text
    assert "checkpoints that are kept: checkpoint-1" in caplog.text
    assert [line.get("guards/disk_full") for line in logs(run)] == [None, None, 1]


def test_a_run_whose_last_checkpoint_is_lost_says_so_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, "save_part", {2})
    run = tiny_trainer(tmp_path, max_steps=2, **SAVING)
    with pytest.raises(GuardError, match=r"the run has ended, and its last checkpoint is not saved: .*kept: checkpoint-1"):
        run.train()
    assert run.state.global_step == 2


def test_what_a_full_disk_sounds_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.save({"weights": torch.zeros(10_000)}, "/dev/full")
    assert is_disk_full(caught.value)
    assert is_disk_full(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_other_errors_while_saving_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "save_part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_trainer(tmp_path, **SAVING).train()
    assert not is_finished(tmp_path / "checkpoint-1")


# ---- Memory that runs out


def short_of_memory(run: Any, failing: set[int]) -> None:
    """These calls of the loss, counted from 1, end as on a GPU that is full, after their forward pass."""
    original, calls = run.policy.objective.parts, []

    def parts(*arguments: Any) -> Any:
        calls.append(1)
        made = original(*arguments)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made

    object.__setattr__(run.policy.objective, "parts", parts)


TWO_UPDATES = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
OOM = {
    "packed": {},
    "padded": {"token_layout": "padded"},
    "old log-probs": TWO_UPDATES | {"per_device_train_batch_size": 4},
    "KL": {"beta": 0.1},
}


@pytest.mark.parametrize("settings", OOM.values(), ids=OOM)
@pytest.mark.parametrize("call", [1, 2, 6])
def test_a_step_is_taken_again_with_half_the_tokens(
    tmp_path: Path, settings: dict, call: int, caplog: pytest.LogCaptureFixture
) -> None:
    gradients = []
    for failing in (set(), {call}):
        kept = Gradients()
        options = {"max_steps": 6, "tokens_per_microbatch": 48, "callbacks": [kept], **settings}
        run = tiny_trainer(tmp_path / str(len(failing)), **options)
        short_of_memory(run, failing)
        with caplog.at_level(logging.WARNING):
            run.train()
        gradients.append(kept.steps)
        assert [line.get("guards/out_of_memory", 0.0) for line in logs(run)].count(1.0) == len(failing)
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < 1e-5
    assert run.policy.tokens_per_microbatch == 24
    assert "tokens_per_microbatch=48; from here on it is 24" in caplog.text


def test_log_probs_for_later_are_taken_again_with_half_the_tokens(tmp_path: Path) -> None:
    """Memory runs out in the reference's pass, which comes before any gradient."""
    gradients = []
    for failing in (False, True):
        kept = Gradients()
        run = tiny_trainer(tmp_path / str(failing), max_steps=2, beta=0.1, tokens_per_microbatch=48, callbacks=[kept])
        original, calls = run.policy.ref_logprobs, []

        def short(batch: Any, original: Any = original, calls: list[int] = calls, failing: bool = failing) -> Any:
            calls.append(1)
            if failing and len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(batch)

        run.policy.ref_logprobs = short  # type: ignore[method-assign]
        run.train()
        assert run.policy.tokens_per_microbatch == (24 if failing else 48)
        gradients.append(kept.steps)
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < 1e-5


def test_running_out_of_memory_again_stops_the_run(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, max_steps=3, tokens_per_microbatch=48, **SAVING)
    run.add_callback(AfterStep(lambda state, model: short_of_memory(run, {1, 2})))
    with pytest.raises(GuardError, match=r"out of memory in step 2, tokens_per_microbatch=24, which was halved before"):
        run.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_other_errors_of_a_step_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_trainer(tmp_path)

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(type(run.policy.objective), "parts", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run.train()
