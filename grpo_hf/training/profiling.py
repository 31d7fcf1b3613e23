"""A torch profiler trace of a few whole steps, sampling and scoring included, and the operators that took their time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOP = 10
"""Operators in the table."""


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
        """Start after the first, stop after the last."""
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
