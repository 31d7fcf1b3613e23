"""What a run leaves and shows: metrics, rollouts, checkpoints, the report, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import TrainerCallback

from grpo_hf import GRPOTrainer
from tests.runs import SAMPLE_NAMES, logs, values
from tests.tiny import even_words, tiny_trainer

TRL_NAMES = SAMPLE_NAMES | {
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "num_tokens",
}
OUR_NAMES = {
    "frac_zero_signal_groups",
    "guards/entropy_collapse",
    "guards/not_finite",
    "rewards/even_words/seconds/mean",
    "rewards/even_words/seconds/max",
    "tokens/sampled",
    "tokens/forwarded",
    "tokens/padded_equivalent",
    "tokens/max_over_mean",
    "tokens_per_second",
    "time/sync",
    "time/generate",
    "time/score",
    "time/logprobs",
    "time/forward_backward",
    "time/optimizer",
    "time/other",
    "perf/tflops",
    "perf/peak_tflops",
    "perf/mfu",
}
TRAINER_NAMES = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


# ---- Metrics


def test_the_names_of_the_metrics(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    for entry in logs(trainer):
        assert set(entry) == TRL_NAMES | OUR_NAMES | TRAINER_NAMES
        assert next(iter(entry)) == "reward"


@pytest.mark.parametrize(
    ("settings", "more", "fewer"),
    [
        ({"beta": 0.1}, {"kl", "guards/kl"}, set()),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"cispo_clip_ratio"}, {n for n in TRL_NAMES if "clip_ratio/" in n}),
        ({"loss_type": "reinforce"}, set(), {n for n in TRL_NAMES if "clip_ratio/" in n}),
        ({"entropy_coef": 0.1}, {"policy_loss", "entropy_coef"}, set()),
        (
            {"loss_type": "vespo", "off_policy_mask_threshold": 0.5},
            {"vespo/phi_seq_mean", "off_policy_mask_ratio"},
            {n for n in TRL_NAMES if "clip_ratio/" in n},
        ),
    ],
    ids=["beta", "cispo", "reinforce", "entropy bonus", "vespo"],
)
def test_names_that_settings_add_or_take_away(tmp_path: Path, settings: dict, more: set, fewer: set) -> None:
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    assert set(logs(trainer)[0]) == (TRL_NAMES | OUR_NAMES | TRAINER_NAMES | more) - fewer


def test_the_values_of_the_metrics(tmp_path: Path) -> None:
    """Against the rollout itself."""
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=16)
    trainer.train()
    (entry,), groups = logs(trainer), trainer.rollout.groups
    completions = [item for group in groups for item in group.completions]
    lengths = [len(item.ids) for item in completions]
    rewards = [item.reward for item in completions]
    assert len(completions) == 16
    assert entry["reward"] == entry["rewards/even_words/mean"] == pytest.approx(sum(rewards) / 16)
    assert entry["completions/mean_length"] == sum(lengths) / 16
    assert (entry["completions/min_length"], entry["completions/max_length"]) == (min(lengths), max(lengths))
    assert entry["completions/clipped_ratio"] == sum(item.truncated for item in completions) / 16
    ended = [len(item.ids) for item in completions if not item.truncated]
    assert entry["completions/mean_terminated_length"] == pytest.approx(sum(ended) / len(ended))
    assert entry["tokens/sampled"] == sum(lengths)
    prompts = [len(group.prompt.ids) for group in groups]
    assert entry["num_tokens"] == sum(lengths) + 4 * sum(prompts)
    assert entry["tokens/padded_equivalent"] == 16 * (max(prompts) + max(lengths))
    batches = [batch for update in trainer.rollout.updates for batch in trainer.policy.microbatches(update)]
    assert entry["tokens/forwarded"] == sum(batch.num_tokens for batch in batches)
    assert entry["tokens/forwarded"] <= sum(prompts) + sum(lengths) - 16 < entry["tokens/padded_equivalent"]
    times = sum(value for name, value in entry.items() if name.startswith("time/"))
    assert entry["tokens_per_second"] == pytest.approx(sum(lengths) / times)


@pytest.mark.parametrize(("logging_steps", "lines"), [(10, [3]), (2, [2, 3]), (3, [3])])
def test_the_last_steps_are_logged(tmp_path: Path, logging_steps: int, lines: list[int]) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3, logging_steps=logging_steps, write_report=True)
    trainer.train()
    assert [line["step"] for line in logs(trainer)] == lines
    assert (tmp_path / "report.html").is_file()
    each = tiny_trainer(tmp_path, max_steps=3)
    each.train()
    rest = values(each, "reward")[lines[-2] if len(lines) > 1 else 0 :]
    assert logs(trainer)[-1]["reward"] == pytest.approx(sum(rest) / len(rest))


def test_a_log_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    def run(logging_steps: int) -> GRPOTrainer:
        trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=logging_steps)
        trainer.train()
        return trainer

    each, (two, four) = logs(run(1)), logs(run(2))
    for name in ("reward", "completions/mean_length", "tokens/sampled", "tokens/forwarded", "frac_reward_zero_std"):
        assert [two[name], four[name]] == [
            pytest.approx((first[name] + second[name]) / 2) for first, second in (each[:2], each[2:])
        ]
    assert two["completions/max_length"] == max(entry["completions/max_length"] for entry in each[:2])
    assert four["num_tokens"] == each[3]["num_tokens"]


def test_zero_signal_groups_are_counted_and_not_forwarded(tmp_path: Path) -> None:
    def only_long_prompts(completion: str, prompt: str) -> float:
        return even_words(completion) if len(prompt) > 2 else 1.0

    prompts = [{"prompt": "w1"}, {"prompt": "w1 w2 w3"}]
    trainer = tiny_trainer(tmp_path, reward=only_long_prompts, dataset=prompts)
    trainer.train()
    assert values(trainer, "frac_zero_signal_groups") == values(trainer, "frac_reward_zero_std") == [0.5]
    trained = {group.prompt.raw: sum(item.advantage != 0 for item in group.completions) for group in groups_of(trainer)}
    assert trained["w1"] == 0 < trained["w1 w2 w3"]
    assert len(trainer.rollout.updates[0].samples) == trained["w1 w2 w3"]


def groups_of(trainer: GRPOTrainer) -> list:
    """The last rollout's groups."""
    return trainer.rollout.groups


