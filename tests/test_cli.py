"""The command line: recipes and overrides become settings, a run prints its report and its result, and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from grpo_hf import GRPOConfig
from grpo_hf.cli import main
from grpo_hf.cli.recipe import RunArguments, help_text, parse
from grpo_hf.cli.train import build_trainer, load_data
from grpo_hf.cli.train import main as train_main
from tests.tiny import PROMPTS

# ---- Recipes and overrides


def recipe(folder: Path, name: str = "recipe.yaml", **settings: Any) -> str:
    """A recipe's path."""
    path = folder / name
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), "use_cpu": True} | settings))
    return str(path)


def test_a_recipe_is_split_into_what_and_how(tmp_path: Path) -> None:
    run, config = parse([recipe(tmp_path, model_name_or_path="tiny", rewards=["gsm8k"], num_generations=4)])
    assert (run.model_name_or_path, run.rewards, run.dataset_test_split) == ("tiny", ["gsm8k"], "test")
    assert (config.num_generations, config.beta) == (4, 0.0)


def test_later_values_win(tmp_path: Path) -> None:
    first = recipe(tmp_path, "first.yaml", num_generations=4, beta=0.1, lora_r=4)
    second = recipe(tmp_path, "second.yaml", num_generations=2, lora_r=8)
    run, config = parse([first, second, "--lora_r", "64", "--lora_r", "32"])
    assert (config.num_generations, config.beta, run.lora_r) == (2, 0.1, 32)


