"""`grpo-hf init FOLDER`: a recipe, a verifier with its test, and a few rows, to make your own of."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

START = Path(__file__).parent / "start"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say what to do in it."""
    parser = argparse.ArgumentParser(prog="grpo-hf init", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    folder: Path = parser.parse_args(argv).folder
    if folder.exists():
        raise ValueError(f"{folder} is there already, and nothing in it was changed; name a folder that is not")
    folder.mkdir(parents=True)
    for file in sorted(START.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    print(f"{folder}: rows.jsonl, verifier.py, test_verifier.py, recipe.yaml. Then:")
    print(f"  cd {folder} && pytest                                # is the verifier right? (pip install pytest)")
    print("  grpo-hf eval --recipe recipe.yaml --data rows.jsonl  # is the model ever right, before it is trained?")
    print("  grpo-hf train recipe.yaml                            # --resume_from_checkpoint auto goes on after a stop")
    return 0