def test_metrics_jsonl_holds_every_log_line(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": entry["step"], **entry} for entry in trainer.state.log_history]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert "train_runtime" in lines[-1]


# ---- Rollouts


def test_rollouts_are_saved_as_parquet(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=4, num_iterations=2, save_rollouts=True, reward=[even_words, len_of_text])
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert files == ["rollout-000000-0.parquet", "rollout-000001-0.parquet"]
    first, last = (pq.read_table(tmp_path / "rollouts" / name).to_pylist() for name in files)
    assert list(first[0]) == [
        *("step", "rollout", "weights", "process", "row", "group", "columns", "prompt", "completion", "length", "truncated"),
        *("messages", "turns", "rewards/even_words", "rewards/len_of_text", "outcomes/even_words", "outcomes/len_of_text"),
        *("reward", "advantage", "ids", "is_sampled", "logprobs"),
    ]
    assert {row["step"] for row in first} == {1}
    assert {row["step"] for row in last} == {3}, "the step that it is first trained on"
    expected = [
        {"prompt": group.prompt.raw, "completion": item.text, "length": len(item.ids), "advantage": item.advantage}
        | {"row": group.prompt.index, "ids": item.ids, "logprobs": item.rollout_logprobs}
        for group in groups_of(trainer)
        for item in group.completions
    ]
    assert [{name: row[name] for name in expected[0]} for row in last] == expected
    assert all(row["reward"] == row["rewards/even_words"] + row["rewards/len_of_text"] for row in first)


def test_what_verifiers_log_beside_completions_is_saved_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(completion: str, log_extra: Callable) -> float:
        log_extra("first", completion.split()[:1])
        log_extra("mixed", 1 if completion.startswith("w1") else "text")
        return even_words(completion)

    def batch(completions: list[str], log_extra: Callable, **kwargs: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [0.0] * len(completions)

    trainer = tiny_trainer(tmp_path, save_rollouts=True, log_completions=True, reward=[one, batch])
    trainer.train()
    (file,) = (tmp_path / "rollouts").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [row["extra/length"] for row in rows] == [len(row["completion"]) for row in rows]
    assert [row["extra/first"] for row in rows] == [row["completion"].split()[:1] for row in rows]
    assert {row["extra/mixed"] for row in rows} <= {"1", "text"}, "as text, since it is not of one kind"
    assert f"length: {rows[0]['extra/length']}\n" in capsys.readouterr().out


def len_of_text(completion: str) -> float:
    return float(len(completion))


def test_rollouts_need_not_be_saved(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, save_rollouts=False).train()
    assert not (tmp_path / "rollouts").exists()


def test_completions_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, log_completions=True, num_completions_to_print=1)
    trainer.train()
    item = groups_of(trainer)[0].completions[0]
    assert f"--- step 1: reward {item.reward:.3g} (even_words {item.reward:.3g}), advantage" in capsys.readouterr().out


# ---- The folder


def test_a_new_run_sets_an_earlier_one_aside(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        tiny_trainer(tmp_path, max_steps=steps, save_rollouts=True).train()
        (tmp_path / "report.html").write_text(f"{steps} steps")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".lock", "earlier-1", "earlier-2", "metrics.jsonl", "report.html", "rollouts", "starts.jsonl")
    ]
    for folder, steps in ((tmp_path / "earlier-1", 1), (tmp_path / "earlier-2", 2), (tmp_path, 3)):
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == steps + 1
        assert len(list((folder / "rollouts").iterdir())) == steps
        assert (folder / "report.html").read_text() == f"{steps} steps"


