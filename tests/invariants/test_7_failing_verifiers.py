"""Invariant 7: a verifier that fails is counted under its own name and never becomes a silent wrong answer; a run whose
verifiers mostly fail stops with an error."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from grpo_hf.rewards import BadGoldError, RewardFaultError, parses_gold
from tests.runs import logs
from tests.tiny import PROMPTS, even_words, tiny_model, tiny_trainer

DEEDS = {
    "timeout": "hang",
    "crash": "die",
    "error": "raise",
    "bad_gold": "unparsable",
    "no_answer": "none",
    "scored": "good",
}


def deed(deed: str) -> str:
    if deed == "unparsable":
        raise BadGoldError("this answer cannot be read")
    return deed


@parses_gold(deed)
def failing(completion: str, deed: str) -> float:
    """What the row says, and a score that tells completions apart."""
    from grpo_hf.rewards import NO_ANSWER

    if deed == "hang":
        while True:
            pass
    if deed == "die":
        os._exit(0)
    if deed == "raise":
        raise KeyError("as planned")
    return NO_ANSWER if deed == "none" else float(len(completion))


def dataset() -> list[dict[str, str]]:
    return [row | {"deed": deed} for row, deed in zip(PROMPTS, DEEDS.values(), strict=True)]


def test_every_failure_is_counted_under_its_own_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"reward_timeout": 0.5, "reward_max_fault_share": 1.0, "bad_gold_rows": "keep"}
    sizes: dict[str, Any] = {"per_device_train_batch_size": 24, "shuffle_dataset": False, "save_rollouts": True}
    trainer = tiny_trainer(tmp_path, reward=[failing, even_words], dataset=dataset(), **sizes, **settings)
    trainer.train()
    (entry,) = logs(trainer)
    shares = {
        name.rpartition("/")[2]: value for name, value in entry.items() if name.startswith("rewards/failing/outcomes/")
    }
    assert shares == dict.fromkeys(set(DEEDS) - {"scored"}, pytest.approx(1 / 6))
    assert not any(entry[f"rewards/even_words/outcomes/{outcome}"] for outcome in shares)

    (file,) = (tmp_path / "rollouts").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [row["outcomes/failing"] for row in rows] == [outcome for outcome in DEEDS for _ in range(4)]
    for row in rows:
        left_out = row["outcomes/failing"] == "bad_gold"
        assert math.isnan(row["reward"]) == left_out
        assert not left_out or row["advantage"] == 0.0
    completions = [item for group in trainer.rollout.groups for item in group.completions]
    (update,) = trainer.rollout.updates
    assert update.denominators.sequences == 20
    assert update.denominators.tokens == sum(len(item.ids) for item in completions if not math.isnan(item.reward))


def test_a_verifier_that_raises_on_1_of_100_calls_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    calls = 0

    def sometimes(completion: str) -> float:
        nonlocal calls
        calls += 1
        if calls % 100 == 50:
            raise KeyError("as planned")
        return even_words(completion)

    rows = [{"prompt": f"w{number} w{number + 1}"} for number in range(25)]
    trainer = tiny_trainer(
        tmp_path,
        reward={"name": sometimes, "in_process": True},
        dataset=rows,
        per_device_train_batch_size=100,
        max_steps=2,
    )
    trainer.train()
    assert [entry["rewards/sometimes/outcomes/error"] for entry in logs(trainer)] == [0.01, 0.01]
    assert trainer.state.global_step == 2


def always_raises(completion: str) -> float:
    """The worst of verifiers."""
    raise KeyError("as planned")


def never_ends(completion: str) -> float:
    """The second worst."""
    while True:
        pass


def test_a_verifier_that_always_raises_stops_the_run_at_the_first_rollout(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, reward=always_raises, max_steps=5, save_rollouts=True)
    with pytest.raises(RewardFaultError) as error:
        trainer.train()
    text = str(error.value)
    assert "'always_raises' was called 8 times (8 error): 100% of them say nothing" in text
    assert "Traceback" in text and "always_raises" in text and "KeyError: 'as planned'" in text and "on row " in text
    assert trainer.state.global_step == 0
    assert len(list((tmp_path / "rollouts").iterdir())) == 1, "what was sampled can be looked at"


def test_so_does_one_that_never_ends_also_in_evaluation(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 2, "reward_timeout": 0.3}
    trainer = tiny_trainer(tmp_path, reward=never_ends, **sizes)
    for run in (trainer.train, lambda: trainer.evaluate(PROMPTS[:1])):
        with pytest.raises(RewardFaultError, match=r"'never_ends' was called 2 times \(2 timeout\)") as error:
            run()
        assert "ran past its deadline of 0.3 s" in str(error.value)


def test_unreadable_answers_stop_the_run_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path / "without_weights")
    rows = [*dataset(), dataset()[3]]
    options: dict[str, Any] = {"reward": [failing, even_words], "dataset": rows}
    with pytest.raises(ValueError, match="train_dataset: the answers of 2 of 7 rows cannot be read") as error:
        tiny_trainer(tmp_path, model=str(tmp_path / "without_weights"), **options)
    assert "- row 3, failing: " in str(error.value) and "this answer cannot be read" in str(error.value)
    assert "bad_gold_rows='drop'" in str(error.value)
    trainer = tiny_trainer(tmp_path, bad_gold_rows="drop", **options)
    assert [prompt.index for prompt in trainer.prompts] == [0, 1, 2, 4, 5]
