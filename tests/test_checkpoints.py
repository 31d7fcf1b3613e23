"""Whole and damaged checkpoints, and whether a run that resumes is the one that was saved."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_hf.training.checkpoints import MANIFEST, damage, finish, newest_checkpoint, read_manifest, resume_point, run_of
from grpo_hf.training.plain import CLASS, from_plain, to_plain
from grpo_hf.training.same_run import FREE, PROCESSES, SAID, Changes, check_same_run
from tests.runs import StopAfter, logs, timeless
from tests.tiny import tiny_trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, max_steps=4, save_strategy="steps", save_steps=1).train()
    return folder


def damaged(saved: Path, folder: Path, harm: Any) -> Path:
    """A copy whose newest checkpoint has come to harm."""
    subprocess.run(["cp", "-r", str(saved), str(folder)], check=True)
    harm(folder / "checkpoint-4")
    return folder


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


HARMS = {
    "never finished": (lambda checkpoint: (checkpoint / MANIFEST).unlink(), "never finished"),
    "a bit": (flip_a_bit, "model.safetensors has"),
    "cut off": (lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b"half"), "optimizer.pt has 4 bytes"),
    "missing": (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is missing"),
}


@pytest.mark.parametrize(("harm", "problem"), HARMS.values(), ids=HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    saved: Path, tmp_path: Path, harm: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged(saved, tmp_path / "run", harm)
    assert damage(folder / "checkpoint-3") is None
    for wanted in (True, "auto"):
        assert resume_point(wanted, folder) == folder / "checkpoint-3"
    assert "checkpoint-4 is not used: " in caplog.text and problem in caplog.text
    with pytest.raises(ValueError, match=f"not a whole checkpoint.*{problem}.*newest whole one beside it is .*checkpoint-3"):
        resume_point(str(folder / "checkpoint-4"), folder)


FILES = [
    *("config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "rollout-0.pt"),
    *("scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin", MANIFEST),
]
LOSSES: dict[str, Any] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def test_these_are_the_files_of_a_checkpoint(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoint-4").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", FILES)
def test_a_power_loss_at_any_file(
    saved: Path, tmp_path: Path, name: str, lose: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What was not on the disk is lost or torn."""
    folder = damaged(saved, tmp_path / "run", lambda checkpoint: lose(checkpoint / name))
    assert resume_point("auto", folder) == folder / "checkpoint-3"
    assert f"checkpoint-4 is not used: {'it' if name == MANIFEST else name}" in caplog.text


BAD_MANIFESTS = {
    "{}": "is no list of its files",
    "[]": "is no list of its files",
    '{"run": {}, "files": {}}': "form 1, by another version",
    '{"form": 2, "run": {}, "files": {}}': "does not list rollout-0.pt",
    "\0" * 90: "cannot be read",
}


