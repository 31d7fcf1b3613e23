"""What a user can get wrong: said before any weights are loaded, with the numbers and the fix; and what stops a run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import grpo_hf.training.trainer
from grpo_hf import GRPOTrainer
from grpo_hf.algorithm.correction import CORRECTION_MODES, corrected
from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.rewards import RewardFaultError
from grpo_hf.training.guards import GuardError
from tests.runs import AfterStep, held_out_trainer, logs, lora, same, values, weights
from tests.tiny import PROMPTS, Gradients, even_words, relative_error, tiny_model, tiny_tokenizer, tiny_trainer


def uses_answer(completion: str, answer: str) -> float:
    return float(completion == answer)


def lock_holder() -> Callable[..., Any]:
    lock = threading.Lock()

    def holds_a_lock(completion: str) -> float:
        with lock:
            return 1.0

    return holds_a_lock


holds_a_lock = lock_holder()


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = name
    return function


def with_added_token(*, pad: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"} if pad else {"additional_special_tokens": ["<new>"]})
    return tokenizer


# ---- Before any weights are loaded


@pytest.fixture
def model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A saved model, whose weights nobody may load."""

    def load_model(*args: Any, **options: Any) -> None:
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(grpo_hf.training.trainer, "load_model", load_model)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


LONG = {"prompt": " ".join(["w1"] * 60)}
NO_WORDS = {"prompt": ""}

