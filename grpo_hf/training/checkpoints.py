"""Saving and loading what this trainer adds to checkpoints, which of them are whole, and whether one is of this very run.

A checkpoint is whole once its manifest is there, which is written last and holds every file's size and digest. A run that
is killed while it saves leaves a checkpoint without one; a file that is damaged later does not fit its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from transformers.utils import logging

from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Reward
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.guards import is_disk_full

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"


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
    unsaved: str | None = None
    """Why the last checkpoint is not there, when it is not."""
    failures: int = 0
    """Checkpoints that could not be saved."""

    def save(self, folder: Path, others: Callable[[], None], more: dict[str, Any], *, run: dict[str, Any]) -> bool:
        """Write a checkpoint: what ``others`` writes, the parts, ``more``, and last the manifest of this ``run``.

        On a full disk what was written is removed, with a warning, and the answer is False.
        """
        problems = self.peers.gather(self._unless_disk_full(folder, lambda: self._write(folder, others, more)))
        if not any(problems) and self.peers.rank == 0:
            problems = [self._unless_disk_full(folder, lambda: finish(folder, run))]
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
        save_part(more | {name: part.state_dict() for name, part in self.parts.items()}, folder, self.peers.rank)

    def load(self, folder: Path, device: torch.device) -> dict[str, Any]:
        """Give every part its state; returns all that was saved, with ``more``."""
        if device.type == "cpu":  # of several processes it is cpu:1, say, which torch.load does not know
            device = torch.device("cpu")
        state = torch.load(folder / f"rollout-{self.peers.rank}.pt", map_location="cpu", weights_only=False)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, part in self.shared.items():
            part.load_state_dict(torch.load(folder / f"{name}.pt", map_location=device))
        return state

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


def is_finished(checkpoint: Path) -> bool:
    """Whether it has its manifest; `damage` says whether it is whole."""
    return (checkpoint / MANIFEST).is_file()


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


# ---- Whether a run that resumes is the one that was saved: by its settings, data, verifiers and weights

FREE = (
    "output_dir resume_from_checkpoint run_name report_to project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id disable_tqdm log_level log_level_replica log_on_each_node logging_first_step logging_steps "
    "logging_strategy logging_nan_inf_filter include_num_input_tokens_seen save_strategy save_steps save_total_limit "
    "save_on_each_node save_only_model enable_jit_checkpoint load_best_model_at_end metric_for_best_model "
    "greater_is_better eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches "
    "eval_use_gather_object batch_eval_metrics include_for_metrics prediction_loss_only per_device_eval_batch_size "
    "eval_temperature num_generations_eval do_train do_eval do_predict push_to_hub hub_model_id hub_strategy hub_token "
    "hub_private_repo hub_always_push hub_revision log_completions num_completions_to_print save_rollouts write_report "
    "profile tokens_per_microbatch gradient_checkpointing gradient_checkpointing_kwargs keep_zero_signal "
    "torch_empty_cache_steps skip_memory_metrics vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_weights_folder vllm_gpu_memory_utilization vllm_enable_sleep_mode "
    "vllm_lora_sync reward_workers reward_concurrency dataloader_num_workers dataloader_pin_memory ddp_timeout "
    "ddp_bucket_cap_mb ddp_backend debug local_rank accelerator_config ignore_data_skip log_unique_prompts log_multimodal "
    "pad_to_multiple_of vllm_max_model_length"
).split()
"""Settings that change no number of a run, or only its evaluations."""

SAID = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio "
    "weight_decay max_grad_norm reward_timeout reward_memory_gb reward_policy reward_max_fault_share bad_gold_rows "
    "guards"
).split()
"""Settings that are changed on purpose in the middle of a run: what follows is not what would have been, which is said."""

PROCESSES = "number of processes"
"""Each has samples of its own in a checkpoint."""


def describe_run(
    args: GRPOConfig, prompts: PromptSet, rewards: list[Reward], weights: list[float], model: nn.Module
) -> dict[str, Any]:
    """What makes a run this run, as JSON holds it."""
    shapes = [[name, list(getattr(p, "ds_shape", p.shape)), p.requires_grad] for name, p in model.named_parameters()]
    settings = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in FREE}
    identity = settings | {
        PROCESSES: args.world_size,
        "training prompts": _digest_of([prompts.ids]),
        "rewards": [reward.name for reward in rewards],
        "weights of the rewards": weights,
        "names and shapes of the weights": _digest_of(shapes),
    }
    return json.loads(json.dumps(identity, default=_plain))


def check_same_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: str) -> str | None:
    """What was changed on purpose, to be said; ValueError for a change that makes it another run."""
    changes = {
        name: f"{name} {saved.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    }
    refused = [text for name, text in changes.items() if name not in SAID]
    if PROCESSES in changes:
        refused.append(f"start it with accelerate launch --num_processes {saved.get(PROCESSES)}")
    if refused:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(refused)}. Set these as they were, or start a new run from its "
            f"weights: model={checkpoint!r} and another output_dir"
        )
    return f"resuming {checkpoint} with changed settings: {'; '.join(changes.values())}" if changes else None


def _digest_of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return f"{value.__module__}:{value.__qualname__}"
    return value.value if isinstance(value, Enum) else str(value)
