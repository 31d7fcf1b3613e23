"""A recipe (YAML) and command-line overrides -> the run's arguments and GRPOConfig."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from grpo_hf.cli.data import FORMATS
from grpo_hf.training.config import GRPOConfig, option
from grpo_hf.training.trl_names import TRL_ONLY

SHIPPED = Path(__file__).parents[1] / "recipes"
_FILE = re.compile(rf"(.+\.py):\w+|.+({'|'.join(map(re.escape, FORMATS))})")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


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
    system_prompt: str | None = option(None, "Makes the prompt chat messages, with this first; '': without one.")
    rewards: list = field(default_factory=list, metadata={"help": "Names, functions, or {name: ..., option: ...}."})
    eval_rewards: list = field(default_factory=list, metadata={"help": "Those of held-out rows; default: the same."})
    teacher: str | None = option(None, "A model with the same tokenizer to learn from too: a hub name or a folder.")
    headline: str | None = option(None, "The reward that the last line shows before and after; default: the first.")
    tools: list = field(default_factory=list, metadata={"help": "path/file.py:function, which the model may call."})
    environment_factory: Any = option(
        None,
        "path/file.py:Class, whose methods are its episode's tools; or {name: ...}: the column environment chooses.",
    )
    environments: Any = option(
        None, "verifiers:NAME, or {name: verifiers:NAME, OPTION: VALUE}: data, episodes and reward of that package."
    )
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "LoRA rank.")
    lora_alpha: int = option(32, "LoRA scale: alpha / r.")
    lora_dropout: float = option(0.0, "LoRA dropout.")
    lora_target_modules: Any = option("all-linear", "Modules that get an adapter.")


def parse(argv: Sequence[str]) -> tuple[RunArguments, GRPOConfig]:
    """`recipe.yaml [--field value ...]`; a later value wins. Raises ValueError for anything unknown."""
    declared = _declared_types()
    settings: dict[str, Any] = {}
    rest = list(argv)
    while rest and not rest[0].startswith("--"):
        settings |= _read_yaml(find_recipe(rest.pop(0)))
    while rest:
        name, equals, text = rest.pop(0).removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals:
            bare = not rest or rest[0].startswith("--")
            if bare and bool not in declared.get(name, ()):
                raise ValueError(f"--{name} needs a value: --{name} VALUE")
            text = "true" if bare else rest.pop(0)
        settings[name] = _from_command_line(text, declared.get(name, ()))
    ours = {item.name for item in fields(RunArguments)}
    for name in settings:
        known = name in declared or name in TRL_ONLY  # GRPOConfig says what to use instead
        if not known and (near := difflib.get_close_matches(name, declared, n=1)):
            raise ValueError(f"unknown setting {name!r}; did you mean {near[0]!r}?")
    typed = {name: _as_declared(name, value, declared.get(name, ())) for name, value in settings.items()}
    run = {name: value for name, value in typed.items() if name in ours}
    return RunArguments(**run), GRPOConfig(**{name: value for name, value in typed.items() if name not in ours})


def help_text() -> str:
    """Every setting with its default."""
    lines = [
        "usage: grpo-hf train RECIPE [--SETTING VALUE ...] (a YAML file, or a name of `grpo-hf recipes`)",
        "",
        "model, data, rewards:",
    ]
    own = {item.name for item in fields(GRPOConfig)} - {item.name for item in fields(GRPOConfig.__mro__[1])}
    sections: list[tuple[type, set[str] | None]] = [(RunArguments, None), (GRPOConfig, own)]
    for number, (kind, names) in enumerate(sections):
        lines += ["", "training (and every field of transformers.TrainingArguments):"] if number else []
        for item in fields(kind):
            if names is None or item.name in names:
                lines.append(f"  --{item.name:<28} {item.metadata.get('help', '')}")
    return "\n".join(lines)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that are installed with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of one that ships."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise ValueError(f"there is no recipe {name}: neither a YAML file of settings, nor one of {', '.join(shipped)}")


class _Loader(yaml.SafeLoader):
    """YAML in which a setting stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    with path.open() as file:
        try:
            settings = yaml.load(file, _Loader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, not a {type(settings).__name__}")
    return {name: _beside(path.parent, value) for name, value in settings.items()}


def _beside(folder: Path, value: Any) -> Any:
    """The value with each path of a file of functions or rows that is relative to the recipe's folder made one from here."""
    if isinstance(value, dict):
        return {key: _beside(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(folder, item) for item in value]
    if isinstance(value, str) and (found := _FILE.fullmatch(value)) and (folder / (found[1] or value)).is_file():
        return str(folder / value)
    return value


def _declared_types() -> dict[str, tuple[type, ...]]:
    """The types that each setting's field is declared with."""
    hints = get_type_hints(GRPOConfig) | get_type_hints(RunArguments)
    known = {item.name for kind in (RunArguments, GRPOConfig) for item in fields(kind)}
    return {name: get_args(hint) or (hint,) for name, hint in hints.items() if name in known}


def _from_command_line(text: str, declared: tuple[type, ...]) -> Any:
    """YAML, except that what can only be text stays it: {question} is a template, 001 a name."""
    value = yaml.safe_load(text)
    only_text = bool(declared) and set(declared) <= {str, type(None)}
    return text if only_text and (not text or value is not None) and not isinstance(value, bool) else value


def _as_declared(name: str, value: Any, declared: tuple[type, ...]) -> Any:
    """The value as its field is declared, where YAML reads it otherwise: 1e-5 as a string, no as False."""
    if isinstance(value, str) and str not in declared and {int, float} & set(declared):
        if not _NUMBER.fullmatch(value):
            raise ValueError(f"{name}={value!r} is not a number")
        value = float(value)
        return int(value) if float not in declared and value.is_integer() else value
    if value is False and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in declared):
        return "no"
    if isinstance(value, dict | list) and declared and set(declared) <= {str, type(None)}:
        raise ValueError(f"{name} must be text, not {value!r}; put quotes around it")
    return value
