"""What a side is asked for and answers with: a rollout's steps, and what they took."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, base_of


class Clock:
    """Waits for a line before each rollout, and answers when its last optimizer step has been taken; of several processes
    the first one does, and the others wait for that."""

    def __init__(self, case: Case, gradient: Path):
        self.case, self.gradient = case, gradient
        self.first = os.environ.get("RANK", "0") == "0"
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the trainers print is no answer
        self.tokens = 0
        self.start = (0.0, 0.0)

    def watch(self, model: Any) -> None:
        """Count the tokens that its decoder is given."""
        base_of(model).get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].numel()

    def wait(self) -> None:
        """Until the next line; the end of the lines ends the process."""
        if self.first and not sys.stdin.readline():
            os._exit(0)
        self.tokens, self.start = 0, (time.perf_counter(), time.process_time())

    def waits_before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called when the clock allows."""

        def late(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            return function(*args, **kwargs)

        return late

    def before_step(self, model: Any, step: int) -> None:
        """Keep the first rollout's gradient, the sum of its updates': TRL shuffles completions between them."""
        if step < self.case.updates and self.first:
            parts = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
            gradient = torch.cat([parts[name].flatten() for name in sorted(parts)])
            if step:
                gradient += torch.load(self.gradient)
            torch.save(gradient, self.gradient)

    def after_step(self, steps: int) -> None:
        """Answer with what an optimizer step took, after a rollout's last; the peak is the process's own, in MiB."""
        if steps % self.case.updates == 0 and self.first:
            wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            measured = {"wall_s": wall, "cpu_s": cpu, "tokens_forwarded": self.tokens}
            answer = {name: value / self.case.updates for name, value in measured.items()} | {"peak_mib": peak_mib()}
            print(json.dumps(answer), file=self.answers, flush=True)


def peak_mib() -> float:
    """The most memory that this process has held (not ru_maxrss, which starts at the parent's)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024
