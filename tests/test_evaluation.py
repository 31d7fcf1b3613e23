"""Evaluation: held-out prompts sampled with fixed seeds, under training's metric names, without a trace in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from grpo_hf import GRPOTrainer
from grpo_hf.evaluation.estimates import estimates_of
from grpo_hf.evaluation.record import read_evaluation
from grpo_hf.evaluation.sampling import metric_names
from tests.runs import SAMPLE_NAMES, held_out_trainer, same, timeless, weights
from tests.tiny import even_words

HELD_OUT = [{"prompt": prompt} for prompt in ("w11", "w12 w13", "w14 w15 w16", "w17", "w18")]
OTHERS = [{"prompt": "w21 w22"}]
NAMES = (
    SAMPLE_NAMES | {"loss"} | {f"{name}_{end}" for name in ("reward", "rewards/even_words/mean") for end in ("low", "high")}
)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def right(completion: str) -> float:
    """1 or 0: a verifier that says right or wrong."""
    return float(even_words(completion) % 2 == 0)


def test_metric_names_are_those_of_training(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, HELD_OUT)
    metrics = trainer.evaluate()
    assert set(metrics) - {"epoch"} == {f"eval_{name}" for name in NAMES}
    assert -metrics["eval_loss"] == metrics["eval_reward"] == metrics["eval_rewards/even_words/mean"] > 0
    assert trainer.state.log_history[-1]["eval_reward"] == metrics["eval_reward"]
    assert set(trainer.evaluate(metric_key_prefix="test")) - {"epoch"} == {f"test_{name}" for name in NAMES}
    assert set(metric_names(["even_words"], 4)) == NAMES | {
        f"rewards/even_words/{name}@{k}" for name in ("pass", "maj") for k in (2, 4)
    }


def test_several_data_sets_have_a_prefix_each(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, {"easy": HELD_OUT, "hard": OTHERS})
    metrics = trainer.evaluate()
    assert set(metrics) - {"epoch"} == {f"eval_{part}_{name}" for part in ("easy", "hard") for name in NAMES}
    alone = held_out_trainer(tmp_path, OTHERS).evaluate()
    assert metrics["eval_hard_reward"] == alone["eval_reward"]


def test_a_data_set_may_have_any_name(tmp_path: Path) -> None:
    held_out_trainer(tmp_path, {"math/easy": HELD_OUT, "gsm8k-test": OTHERS}, save_rollouts=True).evaluate()
    assert {name: len(found) for name, found in read_evaluation(tmp_path).items()} == {"math/easy": 5, "gsm8k-test": 1}


def test_votes_on_the_disk_are_those_that_were_measured(tmp_path: Path) -> None:
    """A sample without an answer votes with its text."""

    def says(completions: list[str], log_extra: Any, **columns: object) -> list[float]:
        log_extra("answer", [None if right(item) else "wrong" for item in completions])
        return [right(item) for item in completions]

    metrics = held_out_trainer(tmp_path, HELD_OUT, reward=says, save_rollouts=True).evaluate()
    on_disk = estimates_of(read_evaluation(tmp_path)["eval"])
    assert metrics["eval_rewards/says/maj@4"] == on_disk["rewards/says/maj@4"].value


def test_a_data_set_can_be_given_to_evaluate(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, None)
    assert trainer.evaluate(HELD_OUT) == held_out_trainer(tmp_path, HELD_OUT).evaluate()
    with pytest.raises(ValueError, match="evaluation needs an eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval_dataset has no column 'prompt', only \\['text'\\]"):
        trainer.evaluate([{"text": "w1"}])


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_it_is_repeatable(tmp_path: Path, temperature: float) -> None:
    """Seeds depend on the row alone, not on the batches or what was sampled before."""
    trainer = held_out_trainer(tmp_path, HELD_OUT, eval_temperature=temperature)
    first = trainer.evaluate()
    trainer.stream.make(0, version=0)
    assert trainer.evaluate() == first
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate() == first
    other_seed = held_out_trainer(tmp_path, HELD_OUT, eval_temperature=temperature, seed=1).evaluate()
    assert (other_seed["eval_reward"] == first["eval_reward"]) == (temperature == 0)


def test_bf16_is_on_before_training_too(tmp_path: Path) -> None:
    """The same weights give the same numbers, whenever they are measured."""
    held_out = [{"prompt": f"w{number} w{number + 1}"} for number in range(40)]
    trainer = held_out_trainer(tmp_path, held_out, bf16=True, learning_rate=0.0, eval_temperature=0.0)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() | {"epoch": 0} == before | {"epoch": 0}


def test_greedy_samples_of_a_prompt_are_all_the_same(tmp_path: Path) -> None:
    metrics = held_out_trainer(tmp_path, HELD_OUT, eval_temperature=0.0).evaluate()
    assert metrics["eval_frac_reward_zero_std"] == 1.0


def test_the_number_of_samples(tmp_path: Path) -> None:
    scored: list[int] = []

    def count(completions: list[str], **kwargs: object) -> list[float]:
        scored.append(len(completions))
        return [0.0] * len(completions)

    settings = {"reward": {"name": count, "in_process": True}, "per_device_eval_batch_size": 8}
    held_out_trainer(tmp_path, HELD_OUT, **settings).evaluate()
    assert scored == [8, 8, 4], "four a prompt, as in training, in batches of completions"
    scored.clear()
    held_out_trainer(tmp_path, HELD_OUT, num_generations_eval=1, **settings).evaluate()
    assert scored == [5]


def test_pass_at_k_of_right_or_wrong(tmp_path: Path) -> None:
    metrics = held_out_trainer(tmp_path, HELD_OUT, reward=[right, even_words]).evaluate()
    mean, some = metrics["eval_rewards/right/mean"], metrics["eval_rewards/right/pass@4"]
    assert 0 < mean < some <= 1
    assert some * 5 == pytest.approx(round(some * 5)), "a share of five prompts"
    assert not any("even_words/pass" in name for name in metrics), "it is no share"
    once = held_out_trainer(tmp_path, HELD_OUT, reward=right, num_generations_eval=1).evaluate()
    assert not any("pass@" in name for name in once), "pass@1 is the mean"


def test_it_leaves_no_trace_in_training(tmp_path: Path) -> None:
    def run(**settings: object) -> GRPOTrainer:
        trainer = held_out_trainer(tmp_path, HELD_OUT, **settings)
        trainer.train()
        return trainer

    plain, evaluated = run(), run(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert same(weights(plain.model), weights(evaluated.model))
    assert evaluated.model.training == plain.model.training
    evaluations = [entry["step"] for entry in evaluated.state.log_history if "eval_reward" in entry]
    assert evaluations == [0, 1, 2, 3]
    for one, other in zip(*[[e for e in t.state.log_history if "loss" in e] for t in (plain, evaluated)], strict=True):
        assert {name: other[name] for name in timeless(one)} == timeless(one)
        assert other["time/evaluate"] > 0


def test_the_best_checkpoint_by_held_out_reward(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, HELD_OUT, load_best_model_at_end=True, **BEST)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("reward", True)
    trainer.train()
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert trainer.state.best_metric == max(rewards)
    assert trainer.evaluate()["eval_reward"] == max(rewards)


@pytest.mark.parametrize("name", ["loss", "eval_rewards/even_words/mean", "eval_loss"])
def test_a_metric_that_evaluation_has_can_choose_the_checkpoint(tmp_path: Path, name: str) -> None:
    trainer = held_out_trainer(tmp_path, HELD_OUT, load_best_model_at_end=True, metric_for_best_model=name, **BEST)
    trainer.train()
    best = min if name.endswith("loss") else max
    key = f"eval_{name.removeprefix('eval_')}"
    assert trainer.state.best_metric == best(entry[key] for entry in trainer.state.log_history if key in entry)


def test_a_metric_that_evaluation_has_not_is_refused_at_the_start(tmp_path: Path) -> None:
    for held_out, name, message in (
        (HELD_OUT, "rewards/even_word/mean", r"none that evaluation has: loss, .*\(nearest: rewards/even_words/mean"),
        ({"easy": HELD_OUT, "hard": OTHERS}, "reward", r"none that evaluation has: easy_loss, .*hard_reward"),
        (None, "reward", "load_best_model_at_end=True needs an eval_dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out_trainer(tmp_path, held_out, load_best_model_at_end=True, metric_for_best_model=name, **BEST)


def test_the_baseline_is_measured_once(tmp_path: Path) -> None:
    """eval_on_start is of the run's start, not of every time that it goes on."""
    settings = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings["save_rollouts"] = True
    held_out_trainer(tmp_path, HELD_OUT, max_steps=4, **settings).train()
    steps = [line["step"] for line in lines_of(tmp_path) if "eval_reward" in line]
    assert steps == [0, 2, 4]
    shutil.rmtree(tmp_path / "checkpoint-4")
    held_out_trainer(tmp_path, HELD_OUT, max_steps=4, **settings).train(resume_from_checkpoint="auto")
    assert [line["step"] for line in lines_of(tmp_path) if "eval_reward" in line] == steps
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == [f"step-00000{n}" for n in (0, 2, 4)]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_no_rewards_of_their_own_are_those_of_training(tmp_path: Path) -> None:
    assert "eval_rewards/even_words/mean" in held_out_trainer(tmp_path, HELD_OUT, eval_reward_funcs=[]).evaluate()