# arguments, setting, value
OVERRIDES = {
    "number": (["--num_generations", "4"], "num_generations", 4),
    "equals sign": (["--num_generations=4"], "num_generations", 4),
    "hyphens": (["--num-generations", "4"], "num_generations", 4),
    "negative": (["--max_steps", "-1"], "max_steps", -1),
    "1e-5": (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
    "1e3 where whole numbers go": (["--max_steps", "1e3"], "max_steps", 1000),
    "null": (["--eval_temperature", "null"], "eval_temperature", None),
    "list": (["--reward_weights", "[1, 0.5]"], "reward_weights", [1, 0.5]),
    "mapping": (["--model_init_kwargs", "{dtype: bfloat16}"], "model_init_kwargs", {"dtype": "bfloat16"}),
    "rewards": (["--rewards", "[gsm8k, {name: sorting}]"], "rewards", ["gsm8k", {"name": "sorting"}]),
    "no is a strategy": (["--save_strategy", "no"], "save_strategy", "no"),
    "true": (["--use_peft", "true"], "use_peft", True),
    "a flag": (["--use_peft", "--lora_r", "8"], "use_peft", True),
    "a flag at the end": (["--use_peft"], "use_peft", True),
    "off": (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
    "false where a name goes": (["--scale_rewards", "false"], "scale_rewards", "none"),
    "template in braces": (["--prompt_template", "{question}"], "prompt_template", "{question}"),
    "text like a number": (["--run_name", "007"], "run_name", "007"),
    "text with a colon": (["--system_prompt", "Answer: briefly"], "system_prompt", "Answer: briefly"),
    "text or nothing": (["--dataset_test_split", "null"], "dataset_test_split", None),
    "text of no letters": (["--system_prompt", ""], "system_prompt", ""),
    "resume": (["--resume_from_checkpoint", "auto"], "resume_from_checkpoint", "auto"),
}


@pytest.mark.parametrize(("arguments", "name", "value"), OVERRIDES.values(), ids=OVERRIDES)
def test_an_override_is_read_as_its_setting_is_declared(tmp_path: Path, arguments: list, name: str, value: Any) -> None:
    run, config = parse([recipe(tmp_path), *arguments])
    found = getattr(run if hasattr(run, name) else config, name)
    assert (found, type(found)) == (value, type(value)) or found.value == value


def test_what_yaml_reads_otherwise_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: yes\nlearning_rate: 1e-5\nsave_strategy: no\neval_strategy: no\n")
    _, config = parse([str(path)])
    assert (config.learning_rate, config.save_strategy.value, config.eval_strategy.value) == (1e-5, "no", "no")


MISTAKES = {
    "near": (["--num_generation", "4"], "unknown setting 'num_generation'; did you mean 'num_generations'"),
    "near one of the recipe's": (["--reward", "gsm8k"], "unknown setting 'reward'; did you mean 'rewards'"),
    "near nothing": (["--xyzzy", "4"], "unknown setting 'xyzzy'"),
    "only in TRL": (["--max_prompt_length", "4"], "no setting 'max_prompt_length': use overlong_prompts='drop'"),
    "no value": (["--num_generations"], "--num_generations needs a value: --num_generations VALUE"),
    "no value before the next": (["--num_generations", "--beta", "0"], "--num_generations needs a value"),
    "no number": (["--learning_rate", "fast"], "learning_rate='fast' is not a number"),
    "settings that cannot work": (["--num_generations", "3"], "does not hold whole groups of num_generations=3"),
    "no recipe": (["missing.yaml"], r"there is no recipe missing.yaml: neither a YAML file of settings, nor one of"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    start = [recipe(tmp_path)] if arguments[0].startswith("--") else []
    with pytest.raises(ValueError, match=message):
        parse([*start, *arguments])


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- gsm8k\n")
    with pytest.raises(ValueError, match="must hold `setting: value` lines, not a list"):
        parse([str(path)])
    path.write_text("prompt_template: {question}\n")
    with pytest.raises(ValueError, match=r"prompt_template must be text, not .*; put quotes around it"):
        parse([str(path)])
    path.write_text("")
    assert parse([str(path), "--use_cpu", "true"])[0] == RunArguments()


def test_help_names_every_setting_of_ours() -> None:
    text = help_text()
    for setting in ("model_name_or_path", "rewards", "lora_r", "num_generations", "tokens_per_microbatch", "loss_type"):
        assert f"\n  --{setting} " in text


# ---- grpo-hf


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("train", "toy", "report"))
    assert main([]) == 2


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    known = "train, recipes, init, eval, compare, serve, verify, toy"
    assert f"there is no command 'trian', only {known}" in capsys.readouterr().err


def test_train_without_a_recipe_shows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out.count("usage: grpo-hf train RECIPE") == 2


# ---- A run

FUNCTIONS = """
from datasets import Dataset

from tests.tiny import PROMPTS, VOCAB, even_words, tiny_model, tiny_tokenizer


def make_model(*, seed, family="qwen2"):
    model = tiny_model(family, seed)
    model.generation_config.eos_token_id = list(range(VOCAB - 20, VOCAB))
    return model, tiny_tokenizer()


def make_data(*, size=6):
    return Dataset.from_list(PROMPTS[:size]), Dataset.from_list(PROMPTS[:5])


def even(completion):
    return even_words(completion)


def is_long(completion):
    return float(len(completion.split()) > 4)
"""


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> str:
    functions = tmp_path / "functions.py"
    functions.write_text(FUNCTIONS)
    return recipe(
        tmp_path,
        model_function=f"{functions}:make_model",
        dataset_function=f"{functions}:make_data",
        rewards=[f"{functions}:even", f"{functions}:is_long"],
        reward_weights=[1.0, 0.0],
        headline="is_long",
        max_steps=2,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=1,
        disable_tqdm=True,
        write_report=False,
        report_to="none",
    )


def test_a_run_ends_with_its_report_and_its_result(
    tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", tiny_recipe, "--write_report"]) == 0
    *_, report, result = capsys.readouterr().out.splitlines()
    assert report == f"report: {tmp_path / 'run' / 'report.html'}"
    lines = metrics(tmp_path)
    first, last = (line["eval_rewards/is_long/mean"] for line in lines if "eval_reward" in line)
    assert result == f"is_long {first:.3f} -> {last:.3f} held-out 5"
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 2]
    assert {"report.html", "metrics.jsonl", "rollouts", "checkpoint-1", "checkpoint-2", "model.safetensors"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_last_weights_are_not_evaluated_twice(tiny_recipe: str, tmp_path: Path) -> None:
    train_main([tiny_recipe, "--eval_strategy", "steps", "--eval_steps", "1"])
    assert [line["step"] for line in metrics(tmp_path) if "eval_reward" in line] == [0, 1, 2]


def test_a_run_without_held_out_rows_has_no_result(
    tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PROMPTS)
    train_main([tiny_recipe, "--dataset_function", "null", "--dataset_name", rows])
    assert " -> " not in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.html").exists()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_resume_auto_starts_and_goes_on(tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again: from the newest checkpoint, with the first value of the part before."""
    auto = [tiny_recipe, "--resume_from_checkpoint", "auto", "--lr_scheduler_type", "constant"]
    train_main(auto)
    train_main([*auto, "--max_steps", "4"])
    first, second = (line for line in capsys.readouterr().out.splitlines() if " -> " in line)
    assert first.split(" -> ")[0] == second.split(" -> ")[0]
    trained = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert trained == [1, 2, 3, 4]
    assert not list((tmp_path / "run").glob("earlier-*"))


def test_resume_needs_a_checkpoint(tiny_recipe: str) -> None:
    with pytest.raises(ValueError, match="has no whole checkpoint; 'auto' starts anew"):
        train_main([tiny_recipe, "--resume_from_checkpoint", "true"])


def test_lora_from_a_recipe(tiny_recipe: str, tmp_path: Path) -> None:
    train_main([tiny_recipe, "--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "[q_proj]"])
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (4, 8, ["q_proj"])


def test_report_is_written_again(tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_main([tiny_recipe])
    assert not (tmp_path / "run" / "report.html").exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_function": None}, "set model_name_or_path or model_function, one of them"),
        ({"model_name_or_path": "tiny"}, "set model_name_or_path or model_function, one of them"),
        ({"dataset_name": "gsm8k"}, "set dataset_name or dataset_function or environments, one of them"),
        ({"rewards": []}, "reward_funcs is empty"),
        ({"tools": "tools.py:look"}, r"tools is a list; got 'tools.py:look': write \[tools.py:look\]"),
        ({"rewards": ["gsm8"], "reward_weights": None}, r"unknown reward 'gsm8'; known are: .*\(nearest: gsm8k\)"),
        (
            {"rewards": ["gsm8k"], "reward_weights": None},
            "'gsm8k' asks for the column 'answer', which the train_dataset lacks",
        ),
        ({"reward_weights": [1.0]}, "reward_weights has 1 numbers for 2 rewards"),
        ({"headline": "gsm8k"}, "headline='gsm8k' is none of the rewards, which are even, is_long"),
        ({"prompt_template": "{question}?"}, r"asks for \['question'\]; the dataset has \['prompt'\]"),
        ({"dataset_function": "make_data"}, "'make_data' names no function; write path/file.py:function"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_mistakes_are_found_before_a_model_is_made(tiny_recipe: str, tmp_path: Path, change: dict, message: str) -> None:
    settings = yaml.safe_load(Path(tiny_recipe).read_text())
    (tmp_path / "never.py").write_text("def make_model(*, seed):\n    raise AssertionError('the model was made')\n")
    settings |= {"model_function": f"{tmp_path / 'never.py'}:make_model"} | change
    run, config = parse([recipe(tmp_path, **{name: value for name, value in settings.items() if value is not None})])
    with pytest.raises(ValueError, match=message):
        build_trainer(run, config)


# ---- Data

ROWS = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(6)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_rows(tmp_path: Path, suffix: str) -> None:
    table = Dataset.from_list(ROWS)
    write = {"jsonl": table.to_json, "json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
    write(str(tmp_path / f"rows.{suffix}"))
    path = str(tmp_path / f"rows.{suffix}")
    train, held_out = load_data(RunArguments(dataset_name=path, prompt_template="{question}"))
    assert train[1] == {**ROWS[1], "prompt": "What is 1 + 1?"}
    assert held_out is None
    _, held_out = load_data(
        RunArguments(dataset_name=path, dataset_test_file=path, prompt_template="Q: {question}", max_eval_samples=2)
    )
    assert held_out["prompt"] == ["Q: What is 0 + 1?", "Q: What is 1 + 1?"]


def test_a_system_prompt_makes_chat_messages(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    train, _ = load_data(RunArguments(dataset_name=path, prompt_template="{question}", system_prompt="Be brief."))
    assert train[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 0 + 1?"},
    ]
    train, _ = load_data(RunArguments(dataset_name=path, prompt_template="{question}", system_prompt=""))
    assert train[0]["prompt"] == [{"role": "user", "content": "What is 0 + 1?"}]
    chat = [{"role": "user", "content": "Hello"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"prompt": chat}])
    train, _ = load_data(RunArguments(dataset_name=path, system_prompt="Be brief."))
    assert train[0]["prompt"] == [{"role": "system", "content": "Be brief."}, *chat]
    train, _ = load_data(RunArguments(dataset_name=path))
    assert train[0]["prompt"] == chat


def test_trainer_settings_are_grpo_config(tiny_recipe: str) -> None:
    run, config = parse([tiny_recipe])
    trainer = build_trainer(run, config)
    assert isinstance(trainer.args, GRPOConfig)
    assert [reward.name for reward in trainer.rewards] == ["even", "is_long"]
