"""What a run shows while it goes and leaves when it ends."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import ProgressCallback, TrainerCallback

from grpo_hf.metrics import Metrics
from grpo_hf.report import write_report
from grpo_hf.training import checks
from grpo_hf.training.folder import RunFolder
from grpo_hf.training.guards import Guards, Seen
from grpo_hf.training.throughput import step_line
from grpo_hf.types import Group

HEADLINE = ("reward", "frac_zero_signal_groups", "tokens_per_second", "entropy")
"""What the progress bar shows, in this order."""

SECONDS_BETWEEN_LINES = 30.0
"""Of the lines above the progress bar that say where the time went, at least."""

TOP = 10
"""Operators in the table of a profile."""


class RewardProgress(ProgressCallback):
    """Trainer's progress bar with reward, zero-signal share and speed beside it; evaluations, and now and then where the
    time went, are lines above it."""

    def __init__(self, compute_dtype: torch.dtype):
        super().__init__()
        self.compute_dtype, self.next_line_at = compute_dtype, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if measured_on_held_out(logs):
            shown = [k for k in logs if k == "eval_reward" or (k.startswith("eval_rewards/") and k.endswith("/mean"))]
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(f"{k} {logs[k]:.4g}" for k in shown))
        elif "reward" in logs:
            short = {name.removeprefix("frac_"): logs[name] for name in HEADLINE if name in logs}
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in short.items()})
            if (now := time.monotonic()) >= self.next_line_at:
                self.next_line_at = now + SECONDS_BETWEEN_LINES
                self.training_bar.write(step_line(state.global_step, logs, self.compute_dtype))


class MetricsFile(TrainerCallback):
    """Appends every log line to <output_dir>/metrics.jsonl, the step first; of these a checkpoint holds only the last, and a
    run that goes on reads the file."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a checkpoint that was moved without its run's metrics, there are no more than it holds."""
        if self.folder.history:
            state.log_history = self.folder.history

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.folder.write({"step": state.global_step, **logs})


class StopAt(TrainerCallback):
    """Ends the run when rewards of the held-out rows are at least so high in two evaluations in a row.

    The log lines alone decide, so a run that was killed after its last checkpoint ends where it would have ended.
    """

    def __init__(self, least: dict[str, float]):
        self.least = least

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a run that goes on, the lines may say that it has ended."""
        control.should_training_stop = self.reached(state.log_history)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps are logged before an evaluation that may be the last, so that its checkpoint has all of their lines."""
        control.should_log = control.should_log or control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached(state.log_history):
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def reached(self, lines: list[dict[str, float]]) -> bool:
        """Whether the last two evaluations that were logged are high enough, each in all of its data sets."""
        evaluations = {line["step"]: high_enough(line, self.least) for line in lines if measured_on_held_out(line)}
        return len(evaluations) > 1 and all(list(evaluations.values())[-2:])


def measured_on_held_out(line: dict[str, float]) -> bool:
    """Whether a log line is an evaluation's."""
    return any(name.startswith("eval_") for name in line)


def high_enough(line: dict[str, float], least: dict[str, float]) -> bool:
    """Whether the mean of each reward is at least so, in every data set of an evaluation's line."""
    means = {reward: [value for name, value in line.items() if name.endswith(f"rewards/{reward}/mean")] for reward in least}
    return all(means[reward] and min(means[reward]) >= bound for reward, bound in least.items())


class StepClock(TrainerCallback):
    """Times the optimizer, and counts epochs by finished updates, so that they are right after a resume too."""

    def __init__(self, metrics: Metrics, updates_per_epoch: int):
        self.metrics, self.updates_per_epoch = metrics, updates_per_epoch
        self.phase: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase = self.metrics.phase("optimizer")
        self.phase.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run's last steps are logged too, however many there are since the last line."""
        state.epoch = state.global_step / self.updates_per_epoch
        if args.logging_strategy != "no" and (control.should_training_stop or state.global_step >= state.max_steps):
            control.should_log = True


