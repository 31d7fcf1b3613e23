"""What a module loads when it is imported. Who may import whom stands in pyproject.toml, and `lint-imports` checks it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "vllm")
LOADS = {
    "grpo_hf": (),
    "grpo_hf.types": (),
    "grpo_hf.packing.tree": (),
    "grpo_hf.rewards": (),
    "grpo_hf.reward_fns.math, grpo_hf.reward_fns.code, grpo_hf.reward_fns.sorting": (),
    "grpo_hf.algorithm.objective, grpo_hf.algorithm.advantages, grpo_hf.packing.layout": ("torch",),
}
"""Modules, and which of HEAVY they may load: a worker that verifies waits for no tensor library."""

WITH_AN_EXTRA = {"hosted_client": "verifiers"}
"""Modules that need a package that may not be installed, by their last name."""

EVERY_MODULE = f"""
import importlib, importlib.util, pkgutil, grpo_hf
for module in pkgutil.walk_packages(grpo_hf.__path__, "grpo_hf."):
    name = module.name.rsplit(".")[-1]
    package = {WITH_AN_EXTRA}.get(name)
    if name != "__main__" and (package is None or importlib.util.find_spec(package)):
        importlib.import_module(module.name)
"""


def loaded_by(program: str) -> set[str]:
    """Which of HEAVY a new process has loaded after it."""
    program += f"\nimport json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("modules", "heavy"), LOADS.items(), ids=LOADS)
def test_what_a_module_loads(modules: str, heavy: tuple[str, ...]) -> None:
    assert loaded_by(f"import {modules}") <= set(heavy)


def test_vllm_is_imported_when_it_is_started_and_not_before() -> None:
    assert loaded_by(EVERY_MODULE) == set(HEAVY) - {"vllm"}