@pytest.mark.parametrize(("text", "said"), BAD_MANIFESTS.items(), ids=range(len(BAD_MANIFESTS)))
def test_a_manifest_that_is_none(saved: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = damaged(saved, tmp_path / "run", lambda checkpoint: (checkpoint / MANIFEST).write_text(text))
    assert said in str(damage(folder / "checkpoint-4"))
    assert resume_point("auto", folder) == folder / "checkpoint-3"


def test_files_are_on_the_disk_before_the_manifest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the log lines so far, which the checkpoint does not hold."""
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (synced.append(f"-> {Path(paths[1]).name}"), replace(*paths)))
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_rollouts=True).train()
    counts = synced.index(f"-> {MANIFEST}")
    needed = {*FILES, "metrics.jsonl", "rollout-000000-0.partial", "checkpoint-1", tmp_path.name, f"{MANIFEST}.partial"}
    assert needed - {MANIFEST} <= set(synced[:counts])
    assert "checkpoint-1" in synced[counts:]


def test_a_checkpoint_of_weights_alone_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    tiny_trainer(tmp_path, **options).train()
    for wanted in ("auto", True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"checkpoint-\d holds weights without optimizer.*a new one from its weights"):
            tiny_trainer(tmp_path, **options).train(resume_from_checkpoint=wanted)


def test_a_checkpoint_cannot_make_the_trainer_run_its_code(saved: Path, tmp_path: Path) -> None:
    """Nor name classes of other packages; all of its own files are tensors and plain data."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was here"),)

    for name in ("rollout-0.pt", "optimizer.pt", "scheduler.pt"):
        torch.load(saved / "checkpoint-4" / name, weights_only=True)
    folder = damaged(saved, tmp_path / "run", lambda checkpoint: torch.save(Evil(), checkpoint / "rollout-0.pt"))
    finish(folder / "checkpoint-4", read_manifest(folder / "checkpoint-4"))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        tiny_trainer(folder, max_steps=5).train(resume_from_checkpoint="auto")
    assert not (tmp_path / "was here").exists()
    with pytest.raises(ValueError, match="'subprocess:Popen', which is no dataclass of this package"):
        from_plain({CLASS: "subprocess:Popen"}, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tensors and plain data, not .*Evil: <"):
        to_plain([Evil()])


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert resume_point("auto", tmp_path) is None
    with pytest.raises(ValueError, match="no whole checkpoint; 'auto' starts anew"):
        resume_point(True, tmp_path)


def test_the_old_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one, there is a whole one at every moment."""
    from grpo_hf.training import checkpoints as module

    whole: list[list[str]] = []
    finish = module.finish

    def observed(checkpoint: Path, run: dict) -> None:
        whole.append(sorted(path.name for path in tmp_path.glob("checkpoint-*") if damage(path) is None))
        finish(checkpoint, run)

    monkeypatch.setattr(module, "finish", observed)
    tiny_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert whole == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


CHANGES: dict[str, dict[str, Any]] = {
    "group size": {"num_generations": 2},
    "seed": {"seed": 7},
    "loss": {"loss_type": "grpo"},
    "data": {"dataset": [{"prompt": f"w{number}"} for number in range(6)]},
    "verifier": {"reward": lambda completion: 0.5},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_run_is_refused_before_it_starts(saved: Path, change: dict[str, Any]) -> None:
    trainer = tiny_trainer(saved, max_steps=4, **change)
    with pytest.raises(ValueError, match=r"is of another run: .* -> .*Set these as they were"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert trainer.state.global_step == 0


def test_another_number_of_processes_is_said_and_under_deepspeed_refused(saved: Path) -> None:
    run = run_of(saved / "checkpoint-4")
    changes = check_same_run(run | {PROCESSES: 2}, run, "it")
    assert "number of processes 2 -> 1. Sums over processes" in changes.said and changes.sampling
    with pytest.raises(ValueError, match="another run: under DeepSpeed number of processes 2 -> 1"):
        check_same_run(run | {PROCESSES: 2, "DeepSpeed": True}, run | {"DeepSpeed": True}, "it")


def test_what_is_changed_on_purpose_is_said(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=5, tokens_per_microbatch=64, logging_steps=2, learning_rate=5e-4)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert "changed settings: learning_rate 0.001 -> 0.0005; max_steps 4 -> 5" in caplog.text
    assert trainer.state.global_step == 5


def test_every_other_setting_is_compared(saved: Path) -> None:
    run = run_of(saved / "checkpoint-4")
    assert not set(run) & set(FREE)
    assert check_same_run(run, dict(run), "it") == Changes()
    for name in run:
        if name in SAID:
            assert name in check_same_run(run, run | {name: "other"}, "it").said
        else:
            with pytest.raises(ValueError, match=f"another run: {name} "):
                check_same_run(run, run | {name: "other"}, "it")


def test_lines_that_a_killed_run_left_behind_its_checkpoint_are_dropped(saved: Path, tmp_path: Path) -> None:
    """Also a half-written one; and a resume inside a logging interval goes on collecting where the checkpoint was."""
    expected = tiny_trainer(tmp_path / "whole", max_steps=6, logging_steps=3, learning_rate=0.01)
    expected.train()
    options = {"max_steps": 6, "logging_steps": 3, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 4}
    tiny_trainer(tmp_path / "run", **options, callbacks=[StopAfter(5)]).train()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward": 9}\n{"step": 6, "rew')
    trainer = tiny_trainer(tmp_path / "run", **options)
    trainer.train(resume_from_checkpoint="auto")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 6]  # the last is Trainer's summary
    for line, wanted in zip(logs(trainer), logs(expected), strict=True):
        assert timeless(line) == timeless(wanted)


def test_an_evaluation_before_a_resume_leaves_the_earlier_metrics_where_they_were(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.evaluate([{"prompt": "w1 w2"}])
    trainer.train(resume_from_checkpoint="auto")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert not list(tmp_path.glob("earlier-*"))


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.1}, {"lora": True}],
    ids=["all weights, KL, two updates, two passes", "LoRA"],
)
def test_killed_at_random_moments_it_is_the_same_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    """SIGKILL while sampling, scoring, training and saving; metrics, samples and weights to the last bit (invariant 6)."""
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path), "--kills", "5", "--settings"]
    command.append(json.dumps({"max_steps": 16} | settings))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
