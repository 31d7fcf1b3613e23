"""Saving and loading what this trainer adds to checkpoints, and which of them are whole.

A checkpoint is whole once its manifest is there, which is written last, when all else is on the disk, and holds every
file's size and digest. A run that is killed while it saves leaves a checkpoint without one; a file that is damaged later
does not fit its digest. What is loaded is tensors and plain data: no checkpoint can make this process run its code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging

from grpo_hf.files import sync, write_whole
from grpo_hf.metrics import Metrics
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Update, shares
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.rollout.stream import Rollout
from grpo_hf.training.guards import is_disk_full
from grpo_hf.training.plain import from_plain, to_plain

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
FORM = 2
"""Of a checkpoint; changes when an older trainer's could not be read."""


class Stateful(Protocol):
    """A part of a run with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on with that."""


@dataclass
class Checkpoints:
    """Saves and loads the parts of a run that transformers' Trainer does not know of."""

    parts: Mapping[str, Stateful]
    """Those that each process has its own of, by name."""
    shared: Mapping[str, Stateful]
    """Those that are the same on all processes."""
    peers: Peers
    """The processes."""
    metrics: Metrics
    """Where it is written that a disk was full."""
    prompts: PromptSet
    """The training data, which a checkpoint knows by the numbers of its rows."""
    unsaved: str | None = None
    """Why the last checkpoint is not there, when it is not."""
    failures: int = 0
    """Checkpoints that could not be saved."""

    def save(
        self,
        folder: Path,
        others: Callable[[], None],
        more: dict[str, Any],
        *,
        run: dict[str, Any],
        weights_only: bool = False,
    ) -> bool:
        """Write a checkpoint: what ``others`` writes, the parts, ``more``, and last the manifest of this ``run``;
        ``weights_only``: it lacks what a run would need to go on.

        On a full disk what was written is removed, with a warning, and the answer is False.
        """
        problems = self.peers.gather(self._unless_disk_full(folder, lambda: self._write(folder, others, more)))
        if not any(problems) and self.peers.rank == 0:
            manifest: dict[str, Any] = {"form": FORM, "weights_only": weights_only, "processes": self.peers.count}
            manifest |= {"shared": [*self.shared], "run": run}
            problems = [self._unless_disk_full(folder, lambda: finish(folder, manifest))]
        self.unsaved = next((problem for part in self.peers.gather(problems) for problem in part if problem), None)
        if self.unsaved:
            self.failures += 1
            self.metrics.maximum("guards/disk_full", self.failures)
            if self.peers.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                logger.warning(f"{self.unsaved}. What was written of it is removed, and training goes on")
        return self.unsaved is None

    def _write(self, folder: Path, others: Callable[[], None], more: dict[str, Any]) -> None:
        if self.peers.rank == 0:
            (folder / MANIFEST).unlink(missing_ok=True)  # one of this name, of an earlier attempt, is whole no more
        others()
        if self.peers.rank == 0:
            for name, part in self.shared.items():
                torch.save(part.state_dict(), folder / f"{name}.pt")
        state = more | {name: part.state_dict() for name, part in self.parts.items()}
        save_part(to_plain(state), folder, self.peers.rank)

    def load(self, folder: Path, device: torch.device, *, sampled_otherwise: bool = False) -> dict[str, Any]:
        """Give every part its state; returns all that was saved, with ``more``. ``sampled_otherwise``: what was sampled
        ahead is sampled again."""
        if device.type == "cpu":  # of several processes it is cpu:1, say, which torch.load does not know
            device = torch.device("cpu")
        manifest = read_manifest(folder)
        if unused := set(manifest["shared"]) - self.shared.keys():
            raise ValueError(
                f"{folder} holds a moving {', '.join(unused)}, which this run has none of; set beta and sync_ref_model as "
                "they were"
            )
        if manifest["processes"] == self.peers.count:
            state = self._read(folder, self.peers.rank)
        else:
            states = [self._read(folder, rank) for rank in range(manifest["processes"])]
            state = for_other_processes(states, step_of(folder), self.peers)
        if sampled_otherwise:
            state["stream"]["ahead"] = None
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name in manifest["shared"]:
            self.shared[name].load_state_dict(torch.load(folder / f"{name}.pt", map_location=device, weights_only=True))
        return state

    def _read(self, folder: Path, rank: int) -> dict[str, Any]:
        return from_plain(torch.load(folder / f"rollout-{rank}.pt", map_location="cpu", weights_only=True), self.prompts)

    def _unless_disk_full(self, folder: Path, write: Callable[[], None]) -> str | None:
        """Call it; what to say when the disk is full."""
        try:
            write()
        except Exception as error:
            if not is_disk_full(error):
                raise
            free = shutil.disk_usage(folder.parent).free
            kept = ", ".join(path.name for path in checkpoints_in(folder.parent) if is_finished(path)) or "none"
            return f"{folder} cannot be saved, the disk has {free} bytes free ({error}); checkpoints that are kept: {kept}"
        return None


