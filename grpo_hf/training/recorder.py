"""What a run logs and saves of its rollouts and steps."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

from grpo_hf.algorithm.sequences import counted_mean
from grpo_hf.metrics import Metrics
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.record import num_padded_tokens, record_rollout, write_rollout
from grpo_hf.rollout.stream import Rollout
from grpo_hf.training.guards import is_disk_full
from grpo_hf.training.policy import StepReport
from grpo_hf.training.throughput import Throughput

logger = logging.get_logger(__name__)

SPREAD = ("sampling/sampling_logp_difference", "sampling/importance_sampling_ratio")
"""Per-token values that are logged with their smallest and largest."""

OF_THE_POLICY = {"policy", "kl"}
"""The terms of the objective that TRL logs as policy_loss, where there is an entropy bonus too."""


@dataclass
class Recorder:
    """Records a run's rollouts and steps, and says what they measured when a line is logged."""

    metrics: Metrics
    """What was measured since the last line."""
    folder: Path
    """The run's."""
    peers: Peers
    """Every process records the numbers of all."""
    throughput: Throughput
    """Operations of the steps since the last line."""
    num_iterations: int
    """Passes over each rollout."""
    logged: int = 0
    """Step of the last line."""

    def rollout(self, rollout: Rollout, *, step: int, save: bool) -> int:
        """Record a new rollout, whose first step is ``step``; returns its tokens of prompts and completions, over all
        processes."""
        record_rollout(self.metrics, rollout, self.peers)
        self.metrics.total("tokens/padded_equivalent", num_padded_tokens(rollout.groups) * self.num_iterations)
        if save:
            self._write(rollout, step)
        tokens = sum(
            len(group.prompt.ids if item.prompt_ids is None else item.prompt_ids) + len(item.ids)
            for group in rollout.groups
            for item in group.completions
        )
        return sum(self.peers.gather(tokens))

    def _write(self, rollout: Rollout, step: int) -> None:
        """A full disk costs its samples, with a warning, and not the run."""
        try:
            write_rollout(self.folder / "rollouts", rollout, step=step, process=self.peers.rank)
        except OSError as error:
            if not is_disk_full(error):
                raise
            free = shutil.disk_usage(self.folder).free
            logger.warning(f"the samples of rollout {rollout.index} are not saved, the disk has {free} bytes free: {error}")
            self.metrics.maximum("guards/disk_full", 1.0)

    def step(self, report: StepReport) -> dict[str, float]:
        """Record a step; returns its loss and the means over its tokens, over all processes, by metric name."""
        values = report.values()
        num_tokens = sum(batch.num_tokens for batch in report.batches)
        mine = {name: (value.sum().item(), len(value)) for name, value in values.items()}
        everyone = self.peers.gather(mine | {"loss": (report.loss.item(), 1), "tokens": (num_tokens, 1)})
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for part in everyone for name in part):
            totals, counts = zip(*(part[name] for part in everyone if name in part), strict=True)
            means[name] = sum(totals) / sum(counts) if sum(counts) else math.nan
        self.metrics.total("tokens/forwarded", num_tokens)
        if report.out_of_memory:
            self.metrics.maximum("guards/out_of_memory", 1.0)
        self.metrics.mean("tokens/max_over_mean", max(part["tokens"][0] for part in everyone) / means.pop("tokens"))
        if math.isfinite(means["loss"]):
            self.metrics.mean("loss", report.loss)
            if report.parts.keys() - OF_THE_POLICY:
                self.metrics.mean("policy_loss", sum(report.parts[name] for name in OF_THE_POLICY & report.parts.keys()))
            if report.aux_loss is not None:
                self.metrics.mean("aux_loss", report.aux_loss)
            self._record_values(values)
            for batch, of_batch in zip(report.batches, report.metrics, strict=True):  # by completion
                if (low := of_batch.get("clip_ratio/low")) is not None:
                    self.metrics.minimum("clip_ratio/low_min", counted_mean(low, batch).min().item())
                if (high := of_batch.get("clip_ratio/high")) is not None:
                    self.metrics.maximum("clip_ratio/high_max", counted_mean(high, batch).max().item())
        return means

    def _record_values(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            spread = name in SPREAD
            suffix = "_mean" if name.startswith(("clip_ratio/", "vespo/")) else "/mean" if spread else ""
            self.metrics.mean(name + suffix, value.sum(), len(value))
            if spread and len(value):
                self.metrics.minimum(f"{name}/min", value.min().item())
                self.metrics.maximum(f"{name}/max", value.max().item())

    def line(self, logs: dict[str, float], *, step: int) -> dict[str, float]:
        """A log line with what the steps since the last one measured; reward comes first."""
        steps = step - self.logged
        measured = self.metrics.flush(self.peers.gather, steps=steps)
        seconds = sum(value for name, value in measured.items() if name.startswith("time/"))
        measured["tokens_per_second"] = measured.get("tokens/sampled", 0.0) / seconds
        trained_for = measured.get("time/forward_backward", 0.0) * max(steps, 1)
        measured |= self.throughput.flush(self.peers.gather, seconds=trained_for)
        self.logged = step
        return dict(sorted((logs | measured).items(), key=lambda item: item[0] != "reward"))

    def reset(self) -> None:
        """Forget what an earlier train() has left."""
        self.metrics.reset()
        self.logged = 0

    def state_dict(self) -> dict[str, Any]:
        """What was measured since the last line."""
        return {"metrics": self.metrics.state_dict(), "logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on measuring; loading is no part of the first step."""
        self.logged = state["logged"]
        self.metrics.reset()
        self.metrics.load_state_dict(state["metrics"])
