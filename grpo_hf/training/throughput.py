"""How much of the machine the training phase uses: its useful floating-point operations against a measured peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_hf.training.flops import cost_of, update_flops
from grpo_hf.types import PackedBatch

PHASES = ("generate", "score", "sync", "logprobs", "forward_backward", "optimizer", "evaluate", "other")
"""The parts of a step's time, in the order in which a line shows them."""


class Throughput:
    """What the forward and backward passes since the last log line have computed, and at what share of the peak."""

    def __init__(self, model: PreTrainedModel):
        self.cost = cost_of(model)
        self.flops, self.peak = 0, 0.0

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measure the peak, once a process, and forget what was counted."""
        self.peak, self.flops = matmul_peak(device, dtype), 0

    def add(self, microbatches: Iterable[PackedBatch]) -> int:
        """Count an update; returns its floating-point operations."""
        flops = update_flops(self.cost, microbatches)
        self.flops += flops
        return flops

    def flush(self, gather: Callable[[Any], list[Any]], *, seconds: float) -> dict[str, float]:
        """perf/*: TFLOP/s of forward_backward and of the peak, over all processes, and the one over the other; the peak
        is that of a large matrix product in the same dtype. Then start afresh. ``seconds`` were this process's."""
        rates, peaks = zip(*gather((self.flops / seconds if seconds else 0.0, self.peak)), strict=True)
        self.flops = 0
        rate, peak = sum(rates) / 1e12, sum(peaks) / 1e12
        return {"perf/tflops": rate, "perf/peak_tflops": peak, "perf/mfu": rate / peak} if peak else {}


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of square random matrices, of 1024 rows on the CPU and 8192 elsewhere.

    This takes a tenth of a second, or three products where those are slower. Trainer's own random numbers are left alone.
    """
    size = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.1:
        start = _now(device)
        torch.mm(left, right, out=out)
        seconds.append(_now(device) - start)
    return 2 * size**3 / min(seconds)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def step_line(step: int, logs: dict[str, float], dtype: torch.dtype) -> str:
    """Where the seconds of a step went, and the share of the peak: for people."""
    seconds = {name.removeprefix("time/"): value for name, value in logs.items() if name.startswith("time/")}
    whole = sum(seconds.values()) or 1.0
    known = [name for name in PHASES if name in seconds] + sorted(seconds.keys() - set(PHASES))
    shares = [f"{name} {share:.0f} %" for name in known if (share := 100 * seconds[name] / whole) >= 0.5]
    line = f"step {step}: {whole:.3g} s = {' | '.join(shares)}"
    if "perf/mfu" not in logs:
        return line
    peak, unit = logs["perf/peak_tflops"], "TFLOP/s"
    peak, unit = (peak, unit) if peak >= 1 else (1000 * peak, "GFLOP/s")
    kind = str(dtype).removeprefix("torch.")
    return f"{line}; forward_backward at {logs['perf/mfu']:.0%} of the matmul peak, {peak:.3g} {unit} {kind}"
