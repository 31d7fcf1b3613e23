"""`grpo-hf recipes`: what `grpo-hf train NAME` takes by name from anywhere, and where its file is, to copy it.

accelerate launch --config_file "$(grpo-hf recipes ddp)" -m grpo_hf train gsm8k_lora
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from grpo_hf.cli.recipe import shipped_recipes

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Print each with the comment at its head."""
    parser = argparse.ArgumentParser(prog="grpo-hf recipes", description=__doc__)
    parser.add_argument("name", nargs="?", help="print the path of this recipe, or of this configuration of accelerate")
    name = parser.parse_args(argv).name
    recipes = shipped_recipes()
    known = recipes | {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name is None:
        for recipe, path in recipes.items():
            head = itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines())
            text = " ".join(line[2:] for line in head if not line.startswith("#  "))
            print(textwrap.fill(text, 110, initial_indent=f"{recipe:<16}", subsequent_indent=" " * 16))
        print(f"\nconfigurations of accelerate: {', '.join(sorted(known.keys() - recipes.keys()))}")
        return 0
    if name not in known:
        raise ValueError(f"there is no recipe or configuration {name!r}, only {', '.join(known)}")
    print(known[name])
    return 0
