"""Which checkpoints are whole, and what this trainer adds to them.

A checkpoint is whole once its manifest is there, which is written last and holds every file's size and digest. A run that
is killed while it saves leaves a checkpoint without one; a file that is damaged later does not fit its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"


def is_finished(checkpoint: Path) -> bool:
    """Whether it has its manifest; `damage` says whether it is whole."""
    return (checkpoint / MANIFEST).is_file()


def begin(checkpoint: Path) -> None:
    """A checkpoint of this name that an earlier attempt has left is whole no more."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def save_part(state: dict[str, Any], checkpoint: Path, rank: int) -> None:
    """Write one process's part."""
    torch.save(state, checkpoint / f"rollout-{rank}.pt")


def load_part(checkpoint: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """Read it back."""
    return torch.load(checkpoint / f"rollout-{rank}.pt", map_location=device, weights_only=False)


def finish(checkpoint: Path, run: dict[str, Any]) -> None:
    """Write the manifest, when all processes have written their parts; ``run`` says what run this is of."""
    partial = checkpoint / f"{MANIFEST}.partial"
    partial.unlink(missing_ok=True)
    partial.write_text(json.dumps({"run": run, "files": _describe(checkpoint)}, indent=1))
    os.replace(partial, checkpoint / MANIFEST)


def run_of(checkpoint: Path) -> dict[str, Any]:
    """What run a checkpoint is of."""
    return json.loads((checkpoint / MANIFEST).read_text())["run"]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    if not is_finished(checkpoint):
        return f"it has no {MANIFEST}: it was never finished"
    written, found = json.loads((checkpoint / MANIFEST).read_text())["files"], _describe(checkpoint)
    for name, (size, digest) in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != [size, digest]:
            return f"{name} has {found[name][0]} bytes, or others, instead of the {size} that were written"
    return None


def _describe(checkpoint: Path) -> dict[str, list]:
    """[bytes, digest] of every file but the manifest, by name."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        described = threads.map(lambda path: [path.stat().st_size, _digest(path)], paths)
        return {str(path.relative_to(checkpoint)): entry for path, entry in zip(paths, described, strict=True)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; those that are newer and damaged are named in a warning."""
    for checkpoint in checkpoints_in(folder):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is not used: {problem}")
    return None


def resume_point(wanted: str | bool | None, folder: Path) -> Path | None:
    """What resume_from_checkpoint means: None or False, a path, True (the newest), or "auto" (the newest, if any).

    Raises ValueError when the checkpoint that is asked for is not there or not whole.
    """
    if wanted in (None, False, "false"):
        return None
    if wanted in (True, "true", "auto"):
        newest = newest_checkpoint(folder)
        if newest is None and wanted != "auto":
            raise ValueError(f"resume_from_checkpoint={wanted}: {folder} has no whole checkpoint; 'auto' starts anew then")
        return newest
    path = Path(str(wanted))
    problem = damage(path)
    if problem is not None:
        newest = newest_checkpoint(path.parent)
        hint = f"; the newest whole one beside it is {newest}" if newest else ""
        raise ValueError(f"resume_from_checkpoint={wanted} is not a whole checkpoint of this trainer: {problem}{hint}")
    return path
