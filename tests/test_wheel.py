"""A wheel has all that a user needs: recipes and configurations by name from any folder, and a folder to start from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel was installed into, built from a copy, since a build writes next to its source."""
    source, folder = tmp_path_factory.mktemp("source") / "grpo_hf", tmp_path_factory.mktemp("installed")
    unwanted = shutil.ignore_patterns(".git", ".venv", "tests", "benchmarks", "docs", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)], folder)
    return folder


def run(command: list[str], folder: Path, *, cwd: Path | None = None) -> str:
    """What a command prints, run where only the installed package can be found."""
    done = subprocess.run(
        command, cwd=cwd or folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "grpo_hf", *arguments]


def test_a_shipped_recipe_trains_by_name_from_anywhere(installed: Path, tmp_path: Path) -> None:
    told = run(command("train", "toy_sorting", "--max_steps=2", "--save_strategy=no"), installed, cwd=tmp_path)
    assert told.splitlines()[-1].endswith(" held-out 3")
    assert (tmp_path / "runs" / "toy_sorting" / "metrics.jsonl").is_file()


def test_it_lists_what_ships(installed: Path, tmp_path: Path) -> None:
    listed = run(command("recipes"), installed, cwd=tmp_path)
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in listed
    ddp = run(command("recipes", "ddp"), installed, cwd=tmp_path).strip()
    assert Path(ddp).read_text() == (ROOT / "accelerate_configs" / "ddp.yaml").read_text()
    assert Path(ddp).is_relative_to(installed) and (installed / "grpo_hf" / "py.typed").is_file()
    assert run(command("--version"), installed).startswith("grpo-hf 0.")


def test_a_folder_to_start_from(installed: Path, tmp_path: Path) -> None:
    said = run(command("init", "my_task"), installed, cwd=tmp_path)
    assert "grpo-hf train recipe.yaml" in said
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], installed, cwd=tmp_path / "my_task")
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"completion": "\\\\boxed{42}", "answer": 42}\n')
    verify = command("verify", str(samples), "--reward", "my_task/verifier.py:right_number")
    assert "right_number" in run(verify, installed, cwd=tmp_path)
    again = subprocess.run(
        command("init", "my_task"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "my_task is there already, and nothing in it was changed" in again.stderr