def save_part(state: dict[str, Any], checkpoint: Path, rank: int) -> None:
    """Write one process's part."""
    torch.save(state, checkpoint / f"rollout-{rank}.pt")


def for_other_processes(states: list[dict[str, Any]], step: int, peers: Peers) -> dict[str, Any]:
    """What one of ``peers`` goes on with, of a checkpoint that as many processes as there are states have written.

    Groups whose updates are to be run are shared anew. What was sampled ahead is sampled again, and the next log line is of
    the steps from here on.
    """
    state: dict[str, Any] = states[0] | {"recorder": {"metrics": Metrics().state_dict(), "logged": step}}
    state["stream"] = state["stream"] | {"ahead": None}
    if state["rollout"] is not None:
        parts = zip(*(other["rollout"].updates for other in states), strict=True)
        updates = [_shared_anew(list(part), peers) for part in parts]
        state["rollout"] = replace(state["rollout"], updates=updates)
    return state


def _shared_anew(parts: list[Update], peers: Peers) -> Update:
    samples = [sample for part in parts if not part.idle for sample in part.samples]
    mine = shares(samples, peers.count)[peers.rank]
    local = sum(part.denominators.local_tokens for part in parts) / peers.count
    smallest = min((sample for part in parts for sample in part.samples), key=lambda sample: len(sample.ids))
    denominators = replace(parts[0].denominators, num_processes=peers.count, local_tokens=local)
    return Update(mine or [smallest], denominators, idle=not mine)


def unfinished(rollout: Rollout | None, step: int, steps_per_rollout: int) -> Rollout | None:
    """What a checkpoint of this step needs of the rollout that is trained on: the updates, if there are any to run."""
    if rollout is None or rollout.index != step // steps_per_rollout:
        return None
    return replace(rollout, groups=[], sampled=[], tally={})


def is_finished(checkpoint: Path) -> bool:
    """Whether it has its manifest; `damage` says whether it is whole."""
    return (checkpoint / MANIFEST).is_file()


def finish(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with all files in it, when all processes have written their parts and these are on the disk."""
    for path in sorted(checkpoint.rglob("*"), reverse=True):
        sync(path)
    for folder in (checkpoint, checkpoint.parent):
        sync(folder)
    write_whole(checkpoint / MANIFEST, json.dumps(manifest | {"files": _describe(checkpoint)}, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest; ValueError where it is no manifest of this trainer."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "run" not in manifest:
        raise ValueError(f"its {MANIFEST} is no list of its files")
    if manifest.get("form") != FORM:
        raise ValueError(f"it was written in form {manifest.get('form', 1)}, by another version; this one reads form {FORM}")
    if "rollout-0.pt" not in manifest["files"]:
        raise ValueError(f"its {MANIFEST} does not list rollout-0.pt, which every checkpoint has")
    return manifest


def run_of(checkpoint: Path) -> dict[str, Any]:
    """What run a checkpoint is of."""
    return read_manifest(checkpoint)["run"]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    if not is_finished(checkpoint):
        return f"it has no {MANIFEST}: it was never finished"
    try:
        written, found = read_manifest(checkpoint)["files"], _describe(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
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
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that it was saved after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def rotate(folder: Path, limit: int | None, *, keep: Path, best: str | None) -> None:
    """Remove all checkpoints before ``keep``, the newest, but for the ``limit`` newest finished ones and the best."""
    if limit is None or limit <= 0:
        return
    earlier = [path for path in checkpoints_in(folder) if step_of(path) < step_of(keep)]
    spared = [path for path in earlier if is_finished(path)][: limit - 1]
    for path in earlier:
        if path not in spared and (best is None or path.name != Path(best).name):
            shutil.rmtree(path, ignore_errors=True)


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

    Raises ValueError when the checkpoint that is asked for is not there, not whole, or nothing that a run can go on from.
    """
    if wanted in (None, False, "false"):
        return None
    if wanted in (True, "true", "auto"):
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None and wanted != "auto":
            raise ValueError(f"resume_from_checkpoint={wanted}: {folder} has no whole checkpoint; 'auto' starts anew then")
        if checkpoint is None:
            logger.warning(f"resume_from_checkpoint=auto: {folder} has no whole checkpoint yet, so the run starts anew")
    else:
        checkpoint = Path(str(wanted))
        problem = damage(checkpoint)
        if problem is not None:
            newest = newest_checkpoint(checkpoint.parent)
            hint = f"; the newest whole one beside it is {newest}" if newest else ""
            raise ValueError(f"resume_from_checkpoint={wanted} is not a whole checkpoint of this trainer: {problem}{hint}")
    if checkpoint is not None and read_manifest(checkpoint)["weights_only"]:
        raise ValueError(
            f"{checkpoint} holds weights without optimizer, schedule and random state (save_only_model=True), so no run can "
            f"go on from it; start a new one from its weights: model={str(checkpoint)!r} and another output_dir"
        )
    return checkpoint
