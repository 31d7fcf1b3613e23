"""Runs what README, docs and the notebook show, as it stands, beside small models and rows under the names that it uses."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_hf.cli import COMMANDS, main
from grpo_hf.cli.recipe import parse
from grpo_hf.rewards import get_rewards
from tests.agents import agent_model, agent_tokenizer

ROOT = Path(__file__).parents[1]
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "bigger-model")
ROWS = [{"question": f"How much is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TRAIN = re.compile(r"(?:-m grpo_hf train|grpo-hf train|recipes/train\.py) +([\w/.]+)((?: +--\w+(?:[ =][^\s&-][^\s&]*)?)*)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str
    line: int
    """Where it begins in its page."""
    why: str | None
    """Why it is not run: what `<!-- not run: ... -->` before it says; its settings are read all the same."""


def blocks_of(page: Path) -> list[Block]:
    """A page's blocks, or a notebook's cells of code."""
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
        return [Block("notebook", "".join(cell["source"]), number, None) for number, cell in enumerate(cells)]
    text = page.read_text()
    return [
        Block(found["language"], found["text"], text[: found.start("text")].count("\n"), found["why"])
        for found in _BLOCK.finditer(text)
    ]


def make_folder(folder: Path) -> None:
    """A folder to work in: small models, a few of GSM8K's rows and the recipes, by the names that a reader has them by."""
    model = agent_model()
    model.config.max_position_embeddings = 1024
    for name in MODELS:
        model.save_pretrained(folder / name)
        agent_tokenizer().save_pretrained(folder / name)
    data = folder / "openai" / "gsm8k"
    data.mkdir(parents=True)
    splits = [{"split": "train", "path": "train.jsonl"}, {"split": "test", "path": "test.jsonl"}]
    (data / "README.md").write_text(f"---\nconfigs: {json.dumps([{'config_name': 'main', 'data_files': splits}])}\n---\n")
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)


def run_block(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run it, or read its settings where it says why it cannot be run; ``names`` are those of the blocks before it."""
    RUN[block.language](block, page, names)


def _python(block: Block, page: Path, names: dict[str, Any]) -> None:
    code = compile("\n" * block.line + block.text, str(page), "exec")  # so that a traceback names the page's own line
    if named := re.match(r"# (\w+\.py)\n", block.text):
        Path(named[1]).write_text(block.text)
    if block.why is None:
        exec(code, names)


def _notebook(block: Block, page: Path, names: dict[str, Any]) -> None:
    """A cell: Python, a file to write, or commands after `!`; what `%pip` installs is there."""
    if written := re.match(r"%%writefile (\S+)\n", block.text):
        Path(written[1]).parent.mkdir(exist_ok=True)
        Path(written[1]).write_text(block.text[written.end() :])
        return
    lines = block.text.splitlines()
    commands = [line[1:] for line in lines if line.startswith(("!", "%"))]
    for command in commands:
        _command(command, run=True)
    _python(Block("python", "\n".join(line for line in lines if line[:1] not in ("!", "%")), block.line, None), page, names)


def _yaml(block: Block, page: Path, names: dict[str, Any]) -> None:
    """A recipe, or a part of one, under the name in its first line."""
    named = re.match(r"# (\S+\.yaml)\b", block.text)
    path = Path(named[1] if named else "part.yaml")
    path.write_text(block.text)
    run, _ = parse([str(path)])
    get_rewards(run.rewards)


def _bash(block: Block, page: Path, names: dict[str, Any]) -> None:
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        _command(line, run=block.why is None)
    for recipe, options in _TRAIN.findall(re.sub(r"""['"]""", "", text)):
        if recipe.endswith(".yaml"):
            parse([recipe, *shlex.split(options)])


def _command(line: str, *, run: bool) -> None:
    """One line of a shell; raises for a command that is not there, or that fails."""
    words = shlex.split(line, comments=True) if run else line.partition("#")[0].split()
    if not words:
        return
    if words[0] == "grpo-hf":
        assert words[1] in COMMANDS or words[1].startswith("--"), line
        if run:
            assert main(words[1:]) == 0, line
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"(?:grpo_hf|\.)\[([\w-]+)\]", line)) <= set(extras), line
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), line
    elif words[:2] == ["accelerate", "launch"]:
        configs = [word for word in words if word.startswith("accelerate_configs/")]
        assert all((ROOT / config).is_file() for config in configs), line
    else:
        assert not run, f"{line!r}: say before the block why it is not run: <!-- not run: ... -->"


def _toml(block: Block, page: Path, names: dict[str, Any]) -> None:
    tomllib.loads(block.text)


def _text(block: Block, page: Path, names: dict[str, Any]) -> None:
    """What something prints, or doctests, which are run with their functions."""


RUN: dict[str, Callable[[Block, Path, dict[str, Any]], None]] = {
    "python": _python,
    "yaml": _yaml,
    "bash": _bash,
    "toml": _toml,
    "json": lambda block, page, names: json.loads(block.text),
    "notebook": _notebook,
    "text": _text,
    "pycon": _text,
}


def links_of(page: Path) -> Iterator[str]:
    """Where a page's links and pictures lead, without what stands in code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(page: Path) -> set[str]:
    """The names of its headings, as they are linked to."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
