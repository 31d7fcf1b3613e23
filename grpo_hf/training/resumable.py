"""What of a trainer makes a run survive: whole checkpoints, exact resume, and work that is saved before a stop."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from grpo_hf.metrics import Metrics
from grpo_hf.rewards import Reward
from grpo_hf.rollout.engine import EngineLostError
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.rollout.record import put_back, set_aside_earlier_run
from grpo_hf.rollout.sampler import GroupSampler
from grpo_hf.rollout.stream import RolloutStream
from grpo_hf.training.checkpoints import (
    begin,
    checkpoints_in,
    finish,
    is_finished,
    load_part,
    resume_point,
    run_of,
    save_part,
)
from grpo_hf.training.checks import norm_of_weights
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.guards import GuardError, is_disk_full
from grpo_hf.training.same_run import check_same_run, describe_run

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """transformers.Trainer whose runs go on from a checkpoint as if they had never stopped."""

    args: GRPOConfig  # type: ignore[assignment]
    model: Any
    prompts: PromptSet
    rewards: list[Reward]
    reward_weights: list[float]
    metrics: Metrics
    sampler: GroupSampler
    stream: RolloutStream
    peers: Peers
    ref_model: nn.Module | None

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._last_logged_step = 0
        self._failed_saves = 0
        self._unsaved: str | None = None
        self._halved_budget: int | None = None
        self._run_folder_is_ours = False
        self._set_aside: Path | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; accelerate looks for FSDP only where it has found GPUs, and would train unsharded on the CPU."""
        state = PartialState()
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # until it has looked; the device stays the CPU
        super().create_accelerator_and_postprocess()
        if torch.distributed.is_initialized():  # and it tells gloo nothing of how long to wait for a silent process
            _set_pg_timeout(timedelta(seconds=self.args.ddp_timeout))

    def _set_budget(self, tokens: int) -> None:
        """Of a micro-batch, for the rest of the run and for those that resume it."""
        self._halved_budget = tokens
        self.stream.plan = replace(self.stream.plan, tokens_per_microbatch=tokens)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trainer's; "auto" goes on from the newest whole checkpoint in output_dir, or starts anew."""
        checkpoint = resume_point(resume_from_checkpoint, Path(str(self.args.output_dir)))
        if checkpoint and (said := check_same_run(run_of(checkpoint), self._describe(), str(checkpoint))):
            logger.warning(said)
        if checkpoint and self._set_aside:  # by an evaluation before this
            put_back(self._set_aside, Path(str(self.args.output_dir)))
        self._unsaved = None
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        except GuardError:
            self._save_before_stop(trial)
            raise
        except EngineLostError:
            self.stream.ahead = None  # it is lost with the engine
            if self.state.global_step:
                self._save_checkpoint(self.model, trial)
                logger.error(f"saved step {self.state.global_step}; go on with --resume_from_checkpoint auto")
            raise
        finally:
            self.sampler.engine.abort()
        if self._unsaved:
            raise GuardError(f"the run has ended, and its last checkpoint is not saved: {self._unsaved}")
        return output

    def _describe(self) -> dict[str, Any]:
        return describe_run(self.args, self.prompts, self.rewards, self.reward_weights, self.model)

    def _claim_run_folder(self) -> None:
        """Before the first write: a new run does not mix its records with those of an earlier one in the same folder."""
        if not self._run_folder_is_ours and self.state.global_step == 0:
            if self.peers.rank == 0:
                self._set_aside = set_aside_earlier_run(Path(str(self.args.output_dir)))
            self.accelerator.wait_for_everyone()
        self._run_folder_is_ours = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, with the rollouts and metrics in progress, a reference that moves, and a manifest; older checkpoints go
        when this one is whole."""
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        problems = self.peers.gather(self._unless_disk_full(folder, lambda: self._write_checkpoint(folder, model, trial)))
        if not any(problems) and self.peers.rank == 0:
            problems = [self._unless_disk_full(folder, lambda: finish(folder, self._describe()))]
        self._unsaved = next((said for part in self.peers.gather(problems) for said in part if said), None)
        if self._unsaved:
            self._failed_saves += 1
            self.metrics.maximum("guards/disk_full", self._failed_saves)
        if self.peers.rank == 0 and self._unsaved:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning(f"{self._unsaved}. What was written of it is removed, and training goes on")
        elif self.peers.rank == 0:
            rotate_checkpoints(str(folder.parent), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        """All but the manifest."""
        if self.peers.rank == 0:
            begin(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.sync_ref_model and self.ref_model is not None and self.peers.rank == 0:
            torch.save(self.ref_model.state_dict(), folder / "reference.pt")
        stream, rollout = self.stream.state_dict(), self.stream.rollout
        if rollout is not None and rollout.index == self.state.global_step // self.stream.steps_per_rollout:
            stream["rollout"] = rollout  # a guard has stopped its first step
        state = {"stream": stream, "metrics": self.metrics.state_dict(), "logged": self._last_logged_step}
        save_part(state | {"halved_budget": self._halved_budget}, folder, self.peers.rank)

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

    def _save_before_stop(self, trial: Any) -> None:
        """The steps so far are good, unless their weights are not."""
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        wanted = self.args.save_strategy != "no" and self.state.global_step > 0
        if wanted and not is_finished(folder) and math.isfinite(norm_of_weights(self.model)):
            self._save_checkpoint(self.model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, with the rollout, a reference that moves, and the random state."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        device = self.args.device
        if device.type == "cpu":  # of several processes it is cpu:1, say, which torch.load does not know
            device = torch.device("cpu")
        state = load_part(Path(checkpoint), self.peers.rank, device)
        self.stream.load_state_dict(state["stream"])
        if state.get("halved_budget"):
            self._set_budget(min(state["halved_budget"], self.stream.plan.tokens_per_microbatch))
        if self.args.sync_ref_model and self.ref_model is not None:
            self.ref_model.load_state_dict(torch.load(Path(checkpoint, "reference.pt"), map_location=device))
        self._load_rng_state(checkpoint)
        self._last_logged_step = state["logged"]
        self.metrics.reset()  # loading is no part of the first step
        self.metrics.load_state_dict(state["metrics"])
