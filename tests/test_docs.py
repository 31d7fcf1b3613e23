"""README and docs: what they show runs, their links lead somewhere, and what is generated says what the code says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import TrainerCallback

from docs.pages import PAGES
from docs.picture import learning_of_smollm2, picture
from grpo_hf import GRPOConfig, GRPOTrainer
from grpo_hf.rewards import registry
from tests.snippets import MODELS, ROOT, anchors_of, blocks_of, links_of, make_folder, run_block

WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SHOWN = [page for page in [*WRITTEN, *sorted((ROOT / "docs").glob("*.ipynb"))] if blocks_of(page)]


class TwoSteps(TrainerCallback):
    """Ends a run early."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        control.should_training_stop |= state.global_step >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reader")
    make_folder(made)
    return made


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in one folder and with one another's names; training ends after two steps."""
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    train = GRPOTrainer.train

    def two_steps(self: GRPOTrainer, *arguments: object, **options: object) -> object:
        self.add_callback(TwoSteps())
        return train(self, *arguments, **options)

    monkeypatch.setattr(GRPOTrainer, "train", two_steps)
    names = {
        "__name__": "__main__",
        # What a page that shows a part leaves to its reader:
        "GRPOConfig": GRPOConfig,
        "GRPOTrainer": GRPOTrainer,
        "model": MODELS[0],
        "args": GRPOConfig(output_dir="runs/part", max_completion_length=60, max_steps=1),
        "train_dataset": [{"prompt": [{"role": "user", "content": "one"}], "number": 3}],
        "right_number": lambda completion: 1.0,
    }
    known = dict(registry._registry)
    for block in blocks_of(page):
        monkeypatch.setattr(registry, "_registry", dict(known))
        run_block(block, page, names)


def test_every_block_has_a_language_and_most_are_run() -> None:
    """What is not run needs machines, the network or minutes, and says so; without a language it would not be seen."""
    for page in WRITTEN:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert all(fences[::2]) and not any(fences[1::2]), page
        assert len(fences) == 2 * len(blocks_of(page)), page
    blocks = [block for page in SHOWN for block in blocks_of(page) if block.language in ("python", "bash", "notebook")]
    assert sum(block.why is None for block in blocks) >= 0.7 * len(blocks)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors_of(there), f"{page.name} links to {link}, which has {anchors_of(there)}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_and_tests_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|docs|tests)\.\w+)", text):
        assert find_spec(module), f"{page.name} names {module}"
    for name in re.findall(r"\b(test_\w+\.py)", text):
        assert list((ROOT / "tests").rglob(name)) or name == "test_verifier.py", f"{page.name} names {name}"


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_says_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run: make docs"


def test_the_picture_shows_the_last_results() -> None:
    assert (ROOT / "docs" / "step.svg").read_text() == picture(), "run: make docs"
    assert (ROOT / "docs" / "smollm2.svg").read_text() == learning_of_smollm2(), "run: make docs"


def test_figures_are_those_of_the_last_results() -> None:
    """What README says at first sight is what the benchmarks' files say."""
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    equal, shared, turns = (
        results["training_step"]["cases"][name] for name in ("192 / 64, equal lengths", "shared system prompt", "four turns")
    )
    rival = [case["prefix_grouper_over_grpo_hf"]["wall_s"] for case in (equal, shared, turns)]
    said = {
        f"{equal['trl_over_grpo_hf']['wall_s']:.1f} × faster than TRL",
        f"{rival[0]:.2f} to {rival[1]:.1f} × than the fastest rival",
        f"{results['trl_suite']['pass with grpo_hf']} of {results['trl_suite']['pass with TRL']} of TRL's own tests",
    }
    assert f"{rival[2]:.1f}" == "1.0", "the same where only turns are shared"
    readme = (ROOT / "README.md").read_text()
    assert not [text for text in said if text not in readme]


def test_readme_takes_two_minutes() -> None:
    """Words at 250 a minute, links' targets and blocks of code aside."""
    text = re.sub(r"^```.*?^```$|\]\([^)]*\)", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\w+", text)) <= 500


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "grpo-hf init my_task" in re.sub(r"<[^>]+>", "", (tmp_path / "index.html").read_text())
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / page.stem / "index.html").is_file()