BAD = {
    "no rows": ({"train_dataset": []}, "train_dataset is empty: give at least one row with a prompt"),
    "an empty table": ({"train_dataset": Dataset.from_dict({"prompt": []})}, "train_dataset is empty"),
    "no dataset": ({"train_dataset": None}, "`train_dataset` is required"),
    "all splits at once": (
        {"train_dataset": DatasetDict(train=Dataset.from_list(PROMPTS), test=Dataset.from_list(PROMPTS))},
        r"train_dataset holds several data sets \(train, test\); give one: train_dataset\['train'\]",
    ),
    "no prompt column": (
        {"train_dataset": [{"prompts": "w1", "answer": "w2"}]},
        r"train_dataset has no column 'prompt', only \['prompts', 'answer'\]; use .*rename_column\('prompts', 'prompt'\)",
    ),
    "a prompt without tokens": ({"train_dataset": [*PROMPTS, NO_WORDS]}, r"1 prompts have no tokens \(rows 6\)"),
    "a prompt of another type": ({"train_dataset": [{"prompt": 3}] * 2}, "a string or a list of chat messages, got int: 3"),
    "chat prompts without a template": (
        {"train_dataset": [{"prompt": [{"role": "user", "content": "w1"}]}] * 2},
        "tokenizer.chat_template is not set",
    ),
    "overlong prompts": (
        {"train_dataset": [*PROMPTS, LONG, LONG]},
        r"2 of 8 prompts are longer than 56 tokens, which is the model's context less max_completion_length \(rows 6, 7; "
        "the longest has 60",
    ),
    "nothing but overlong prompts": (
        {"train_dataset": [LONG] * 2, "overlong_prompts": "drop"},
        "2 of 2 prompts are longer than 56 tokens",
    ),
    "no room for a prompt": (
        {"max_completion_length": 64},
        "max_completion_length=64 leaves no room for a prompt in the model's context of 64 positions",
    ),
    "fewer prompts than a rollout has": (
        {"per_device_train_batch_size": 32},
        "train_dataset has 6 prompts, but a rollout samples 8 different ones",
    ),
    "a token that only the tokenizer knows": (
        {"processing_class": with_added_token(), "train_dataset": [*PROMPTS, {"prompt": "w1 <new> w2"}]},
        r"train_dataset, row 6: '<new>' has the id 97, but the model's embedding has 97 rows: .*resize_token_embeddings",
    ),
    "a pad token that only the tokenizer knows": (
        {"processing_class": with_added_token(pad=True)},
        "the tokenizer's pad token '<new>' has the id 97, but the model's embedding has 97 rows",
    ),
    "no reward": ({"reward_funcs": []}, "reward_funcs is empty"),
    "reward_funcs forgotten": ({"reward_funcs": None}, "reward_funcs is empty"),
    "unknown reward": ({"reward_funcs": "gsm8"}, r"unknown reward 'gsm8'; known are: .*\(nearest: gsm8k\)"),
    "reward of another form": ({"reward_funcs": len}, "neither of the parameters completion and completions"),
    "a column that a verifier asks for": (
        {"reward_funcs": [even_words, uses_answer], "train_dataset": [row | {"answers": "w1"} for row in PROMPTS]},
        "the verifier 'uses_answer' asks for the column 'answer', which the train_dataset lacks; .* prompt, answers "
        r"\(nearest: answers\)",
    ),
    "weights for other rewards": (
        {"reward_weights": [1.0, 2.0]},
        r"reward_weights has 2 numbers for 1 rewards \(even_words\); give one each",
    ),
    "held-out rows without a prompt": (
        {"eval_dataset": [{"question": "w1"}]},
        r"eval_dataset has no column 'prompt', only \['question'\]",
    ),
    "one of several held-out sets": ({"eval_dataset": {"a": PROMPTS, "b": []}}, "eval_dataset b is empty"),
    "a column that held-out rows lack": (
        {
            "reward_funcs": uses_answer,
            "train_dataset": [row | {"answer": "w1"} for row in PROMPTS],
            "eval_dataset": PROMPTS,
        },
        "asks for the column 'answer', which the eval_dataset lacks",
    ),
    "reference that moves under LoRA": (
        {"beta": 0.1, "sync_ref_model": True, "peft_config": lora()},
        "sync_ref_model=True cannot move the reference under LoRA",
    ),
    "tokenizers of other rewards": (
        {"reward_processing_classes": [None, None]},
        "reward_processing_classes has 2 entries for 1 rewards, and must match them; give one each, None where the "
        "reward is no model",
    ),
    "an unknown outcome": (
        {"reward_policy": {"timeuot": "drop"}},
        "reward_policy has no outcome 'timeuot', only no_answer,",
    ),
    "a verifier that cannot be sent": (
        {"reward_funcs": holds_a_lock},
        r"the verifier 'holds_a_lock' cannot be sent to worker processes: .* register it with in_process=True",
    ),
    "tools": ({"tools": [print]}, r"the tool .print. .* cannot be shown to the model: .* Give each parameter a type hint"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_weights_load(model_path: str, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_path, tmp_path, **change)
    assert not (tmp_path / "run").exists()


SETTINGS = {item.name for item in dataclasses.fields(grpo_hf.GRPOConfig)}


def build(model: Any, folder: Path, **change: Any) -> GRPOTrainer:
    """A trainer with these arguments and settings."""
    good = {"reward_funcs": even_words, "train_dataset": PROMPTS, "processing_class": tiny_tokenizer()}
    is_argument = {name: name not in SETTINGS for name in change}
    settings = {name: value for name, value in change.items() if not is_argument[name]}
    sizes = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8, "use_cpu": True}
    args = grpo_hf.GRPOConfig(output_dir=str(folder / "run"), **(sizes | settings))
    return GRPOTrainer(model, args=args, **(good | {name: change[name] for name in change if is_argument[name]}))


def test_a_folder_that_cannot_be_written_to(model_path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*/file/run' cannot be written to: Not a directory; set it to"):
        build(model_path, tmp_path / "file")


def test_arguments_that_nobody_has(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reward_punks'"):
        build(model_path, tmp_path, reward_punks=even_words)
    with pytest.raises(pytest.fail.Exception, match="the weights were loaded"):
        build(model_path, tmp_path, tools=None)  # given, but not used: nothing is wrong but the fixture's weights


def test_a_tokenizer_without_eos(model_path: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos token, so no completion could end; set tokenizer\.eos_token"):
        build(model_path, tmp_path, processing_class=tokenizer)


def test_a_tokenizer_without_pad_gets_one_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.pad_token = None
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, tokenizer=tokenizer)
    assert trainer.processing_class.pad_token == "<eos>"
    assert "no pad token; using its eos token '<eos>'" in caplog.text


def test_overlong_prompts_can_be_dropped_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, dataset=[LONG, *PROMPTS, LONG], overlong_prompts="drop")
    assert [prompt.index for prompt in trainer.prompts] == [1, 2, 3, 4, 5, 6]
    assert "train_dataset: dropped 2 of 8 prompts longer than 56 tokens" in caplog.text
    trainer.train()


# ---- A run that learns nothing


@pytest.mark.parametrize(("rewards", "said"), [((0.0, 0.0), True), ((0.0, 1.0), False)])
def test_a_first_rollout_without_signal_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rewards: tuple[float, float], said: bool
) -> None:
    draw = itertools.cycle(rewards)
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, reward=lambda completions, **others: [next(draw) for _ in completions], max_steps=2).train()
    about = "no group of the first rollout has a signal: its 8 completions have the rewards 0, equal within each group"
    assert caplog.text.count(about) == int(said)


