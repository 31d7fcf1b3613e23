"""Imports point down the layers only: this reads them from the source and names every arrow that points up."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("grpo_hf", "reward_fns", "recipes")

# What each room may import of ours, besides itself. A file right under grpo_hf/ is a room of its own, and
# grpo_hf/__init__.py is the room "grpo_hf", which only hands on what users import.
BELOW_TRAINING = {"rollout", "rewards", "packing", "algorithm", "types", "metrics"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "metrics": set(),
    "algorithm": {"types"},
    "packing": {"algorithm", "types"},
    "isolation": set(),
    "rewards": {"isolation", "algorithm", "types"},
    "rollout": {"rewards", "packing", "algorithm", "types", "metrics"},
    "report": {"algorithm", "types"},
    "evaluation": BELOW_TRAINING,
    "training": BELOW_TRAINING | {"evaluation", "report"},
    "toy": {"algorithm", "reward_fns", "rewards", "report"},
    "cli": BELOW_TRAINING | {"training", "evaluation", "report", "toy", "grpo_hf"},
    "recipes": BELOW_TRAINING | {"training", "evaluation", "report", "toy", "cli", "grpo_hf"},
    "reward_fns": {"rewards", "isolation", "types"},
    "grpo_hf": BELOW_TRAINING | {"training", "evaluation"},
}

# Pure mathematics: beyond the standard library these files import these packages and these rooms only.
PURE_FILES = ("grpo_hf/algorithm/*", "grpo_hf/packing/layout.py")
PURE_PACKAGES = {"torch", "einops", "jaxtyping", *sys.stdlib_module_names}
PURE_ROOMS = {"algorithm", "types"}

VLLM_FILES = "grpo_hf/rollout/vllm*.py"


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute dotted name."""

    module: str
    line: int
    lazy: bool
    """Inside a function, so that it runs only when called."""


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every import of a file: ``import``, ``from`` (relative too) and ``import_module("...")``, at any depth."""
    package = path.removesuffix(".py").split("/")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for module in _modules(node, package):
            yield Import(module, node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def _modules(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        # ``from grpo_hf import training`` imports grpo_hf.training.
        return [f"{base}.{alias.name}" for alias in node.names] if base in SOURCES else [base]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return [str(node.args[0].value)] if called in ("import_module", "__import__") else []
    return []


def room_of(module: str) -> str:
    """``grpo_hf.training.trainer`` -> training; ``reward_fns.sorting`` -> reward_fns; ``grpo_hf`` -> grpo_hf."""
    first, _, rest = module.partition(".")
    inside = rest.split(".")[0]
    return inside if first == "grpo_hf" and inside in MAY_IMPORT else first


def room_of_file(path: str) -> str:
    """The room that a file is in; ``path`` is relative to the repository."""
    return room_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def violations(path: str, source: str) -> list[str]:
    """What a file imports and may not, one line each."""
    room, pure = room_of_file(path), any(fnmatch(path, pattern) for pattern in PURE_FILES)
    found = []
    for imported in imports_of(path, source):
        package, target, reason = imported.module.split(".")[0], room_of(imported.module), ""
        if package in SOURCES and target not in {room, *MAY_IMPORT.get(room, ())}:
            reason = f"{room} may not import {target}"
        elif pure and target not in PURE_ROOMS | PURE_PACKAGES:
            reason = f"pure files do not import {target}"
        elif package == "vllm" and not (fnmatch(path, VLLM_FILES) and imported.lazy):
            reason = f"vllm is imported inside functions of {VLLM_FILES} only"
        if reason:
            found.append(f"{path}:{imported.line}: {imported.module}: {reason}")
    return found


FILES = [path.relative_to(ROOT).as_posix() for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES)
def test_no_arrow_points_up(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_every_file_has_its_room() -> None:
    rooms = {room_of_file(path) for path in FILES}
    assert rooms <= set(MAY_IMPORT)
    assert {"algorithm", "toy", "types"} <= rooms
    modules = [path for path in FILES if path.startswith("grpo_hf/") and path != "grpo_hf/__init__.py"]
    assert [path for path in modules if room_of_file(path) == "grpo_hf"] == [], "give it a room in MAY_IMPORT"


def test_the_table_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [room for room in MAY_IMPORT if room not in order and MAY_IMPORT[room] <= set(order)]
        assert ready, f"these import each other: {sorted(set(MAY_IMPORT) - set(order))}"
        order += ready


PLANTED = {
    "up one step": ("grpo_hf/rewards/registry.py", "from grpo_hf.rollout.engine import Sampling", 1),
    "up to the top": ("grpo_hf/algorithm/kl.py", "import grpo_hf.training.trainer", 1),
    "from the package": ("grpo_hf/packing/layout.py", "from grpo_hf import training", 1),
    "relative": ("grpo_hf/rewards/scorer.py", "from ..rollout import engine", 1),
    "relative, package in the names": ("grpo_hf/algorithm/kl.py", "from .. import rollout", 1),
    "inside a function": ("grpo_hf/rollout/prompts.py", "def f():\n    from grpo_hf.training import config", 1),
    "by import_module": ("grpo_hf/rewards/loading.py", "importlib.import_module('grpo_hf.cli.train')", 1),
    "between neighbours": ("grpo_hf/packing/layout.py", "from grpo_hf.rewards import Scorer", 1),
    "the carriers know nothing": ("grpo_hf/types.py", "from grpo_hf.algorithm.kl import k1", 1),
    "the report trains nothing": ("grpo_hf/report/page.py", "from grpo_hf.rollout import engine", 1),
    "the toy is small": ("grpo_hf/toy/train.py", "from grpo_hf.packing import layout", 1),
    "shipped verifiers by name only": ("grpo_hf/rewards/registry.py", "from reward_fns import sorting", 1),
    "verifiers see the registry only": ("reward_fns/gsm8k.py", "from grpo_hf.training import config", 1),
    "a recipe is not a library": ("grpo_hf/training/trainer.py", "import recipes.train", 1),
    "transformers in algorithm": ("grpo_hf/algorithm/losses.py", "from transformers import Trainer", 1),
    "transformers in layout": ("grpo_hf/packing/layout.py", "import transformers.masking_utils", 1),
    "layout through a neighbour": ("grpo_hf/packing/layout.py", "from grpo_hf.packing.attention import x", 1),
    "vllm at the top": ("grpo_hf/rollout/vllm_engine.py", "import vllm", 1),
    "vllm in a class body": ("grpo_hf/rollout/vllm_engine.py", "class A:\n    from vllm import LLM", 1),
    "vllm elsewhere": ("grpo_hf/training/trainer.py", "def f():\n    from vllm import LLM", 1),
    "two at once": ("grpo_hf/algorithm/kl.py", "import transformers, grpo_hf.rollout", 2),
}


@pytest.mark.parametrize(("path", "source", "count"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_caught(path: str, source: str, count: int) -> None:
    found = violations(path, f"import math\n{source}\n")
    assert len(found) == count
    assert found[0].startswith(f"{path}:{3 if chr(10) in source else 2}: ")


ALLOWED = {
    "down": ("grpo_hf/training/trainer.py", "from grpo_hf.rollout.engine import Engine\nimport transformers"),
    "within a room": ("grpo_hf/algorithm/losses.py", "from grpo_hf.algorithm.sequences import sequence_mean"),
    "relative within a room": (
        "grpo_hf/rewards/scorer.py",
        "from .registry import check_columns\nfrom . import registry",
    ),
    "the carriers": ("grpo_hf/packing/layout.py", "from grpo_hf.types import Group"),
    "recipes": ("recipes/train.py", "from grpo_hf.training import GRPOTrainer\nimport grpo_hf.toy.hf_model"),
    "the toy": ("grpo_hf/toy/train.py", "from reward_fns.sorting import distance\nfrom grpo_hf.algorithm.kl import k1"),
    "vllm, lazily": ("grpo_hf/rollout/vllm_engine.py", "def f():\n    from vllm import LLM"),
    "a verifier": ("reward_fns/mine.py", "from grpo_hf.rewards import register_reward"),
}


@pytest.mark.parametrize(("path", "source"), ALLOWED.values(), ids=ALLOWED)
def test_what_the_design_allows_is_not_caught(path: str, source: str) -> None:
    assert violations(path, source) == []
