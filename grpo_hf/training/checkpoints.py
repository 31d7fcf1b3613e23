"""Which checkpoints are whole, and what this trainer adds to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

LAST_WRITTEN = "rollout-0.pt"
"""A checkpoint that holds this file was finished; a run that is killed while it saves leaves one without."""


def save_last(state: dict[str, Any], checkpoint: Path, rank: int) -> None:
    """Write one process's part, under its name only once it is whole."""
    partial = checkpoint / f"rollout-{rank}.partial"
    torch.save(state, partial)
    os.replace(partial, checkpoint / f"rollout-{rank}.pt")


def load_last(checkpoint: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """Read it back."""
    return torch.load(checkpoint / f"rollout-{rank}.pt", map_location=device, weights_only=False)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{LAST_WRITTEN}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


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
    if not (path / LAST_WRITTEN).is_file():
        newest = newest_checkpoint(path.parent)
        hint = f"; the newest whole one beside it is {newest}" if newest else ""
        raise ValueError(f"resume_from_checkpoint={wanted} is not a whole checkpoint of this trainer{hint}")
    return path