class FiniteWeights(TrainerCallback):
    """Has the guards look at the trained weights after each update, before they are sampled from or saved."""

    def __init__(self, guards: Guards):
        self.guards = guards

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Their norm is NaN or infinite where any of them is."""
        if not math.isfinite(norm := checks.norm_of_weights(model)):
            explain = partial(checks.weights_not_finite, state.global_step, model, args)
            self.guards.check(Seen(state.global_step, {"norm of the weights": norm}, explain=explain))


class SyncReference(TrainerCallback):
    """Moves the reference model towards the policy: ref = α π + (1 - α) ref (TR-DPO; Gorbatovski et al. 2024, arXiv
    2404.09656), with α = ref_model_mixup_alpha, every ref_model_sync_steps."""

    def __init__(self, policy: nn.Module, reference: nn.Module):
        self.policy, self.reference = policy, reference

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            for reference, policy in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                reference.lerp_(policy, args.ref_model_mixup_alpha)


class Profile(TrainerCallback):
    """Traces ``steps`` training steps, from the end of the first to the end of the last, on every process.

    Leaves <output_dir>/profile/trace-<process>.json.gz for chrome://tracing or ui.perfetto.dev, in which the parts of a step
    are named as in the metrics, and prints a table.
    """

    def __init__(self, steps: int):
        self.steps, self.left = steps, 0
        self.profiler: profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ValueError where there are not as many steps."""
        steps = state.max_steps - state.global_step
        if steps <= self.steps:
            raise ValueError(
                f"profile={self.steps} takes {self.steps + 1} steps, the first to warm up, and this run has {steps} left; "
                "lower profile or raise max_steps"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            on_gpu = torch.cuda.is_available() and not args.use_cpu
            self.profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
            self.profiler.start()
            self.left = self.steps
        elif self.left:
            self.left -= 1
            if not self.left:
                self._finish(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that has ended early leaves what there is."""
        if self.left:
            self._finish(args, state)

    def _finish(self, args: Any, state: Any) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        traced, self.left = self.steps - self.left, 0
        path = Path(args.output_dir, "profile", f"trace-{args.process_index}.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(path))
        if state.is_world_process_zero:
            print(f"profile of {traced} step{'s' * (traced != 1)}: {path}\n{top_operators(self.profiler)}", file=sys.stderr)


class Report(TrainerCallback):
    """Writes the report page when training ends and prints where it is."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            print(f"report: {write_report(Path(args.output_dir))}", file=sys.stderr)


def print_samples(groups: list[Group], step: int, count: int) -> None:
    """Print the first completions of the first groups with their rewards."""
    for group in groups[:count]:
        item = group.completions[0]
        scores = ", ".join(
            f"{name} {value:.3g}" + (f" {outcome}" if (outcome := item.outcomes.get(name, "scored")) != "scored" else "")
            for name, value in item.rewards.items()
        )
        print(f"--- step {step}: reward {item.reward:.3g} ({scores}), advantage {item.advantage:.3g}")
        print(f"{group.prompt.raw}\n>>> {item.text}", flush=True)
        for name, value in item.extra.items():
            print(f"{name}: {value}", flush=True)


def top_operators(profiler: profile, count: int = TOP) -> str:
    """The operators with the most time of their own, on the GPU where there is one; a part of a step, as time/generate,
    stands for what is outside of operators."""
    events = profiler.key_averages()
    on_gpu = ProfilerActivity.CUDA in profiler.activities
    own = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    calls = {event.key: event.count for event in events}
    whole = sum(own.values()) or 1.0
    lines = [f"{'own time on the ' + ('GPU' if on_gpu else 'CPU'):<48}{'ms':>10}{'share':>8}{'calls':>9}"]
    for name in sorted(own, key=lambda name: -own[name])[:count]:
        short = name if len(name) < 48 else name[:44] + "..."
        lines.append(f"{short:<48}{own[name] / 1000:>10.1f}{own[name] / whole:>8.1%}{calls[name]:>9,}")
    return "\n".join(lines)
