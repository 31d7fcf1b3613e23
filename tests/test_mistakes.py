"""A user's mistake is one message that names it, before any weights load; a run without signal says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from grpo_hf import GRPOConfig, GRPOTrainer
from grpo_hf.cli import main
from grpo_hf.training.guards import GUARDS, Seen, no_signal
from tests.tiny import tiny_model, tiny_tokenizer, tiny_trainer


def make(folder: Path, *, model: Any = None, reward: Any = "sorting", rows: Any = None, **settings: Any) -> GRPOTrainer:
    options = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8, "report_to": "none"}
    args = GRPOConfig(output_dir=str(folder / "run"), use_cpu=True, **(options | settings))
    rows = [{"prompt": "w1", "numbers": [1]}] * 8 if rows is None else rows
    return GRPOTrainer(tiny_model() if model is None else model, reward, args, rows, processing_class=tiny_tokenizer())


def folder_of(tmp_path: Path, text: str) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    if text:
        (folder / "config.json").write_text(text)
    return str(folder)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a path as dataset": ({"rows": "rows.jsonl"}, "train_dataset='rows.jsonl' is a name; load it: datasets.load_dataset"),
    "texts as rows": ({"rows": ["w1", "w2"]}, "train_dataset is a list whose entry 0 is 'w1'; a row is a dict"),
    "one entry is no row": ({"rows": [{"prompt": "w1"}, 3]}, "train_dataset is a list whose entry 1 is 3"),
    "a number as rows": ({"rows": 3}, "train_dataset is a int; give a datasets.Dataset or a list of dicts"),
    "a number as reward": ({"reward": 3}, "a reward is a name, a mapping with a name, or a function; got 3"),
    "a folder that is not there": ({"model": "/nowhere/model"}, "model='/nowhere/model': there is no such folder"),
    "a number as model": ({"model": 3}, "model=3 is a int; give a causal LM"),
    "a server without vLLM": ({"vllm_mode": "server"}, "vllm_mode='server' asks for vLLM, and use_vllm is False"),
    "an address without a server": ({"vllm_server_base_url": "http://h:1"}, "is for vllm_mode='server', and vllm_mode is"),
    "options at odds": (
        {"reward": {"name": "soft_overlong", "max_length": 10, "cache": 20}},
        r"'soft_overlong' refuses its options \(max_length, cache\): .* needs 0 < cache <= max_length; got cache=20",
    ),
    "an option that is no pattern": ({"reward": {"name": "format", "pattern": "(["}}, r"'\(\[' is not a regular expression"),
    "an unknown mode": (
        {"reward": {"name": "gsm8k", "answer": "#### 1", "reading": "all"}},
        "'gsm8k' refuses its options .* no reading 'all'; its readings are",
    ),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no model: it has no config.json and no adapter_config.json, but nothing"),
        ('{"architectures": ["BertForMaskedLM"]}', "is no causal LM but BertForMaskedLM"),
        ('{"is_encoder_decoder": true}', "is no causal LM but an encoder with a decoder"),
    ],
)
def test_a_folder_that_holds_no_causal_lm(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model=folder_of(tmp_path, text))


def test_a_model_that_classifies(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 97}
    model = BertForSequenceClassification(BertConfig(**sizes, architectures=["BertForSequenceClassification"]))
    with pytest.raises(ValueError, match="is no causal LM but BertForSequenceClassification"):
        make(tmp_path, model=model)


def test_a_path_object_is_a_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    assert make(tmp_path, model=tmp_path / "model", max_steps=1).model.config.vocab_size == tiny_model().config.vocab_size


def test_auto_says_that_it_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint="auto")
    assert "has no whole checkpoint yet, so the run starts anew" in caplog.text


# ---- On the command line


def test_one_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.1\nbeta: 0.2\n")
    with pytest.raises(SystemExit) as end:
        main(["train", str(path)])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"error: {path} is not YAML: beta is set twice") and "line 2" in said
    with pytest.raises(ValueError, match="set twice"):
        main(["train", str(path), "--traceback"])


def test_yaml_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rewards: [math\n")
    with pytest.raises(ValueError, match=rf"{path} is not YAML: .*\n?.*"):
        main(["train", str(path), "--traceback"])


def test_a_process_ends_with_the_message() -> None:
    command = [sys.executable, "recipes/train.py", "nowhere"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: there is no recipe nowhere: neither a YAML file of settings, nor one of" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Without signal


def line(reward: float, flat: float, **more: float) -> dict[str, float]:
    return {"loss": 0.0, "reward": reward, "frac_reward_zero_std": flat, "rewards/math/mean": reward} | more


@pytest.mark.parametrize(
    ("last", "advice"),
    [
        (line(0, 1, **{"rewards/math/outcomes/no_answer": 0.9}), "which form the answer takes"),
        (line(0, 1), "easier prompts first"),
        (line(1, 1), "harder prompts"),
    ],
)
def test_ten_lines_without_signal_say_why(last: dict[str, float], advice: str) -> None:
    reading = no_signal(Seen(20, lines=[line(0, 1)] * 9 + [last]), GUARDS["no_signal"].threshold)
    assert reading is not None and reading.tripped
    assert f"math scores {last['reward']:.3g}" in reading.said and advice in reading.said


def test_one_line_with_signal_is_enough() -> None:
    assert no_signal(Seen(9, lines=[line(0, 1)] * 9), 10) is None, "too few to say"
    reading = no_signal(Seen(10, lines=[line(0, 1)] * 5 + [line(0, 0.5)] + [line(0, 1)] * 4), 10)
    assert reading is not None and not reading.tripped


def test_a_run_without_signal_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nothing(completion: str) -> float:
        return 0.0

    trainer = tiny_trainer(tmp_path, reward=nothing, max_steps=11, learning_rate=0.0)
    with caplog.at_level("WARNING"):
        trainer.train()
    said = [record.message for record in caplog.records if "guard no_signal" in record.message]
    assert len(said) == 1 and "10 log lines had no prompt whose completions earned different rewards" in said[0]