def test_a_resumed_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_rollouts": True}
    tiny_trainer(tmp_path, max_steps=2, **options).train()
    tiny_trainer(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=True)
    assert not (tmp_path / "earlier-1").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    assert len(list((tmp_path / "rollouts").iterdir())) == 4


def test_the_report_is_written_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, max_steps=2, write_report=True, save_rollouts=True).train()
    assert capsys.readouterr().err.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert "even_words" in (tmp_path / "report.html").read_text()


def test_a_run_in_which_no_verifier_applied_has_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(completion: str) -> None:
        return None

    tiny_trainer(tmp_path, write_report=True, save_rollouts=True, reward=never).train()
    assert (tmp_path / "report.html").is_file()


def test_the_progress_bar_shows_reward_signal_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, max_steps=2, disable_tqdm=False).train()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert all(f"{name}=" in shown for name in ("reward", "zero_signal_groups", "tokens_per_second"))


def test_users_callbacks_see_every_metric(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class See(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    tiny_trainer(tmp_path, callbacks=[See()]).train()
    assert seen[0].keys() >= TRL_NAMES | OUR_NAMES


def test_verifiers_are_handed_the_running_trainers_state(tmp_path: Path) -> None:
    """Of the run that is going on, not of the trainer before it; in a worker as here."""

    def reward(completion: str, trainer_state: object, log_metric: Callable) -> float:
        log_metric("finished_steps", trainer_state.global_step)  # type: ignore[attr-defined]
        return even_words(completion)

    for in_process in (False, True):
        trainer = tiny_trainer(tmp_path, reward={"name": reward, "in_process": in_process}, max_steps=2)
        trainer.train()
        assert values(trainer, "finished_steps") == [0, 1]
