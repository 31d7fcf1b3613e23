"""The folder of a run: one run at a time, and what an earlier one has left in it is set aside or gone on with.

starts.jsonl, metrics.jsonl, rollouts/, evaluations/, report.html, compare.html, curves.png, profile/   the record
checkpoint-*/ and the files of the model at the end                                what can be gone on from
earlier-N/                                                                         the same of an earlier run
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from grpo_hf.files import lock, sync, write_whole
from grpo_hf.rollout.peers import Peers
from grpo_hf.training.checkpoints import checkpoints_in, is_finished, step_of
from grpo_hf.training.guards import is_disk_full

logger = logging.get_logger(__name__)

LOCK = ".lock"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
RECORD = (STARTS, METRICS, "rollouts", "evaluations", "report.html", "compare.html", "curves.png", "profile")
MODEL = (
    "*.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json tokenizer* vocab.* "
    "merges.txt special_tokens_map.json added_tokens.json chat_template* README.md training_args.bin"
).split()
"""Files that GRPOTrainer.save_model writes, the last of them always."""


def check_writable(folder: Path) -> None:
    """Raise ValueError, before anything is loaded, for a folder that nothing can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"room for a byte")
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be written to: {error.strerror or error}; set it to a folder that can"
        ) from error


@dataclass
class RunFolder:
    """A run's folder, for all of its processes."""

    path: Path
    """output_dir."""
    peers: Peers
    """The processes; the first of them writes."""
    aside: Path | None = None
    """Where an earlier run's files are, since this run has begun."""
    begun: bool = False
    """Whether the record is this run's."""
    history: list[dict[str, Any]] | None = None
    """The log lines of the run that is gone on with; None in a new run."""
    waiting: list[str] = field(default_factory=list)
    """Log lines that a full disk has kept out of the file."""
    held: int = 0
    """How many have asked for the lock."""

    # ---- One run at a time

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, all processes of the run together; ValueError where another run does."""
        if self.held:
            self.held += 1
            try:
                yield
            finally:
                self.held -= 1
            return
        mine = self._first_lock() if self.peers.rank == 0 else None
        problem = self.peers.gather(mine if isinstance(mine, str) else None)[0]
        if problem:
            raise ValueError(problem)
        if self.peers.rank > 0:  # so that it is free when the last of them has ended
            with suppress(OSError):
                mine = lock(self.path / LOCK, shared=True)
        self.held = 1
        try:
            yield
        finally:
            self.held = 0
            if isinstance(mine, int):
                os.close(mine)

    def _first_lock(self) -> int | str | None:
        """The first process's lock, for itself and then shared; or why not. None where there are no locks."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            mine = lock(self.path / LOCK)
            if mine is None:
                holder = (self.path / LOCK).read_text() or "another process"
                return (
                    f"output_dir={str(self.path)!r} is in use by {holder}: two runs in one folder would overwrite each "
                    "other's checkpoints. Wait for it, end it, or set another output_dir"
                )
            os.ftruncate(mine, 0)
            os.write(mine, f"process {os.getpid()} on {socket.gethostname()}".encode())
            if self.peers.count > 1:
                fcntl.flock(mine, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return mine
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning(f"{self.path} is on a file system without locks ({error}): see that no other run writes to it")
            return None

    # ---- A new run, or one that goes on

    def begin_record(self) -> None:
        """Before a new run's first line: the record of an earlier one is set aside; its checkpoints stay."""
        if not self.begun:
            self._set_aside(self._record())
        self.begun = True

    def begin(self, *, keep_model: bool = False) -> None:
        """A new run trains from now on: all that an earlier one has left is set aside, the model only unless
        ``keep_model``."""
        self.history = None
        has_model = (self.path / MODEL[-1]).is_file() and not keep_model
        model = [path for pattern in MODEL for path in self.path.glob(pattern)] if has_model else []
        self._set_aside([*([] if self.begun else self._record()), *checkpoints_in(self.path), *model])
        self.begun = True

    def go_on(self, checkpoint: Path, *, rollouts: int) -> None:
        """The run of this checkpoint goes on: its lines so far are `history` and the file's, and what it has left of later
        steps, in a life that is not gone on with, is set aside or, where it is made again, removed. ``rollouts``: of which
        there is a step or more in the checkpoint."""
        if self.aside is not None and self.peers.rank == 0:  # by an evaluation before this
            self._put_back(self.aside)
        self.aside, self.begun = None, True
        self.peers.gather(None)
        lines = lines_until(checkpoint.parent / METRICS, step_of(checkpoint))
        self.peers.gather(None)  # all have read it
        self.history = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
        later = [path for path in checkpoints_in(self.path) if step_of(path) > step_of(checkpoint) and is_finished(path)]
        self._set_aside(later)
        if self.peers.rank == 0:
            write_whole(self.path / METRICS, "".join(as_json(line) for line in lines))
            for path in (self.path / "rollouts").glob("rollout-*"):
                number = re.match(r"rollout-(\d+)", path.name)
                if number and int(number[1]) >= rollouts:
                    path.unlink()
        self.peers.gather(None)

    def end(self) -> None:
        """The run is over; the next train() is another."""
        self.begun, self.aside, self.history = False, None, None

    def _record(self) -> list[Path]:
        return [path for name in RECORD if (path := self.path / name).exists()]

    def _set_aside(self, left: list[Path]) -> None:
        if self.peers.rank == 0 and left:
            if self.aside is None:
                numbers = [int(path.name[8:]) for path in self.path.glob("earlier-*") if path.name[8:].isdigit()]
                self.aside = self.path / f"earlier-{max(numbers, default=0) + 1}"
                self.aside.mkdir()
            for path in left:
                path.rename(self.aside / path.name)
            sync(self.path)
            names = ", ".join(sorted({path.name for path in left}))
            logger.warning(f"{self.path} holds an earlier run, which is now in {self.aside}: {names}")
        self.peers.gather(None)

    def _put_back(self, aside: Path) -> None:
        for path in aside.iterdir():
            here = self.path / path.name
            if path.name == METRICS and here.exists():
                path.write_text(path.read_text() + here.read_text())
            path.replace(here)
        aside.rmdir()

    # ---- The record

    def add_start(self, line: dict[str, Any]) -> None:
        """Append what the run is started with to starts.jsonl; a full disk costs this line alone."""
        if self.peers.rank == 0:
            try:
                with (self.path / STARTS).open("a") as file:
                    file.write(as_json(line))
            except OSError as error:
                if not is_disk_full(error):
                    raise
                logger.warning(f"{self.path / STARTS} cannot be written, the disk is full")

    def write(self, line: dict[str, Any]) -> bool:
        """Append a log line to metrics.jsonl; False when a full disk has kept it out: it is written with a later one."""
        self.waiting.append(as_json(line))
        return self.flush()

    def flush(self, *, to_disk: bool = False) -> bool:
        """Write the lines that wait; ``to_disk``: those that are written outlive a power loss."""
        path, size = self.path / METRICS, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                text = "".join(self.waiting).encode()
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            if not is_disk_full(error):
                raise
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)  # half a line
            if len(self.waiting) <= 1:
                free = shutil.disk_usage(self.path).free
                logger.warning(f"{path} cannot be written, the disk has {free} bytes free; its lines are kept, for later")
            return False
        self.waiting.clear()
        return True


def as_json(line: dict[str, Any]) -> str:
    """A log line; JSON knows neither NaN nor infinity, which are null there."""
    known = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    return json.dumps(known, allow_nan=False) + "\n"


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file up to this step; what a killed run has left half written is none."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and line.get("step", math.inf) <= step:
                lines.append(line)
    return lines