# ---- Verifiers that fail in a run


WRONG = {
    "raises": (named(lambda completion: 1 / 0, "divides"), "ZeroDivisionError: division by zero"),
    "one score too few": (
        named(lambda completions, **columns: [1.0] * (len(completions) - 1), "short"),
        "the verifier 'short' returned 7 scores for 8 completions",
    ),
    "no list": (
        named(lambda completions, **columns: 1.0, "single"),
        r"the verifier 'single' returned 1.0 \(float\); expected a list of 8 numbers",
    ),
    "text": (named(lambda completion: "good", "words"), r"the verifier 'words' returned 'good' \(str\)"),
    "infinity": (named(lambda completion: math.inf, "endless"), r"the verifier 'endless' returned inf"),
}


@pytest.mark.parametrize(("verifier", "message"), WRONG.values(), ids=WRONG)
def test_a_failing_verifier_stops_the_run_under_its_name(tmp_path: Path, verifier: Any, message: str) -> None:
    trainer = tiny_trainer(tmp_path, reward=[even_words, verifier])
    with pytest.raises(RewardFaultError, match=message) as caught:
        trainer.train()
    assert f"the verifier {verifier.__name__!r} was called 8 times (8 error)" in str(caught.value)


def test_samples_that_no_verifier_scores_are_skipped(tmp_path: Path) -> None:
    """None means: does not apply. With no other score there is nothing to learn, and nothing breaks."""
    trainer = tiny_trainer(tmp_path, reward=named(lambda completion: None, "nothing"), max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert values(trainer, "frac_zero_signal_groups") == [1.0, 1.0]
    assert values(trainer, "grad_norm") == [0.0, 0.0]
    assert same(weights(trainer.model), before)


def test_a_run_in_which_nothing_is_ever_scored_stops(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, reward=named(lambda completion: None, "nothing"), max_steps=9)
    with pytest.raises(
        RewardFaultError, match=r"no completion of 3 rollouts in a row has got a number .*'nothing' \d+ None"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


# ---- Numbers that go bad


def poison(when: int) -> AfterStep:
    """Puts one NaN into the gradient of every backward pass after a step."""

    def start(state: Any, model: nn.Module) -> None:
        if state.global_step == when:
            first = next(model.parameters())
            first.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), math.nan))

    return AfterStep(start)


