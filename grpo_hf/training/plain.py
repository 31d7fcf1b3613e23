"""The state of a run as tensors and plain data, which `torch.load(weights_only=True)` takes, and back."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.types import Prompt

CLASS, ROW = "__dataclass__", "__row__"
"""Keys that stand for one of this package's dataclasses, with its fields beside, and for a prompt of the training data."""


def to_plain(value: Any) -> Any:
    """Dataclasses of this package as dicts of their fields, prompts by their row. Raises TypeError for what is not plain."""
    if isinstance(value, Prompt):
        return {ROW: value.index}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        made = {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
        return {CLASS: f"{kind.__module__}:{kind.__qualname__}"} | made
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(to_plain(item) for item in value)
    if value is None or isinstance(value, Tensor | bool | str | bytes):
        return value
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    raise TypeError(f"a checkpoint holds tensors and plain data, not {type(value).__qualname__}: {value!r:.100}")


def from_plain(value: Any, prompts: PromptSet) -> Any:
    """Undo `to_plain`; ``prompts`` are the training data. Raises ValueError for a class that is not of this package."""
    if isinstance(value, dict) and ROW in value:
        return prompts[prompts.kept.index(value[ROW])]
    if isinstance(value, dict):
        made = {key: from_plain(item, prompts) for key, item in value.items() if key != CLASS}
        return _dataclass(value[CLASS])(**made) if CLASS in value else made
    if isinstance(value, list | tuple | set):
        return type(value)(from_plain(item, prompts) for item in value)
    return value


def _dataclass(name: str) -> type:
    module, _, qualname = name.partition(":")
    kind = getattr(importlib.import_module(module), qualname, None) if module.startswith("grpo_hf.") else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"a checkpoint names {name!r}, which is no dataclass of this package")
    return kind