def test_held_out_rows_may_have_rewards_of_their_own(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, HELD_OUT, eval_reward_funcs=[right], num_generations_eval=4)
    metrics = trainer.evaluate()
    assert "eval_rewards/right/mean" in metrics and "eval_rewards/right/pass@4" in metrics
    assert not any("even_words" in name for name in metrics)
    assert (
        metrics["eval_rewards/right/mean_low"]
        <= metrics["eval_rewards/right/mean"]
        <= metrics["eval_rewards/right/mean_high"]
    )
    trainer.train()
    assert any("rewards/even_words/mean" in line for line in lines_of(tmp_path)), "training's are as they were"
    with pytest.raises(ValueError, match="gold"):
        held_out_trainer(tmp_path, HELD_OUT, eval_reward_funcs=needs_gold)


def needs_gold(completion: str, gold: str) -> float:
    """Asks for a column."""
    return float(completion == gold)


def test_a_streamed_data_set_is_read_into_memory(tmp_path: Path) -> None:
    streamed = Dataset.from_list(HELD_OUT).to_iterable_dataset()
    trainer = held_out_trainer(tmp_path, streamed)
    assert trainer.evaluate() == held_out_trainer(tmp_path, HELD_OUT).evaluate()
    assert trainer.eval_dataset is streamed, "as it was given"


def test_a_verifier_that_never_applies(tmp_path: Path) -> None:
    def never(completion: str) -> None:
        return None

    metrics = held_out_trainer(tmp_path, HELD_OUT, reward=never).evaluate()
    assert not any("reward" in name for name in metrics if "frac" not in name and "/outcomes/" not in name)
    assert metrics["eval_completions/mean_length"] > 0
