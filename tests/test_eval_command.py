"""`grpo-hf eval` and `grpo-hf compare`: a model's table, and two models' difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_hf.cli import main
from grpo_hf.cli.data import load_table
from grpo_hf.evaluation.record import read_evaluation
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = ["--model_options", "{warm_up_until: 0.0}", "--dataset_options", "{train: 8, held_out: 12}", "--use_vllm", "false"]


def evaluated(folder: Path, *more: str, model: str | None = None) -> int:
    given = ["--recipe", "sorting_lm", "--output", str(folder), "--k", "4", "--temperature", "1.0", *SMALL, *more]
    return main(["eval", *([model] if model else []), *given])


def test_a_recipe_is_evaluated_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, other = (tmp_path / name for name in ("a", "b", "other"))
    assert evaluated(a, "--limit", "6") == 0
    out = capsys.readouterr().out
    assert "6 prompts, 4 samples each" in out and "95 % interval" in out
    names = [line.split()[0] for line in out.splitlines() if "[" in line and line[0] != "{"]
    assert names[-5:] == [f"exact_sort/{name}" for name in ("mean", "pass@2", "maj@2", "pass@4", "maj@4")]
    assert [len(item.rewards) for item in read_evaluation(a)["eval"]] == [4] * 6
    assert evaluated(b, "--limit", "6", "--temperature", "0.0") == 0
    capsys.readouterr()
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "of 6 prompts" in out and "sorting/mean" in out
    assert main(["compare", str(a), str(a / "evaluations" / "step-000000")]) == 0
    assert "+0.000" in capsys.readouterr().out
    assert evaluated(other, "--limit", "5") == 0
    with pytest.raises(ValueError, match="other rows: row 5"):
        main(["compare", str(a), str(other), "--traceback"])


def test_a_model_on_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GSM8K's form, a reward with an option, a template."""
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"question": f"w{n} w{n + 1}", "answer": f"so\n#### {n}"} for n in range(5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data", str(data), "--reward", "{name: gsm8k, reading: last_number}", "--prompt_template", "{question}"]
    given += ["--k", "2", "--output", str(tmp_path / "out"), "--max_completion_length", "8", "--use_cpu"]
    assert main(["eval", str(model), *given]) == 0
    out = capsys.readouterr().out
    assert "gsm8k/pass@2" in out
    for row, question in enumerate(read_evaluation(tmp_path / "out")["eval"][:3]):
        assert f"row {row}: reward {question.rewards[0]:g} for {question.answers[0]!r:.100}\n" in out
    assert main(["eval", str(model), *given]) == 0, "again: the earlier one is set aside"
    assert (tmp_path / "out" / "earlier-1" / "evaluations").is_dir()


def test_a_model_that_was_trained_here_is_evaluated_as_in_training(tmp_path: Path) -> None:
    """With the tokenizer that it was trained with: the family's own would leave out the spaces."""
    train = [
        "train",
        "sorting_lm",
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
        *SMALL,
        "--num_generations_eval",
    ]
    assert main([*train, "4", "--eval_temperature", "1.0", "--per_device_train_batch_size", "8"]) == 0
    evaluated(tmp_path / "out", model=str(tmp_path / "run"))
    assert read_evaluation(tmp_path / "out") == read_evaluation(tmp_path / "run")


def test_a_reward_that_never_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verifier = tmp_path / "verifier.py"
    verifier.write_text("def never(completion):\n    return None\n")
    assert evaluated(tmp_path / "out", "--limit", "2", "--reward", f"{verifier}:never") == 0
    assert "no reward has given any sample a score" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert "no prompt has a score in both" in capsys.readouterr().out


def test_an_interval_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one prompt, or of differences that are all alike."""
    evaluated(tmp_path / "out", "--limit", "1")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unknown" in next(line for line in lines if line.startswith("reward"))
    assert "[-1.000, +1.000]" in next(line for line in lines if line.startswith("exact_sort/mean"))


def test_mistakes(tmp_path: Path) -> None:
    for k in ("0", "-1"):
        with pytest.raises(ValueError, match="at least 1 sample"):
            main(["eval", "--recipe", "sorting_lm", "--k", k, "--traceback"])
    with pytest.raises(ValueError, match="say what to evaluate"):
        main(["eval", "--traceback"])
    with pytest.raises(ValueError, match="holds no evaluation"):
        main(["compare", str(tmp_path), str(tmp_path), "--traceback"])


def test_a_file_without_rows(tmp_path: Path) -> None:
    """Is refused by its name."""
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty; one row at least is needed"):
        load_table(str(tmp_path / "rows.jsonl"), "train")