class PoisonWeight(AfterStep):
    """Puts a NaN into a weight right before the forward pass of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                kwargs["model"].model.layers[0].mlp.up_proj.weight[0, 0] = math.nan


def test_a_nan_gradient_stops_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    for max_grad_norm in (1.0, 0.0):
        trainer = tiny_trainer(
            tmp_path,
            max_steps=5,
            max_grad_norm=max_grad_norm,
            callbacks=[poison(2)],
            save_strategy="steps",
            save_steps=1,
        )
        with pytest.raises(GuardError, match="the gradient norm of step 3 is nan: not finite are 0 log-probs, 0 weig"):
            trainer.train()
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert same(weights(saved), weights(trainer.model))
        assert not (tmp_path / "checkpoint-3").exists()


def test_a_nan_loss_stops_the_run_and_says_where_it_comes_from(tmp_path: Path) -> None:
    stop = PoisonWeight(lambda *_: None)
    trainer = tiny_trainer(tmp_path, max_steps=5, callbacks=[stop], save_strategy="steps", save_steps=1)
    with pytest.raises(GuardError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("the loss of step 3 is nan: not finite are ")
    assert "1 weights (model.layers.0.mlp.up_proj.weight)" in message
    assert f"the checkpoints in {tmp_path} are good" in message
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_an_update_that_makes_weights_infinite_is_not_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, learning_rate=1e39, save_strategy="steps", save_steps=1)
    with pytest.raises(GuardError, match=r"step 1 has made \d+ weights NaN or infinite .* learning_rate=1e\+39"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_run_goes_on_from_the_last_good_checkpoint(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(GuardError):
        tiny_trainer(tmp_path, callbacks=[poison(2)], **options).train()
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.train()
    assert same(weights(resumed.model), weights(whole.model))


def test_held_out_prompts_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset: 1 of 2 prompts are longer than 56 tokens"):
        held_out_trainer(tmp_path, [PROMPTS[0], LONG])
    kept = held_out_trainer(tmp_path, [PROMPTS[0], LONG], overlong_prompts="drop")
    assert len(kept.eval_prompts[""]) == 1


# ---- An engine's log-probs that are missing


@pytest.mark.parametrize("missing", [None, math.nan])
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_tokens_without_an_engines_logprob_are_left_out_of_the_correction(
    tmp_path: Path, mode: str, missing: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of weights 1 there; the others' metrics stay what they were, and one line says so."""
    kept, lines = Gradients(), []
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("grpo_hf.rollout.record"), "warning_once", said.append, raising=False)
    for broken in (False, True):
        settings: dict[str, Any] = {"vllm_importance_sampling_mode": mode, "max_steps": 1}
        trainer = tiny_trainer(tmp_path, callbacks=[kept], **settings)
        trainer.policy.objective = grpo_objective(
            *LOSSES["dapo"], factors=(partial(corrected, mode=mode, low=None, high=3.0),)
        )
        trainer.stream.sampler.engine = WithLogprobs(trainer.stream.sampler.engine, trainer, missing if broken else 0.0)
        trainer.train()
        lines.append(logs(trainer)[0])
    assert relative_error(kept.steps[1], kept.steps[0]) < 1e-5
    assert lines[0].get("sampling/frac_without_logprobs", 0.0) == 0 < lines[1]["sampling/frac_without_logprobs"] < 1
    assert lines[1]["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-4)
    (line,) = said
    assert line.startswith("The engine gave some tokens no log-prob (None or NaN)")


class WithLogprobs:
    """An engine that gives the trainer's own log-probs, but for each completion's first token."""

    def __init__(self, engine: Any, trainer: GRPOTrainer, first: float | None):
        self.engine, self.trainer, self.first = engine, trainer, first

    def sync_weights(self, version: int) -> None:
        self.engine.sync_weights(version)

    def abort(self) -> None:
        self.engine.abort()

    @contextmanager
    def requests(self, sampling: Any) -> Iterator[Any]:
        with self.engine.requests(sampling) as self.asked:
            self.prompts: dict[Any, list[int]] = {}
            yield self

    def add(self, key: Any, ids: list[int], *more: Any) -> None:
        self.prompts[key] = ids
        self.asked.add(key, ids, *more)

    def finished(self) -> list[Any]:
        groups = self.asked.finished()
        for key, completions in groups:
            for item in completions:
                ids = torch.tensor([self.prompts[key] + item.ids])
                with torch.no_grad():
                    logits = self.trainer.model.eval()(ids).logits[0, len(self.prompts[key]) - 1 : -1]
                found = token_logprobs(logits, torch.tensor(item.ids)).tolist()
                item.rollout_logprobs = [found[0] if self.first == 0.0 else self.first, *found[1:]]
        return groups
