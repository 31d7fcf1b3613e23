"""What a run leaves in its folder and logs: the numbers of rollouts and steps, and a folder of its own for them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_hf.algorithm.sequences import counted_mean
from grpo_hf.metrics import Metrics
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.record import num_padded_tokens, record_rollout, write_rollout
from grpo_hf.rollout.stream import Rollout
from grpo_hf.training.policy import StepReport
from grpo_hf.training.throughput import Throughput

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
    aside: Path | None = None
    """Where an earlier run's records are now."""
    claimed: bool = False
    """Whether the folder is this run's."""

    def claim_folder(self, step: int) -> None:
        """Before the first write: a new run does not mix its records with those of an earlier one in the same folder."""
        if not self.claimed and step == 0:
            if self.peers.rank == 0:
                self.aside = set_aside_earlier_run(self.folder)
            self.peers.gather(None)
        self.claimed = True

    def rollout(self, rollout: Rollout, *, step: int, save: bool) -> int:
        """Record a new rollout, whose first step is ``step``; returns its tokens of prompts and completions, over all
        processes."""
        record_rollout(self.metrics, rollout, self.peers)
        self.metrics.total("tokens/padded_equivalent", num_padded_tokens(rollout.groups) * self.num_iterations)
        if save:
            write_rollout(self.folder / "rollouts", rollout, step=step, process=self.peers.rank)
        tokens = sum(len(group.prompt.ids) + len(item.ids) for group in rollout.groups for item in group.completions)
        return sum(self.peers.gather(tokens))

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


def keep_until(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to this step; the last line of a killed run may be half written."""
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def put_back(aside: Path, folder: Path) -> None:
    """Undo set_aside_earlier_run: that run goes on after all."""
    for path in aside.iterdir():
        if path.name == "metrics.jsonl" and (folder / path.name).exists():
            path.write_text(path.read_text() + (folder / path.name).read_text())
        path.replace(folder / path.name)
    aside.rmdir()


def set_aside_earlier_run(folder: Path) -> Path | None:
    """Move what an earlier run left in this folder into earlier-1/, earlier-2/, ...; its checkpoints stay.

    Returns where it is now; None when there was nothing.
    """
    left = [path for name in ("metrics.jsonl", "rollouts", "report.html", "curves.png") if (path := folder / name).exists()]
    if not left:
        return None
    aside = folder / f"earlier-{1 + len(list(folder.glob('earlier-*')))}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    return aside
