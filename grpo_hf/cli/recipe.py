"""A recipe (YAML) and command-line overrides -> the run's arguments and GRPOConfig."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from grpo_hf.training.config import GRPOConfig, option


@dataclass
class RunArguments:
    """Which model, data and rewards a recipe trains with; GRPOConfig says how."""

    model_name_or_path: str | None = option(None, "A hub name or a folder.")
    model_function: str | None = option(None, "Instead: path/file.py:function that returns (model, tokenizer).")
    model_options: dict = field(default_factory=dict, metadata={"help": "Keywords of model_function; it also gets seed."})
    dataset_name: str | None = option(None, "A hub name, or a .jsonl, .json, .csv or .parquet file.")
    dataset_config: str | None = option(None, "The hub dataset's configuration.")
    dataset_train_split: str = option("train", "Its split to train on.")
    dataset_test_split: str | None = option("test", "Its held-out split; null for none.")
    dataset_test_file: str | None = option(None, "Held-out rows in a file of their own.")
    dataset_function: str | None = option(None, "Instead: path/file.py:function that returns (train, held-out).")
    dataset_options: dict = field(default_factory=dict, metadata={"help": "Keywords of dataset_function."})
    max_eval_samples: int | None = option(None, "Evaluate on the first of the held-out rows only.")
    prompt_template: str | None = option(None, "Makes the prompt from a row's columns: '{question}'.")
    system_prompt: str | None = option(None, "Makes the prompt chat messages, with this first.")
    rewards: list = field(default_factory=list, metadata={"help": "Names, functions, or {name: ..., option: ...}."})
    headline: str | None = option(None, "The reward that the last line shows before and after; default: the first.")
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "LoRA rank.")
    lora_alpha: int = option(32, "LoRA scale: alpha / r.")
    lora_dropout: float = option(0.0, "LoRA dropout.")
    lora_target_modules: Any = option("all-linear", "Modules that get an adapter.")


def parse(argv: Sequence[str]) -> tuple[RunArguments, GRPOConfig]:
    """`recipe.yaml [--field value ...]`; a later value wins. Raises ValueError for anything unknown."""
    settings: dict[str, Any] = {}
    rest = list(argv)
    while rest and not rest[0].startswith("--"):
        settings |= _read_yaml(Path(rest.pop(0)))
    while rest:
        name, equals, value = rest.pop(0).removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} needs a value: --{name} VALUE")
            value = rest.pop(0)
        settings[name] = yaml.safe_load(value)
    ours = {item.name for item in fields(RunArguments)}
    known = ours | {item.name for item in fields(GRPOConfig)}
    for name in settings:
        if name not in known and (near := difflib.get_close_matches(name, known, n=1)):
            raise ValueError(f"unknown setting {name!r}; did you mean {near[0]!r}?")
    run = {name: value for name, value in settings.items() if name in ours}
    config = {name: value for name, value in settings.items() if name not in ours}
    return RunArguments(**_typed(RunArguments, run)), GRPOConfig(**_typed(GRPOConfig, config))


def help_text() -> str:
    """Every setting with its default."""
    lines = ["usage: grpo-hf train RECIPE.yaml [--SETTING VALUE ...]", "", "model, data, rewards:"]
    own = {item.name for item in fields(GRPOConfig)} - {item.name for item in fields(GRPOConfig.__mro__[1])}
    sections: list[tuple[type, set[str] | None]] = [(RunArguments, None), (GRPOConfig, own)]
    for number, (kind, names) in enumerate(sections):
        lines += ["", "training (and every field of transformers.TrainingArguments):"] if number else []
        for item in fields(kind):
            if names is None or item.name in names:
                lines.append(f"  --{item.name:<28} {item.metadata.get('help', '')}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; recipes are YAML files of settings, see recipes/")
    settings = yaml.safe_load(path.read_text()) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, not a {type(settings).__name__}")
    return settings


def _typed(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-5 as a string: turn it into the number that its field is declared as."""
    hints = get_type_hints(kind)
    typed = dict(settings)
    for name, value in settings.items():
        declared = (get_args(hints.get(name)) or (hints.get(name),)) if name in hints else ()
        if isinstance(value, str) and float in declared and str not in declared:
            typed[name] = float(value)
    return typed
