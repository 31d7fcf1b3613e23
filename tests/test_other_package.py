"""Verifiers of others: a package that is pip-installed and used by name, a file, and the docs' few lines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_hf.cli.train import main
from grpo_hf.rewards import get_reward, registry
from tests.snippets import blocks_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "other_package"
TWO_STEPS = [
    "--max_steps=2",
    "--num_iterations=1",
    "--logging_steps=1",
    "--write_report=false",
    "--save_strategy=no",
    "--disable_tqdm=true",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into, from a copy, since a build writes next to its source."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "other_package")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run where this project's own tests are not on the path but `folder` is."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recipe(folder: Path, rewards: str) -> Path:
    """The toy recipe with other rewards; two steps of it take no time."""
    text = (ROOT / "recipes" / "toy_sorting.yaml").read_text().replace("toy_sorting.py:", f"{ROOT}/recipes/toy_sorting.py:")
    for name, line in {"rewards": rewards, "reward_weights": "[1.0, 0.5]", "headline": "sort_distance"}.items():
        text = re.sub(rf"^{name}:.*$", lambda match, line=f"{name}: {line}": line, text, flags=re.MULTILINE)
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def metric(folder: Path, name: str) -> list[float]:
    """A metric's values by step, as they are logged."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]


def test_an_installed_packages_verifier_by_name_from_yaml(installed: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, '[sort_distance, {name: says_please, word: ""}]')
    train = [sys.executable, "recipes/train.py", str(path), f"--output_dir={tmp_path / 'run'}", *TWO_STEPS]
    assert run(train, installed).splitlines()[-1].endswith(" held-out 3")
    assert metric(tmp_path, "rewards/says_please/mean") == [pytest.approx(1 / 3)] * 2, "each prompt has three numbers"


def test_an_installed_packages_verifier_by_name_from_python(installed: Path) -> None:
    script = (
        "from grpo_hf.rewards import gate, get_reward, known_rewards\n"
        "reward = get_reward('says_please')\n"
        "assert 'says_please' in known_rewards() and reward.columns == ('numbers',)\n"
        "print(reward.function('yes please', [1, 2]), gate('says_please', 'sorting')(completion='1', numbers=[1]))"
    )
    assert run([sys.executable, "-c", script], installed) == "0.5 0.0\n"


def test_it_is_not_found_where_it_is_not_installed() -> None:
    with pytest.raises(ValueError, match="unknown reward 'says_please'"):
        get_reward("says_please")


def test_the_docs_lines_work_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    (shown,) = [block for block in blocks_of(ROOT / "docs" / "rewards.md") if "@register_reward" in block.text]
    exec(shown.text, {"__name__": "my_rewards"})
    reward = get_reward("says_please")
    assert reward.columns == ("politeness",)
    assert [reward.function(completion=text, politeness=0.5) for text in ("Tea, please", "Tea")] == [0.5, 0.0]


def test_a_file_and_a_function_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_rewards.py").write_text("def longest(completion, numbers):\n    return float(max(numbers))\n")
    path = recipe(tmp_path, f"[sort_distance, '{tmp_path}/my_rewards.py:longest']")
    main([str(path), f"--output_dir={tmp_path / 'run'}", *TWO_STEPS])
    assert metric(tmp_path, "rewards/longest/mean") == [pytest.approx(3.0)] * 2, "of the lecture's prompts: 2, 4 and 3"
