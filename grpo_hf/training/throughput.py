"""How much of the machine the training phase uses: its useful floating-point operations against a measured peak.

Useful are matrix products and attention, each product counted once. What is computed again to save memory (gradient
checkpointing, the head's logits in the backward pass) and padding are not, so that the share of the peak is the model FLOPs
utilization, MFU (Chowdhery et al. 2022, arXiv 2204.02311).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from grpo_hf.metrics import now
from grpo_hf.training.adapters import REFERENCE
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
        start = now()
        torch.mm(left, right, out=out)
        seconds.append(now() - start)
    return 2 * size**3 / min(seconds)


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


# ---- Counting operations


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of forward and backward."""

    token: int
    """For each token, in the weights of the body."""
    scored: int
    """For each position that predicts targets, in the head."""
    pair: int
    """For each pair of a query and a key that it looks at, in one layer."""
    windows: Counter[int | None]
    """How many attention layers look so many keys back; None: all."""


def cost_of(model: PreTrainedModel) -> Cost:
    """What a causal LM costs. A weight is multiplied with a token's input (2 operations) and with its gradient (2), and one
    that is trained has a gradient of its own (2); scores and their use take 4 for each pair and head dimension, and twice
    that in the backward pass."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    body, trained = _weights(model.get_decoder(), config)
    head, trained_head = _weights(model.get_output_embeddings(), config)
    return Cost(4 * body + 2 * trained, 4 * head + 2 * trained_head, 12 * width, _windows(config) if heads else Counter())


def update_flops(cost: Cost, microbatches: Iterable[PackedBatch]) -> int:
    """Of an update's micro-batches; those that only give a process something to run are none of it.

    A token at position p looks at p + 1 keys, or at its window.
    """
    flops = 0
    for batch in microbatches:
        if batch.weight:
            mask, positions = batch.attention_mask, batch.position_ids
            keys = (positions if mask is None else positions[mask.bool()]) + 1
            seen = {window: int(keys.sum() if window is None else keys.clamp(max=window).sum()) for window in cost.windows}
            pairs = sum(layers * seen[window] for window, layers in cost.windows.items())
            flops += cost.token * keys.numel() + cost.scored * len(batch.scored_at) + cost.pair * pairs
    return flops


def _weights(module: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """How many weights a token is multiplied with, and how many of them are trained; of experts those that it is sent to."""
    both = [0, 0]
    for path, part in module.named_modules():
        if path.endswith(f".{REFERENCE}"):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, nn.Linear):  # by its sizes, which quantized and sharded weights do not have
                size = part.in_features * part.out_features if name == "weight" else 0
            elif isinstance(part, nn.Embedding) or parameter.ndim < 2:
                size = 0
            else:
                experts = parameter.shape[0] if parameter.ndim == 3 else 1
                size = parameter.numel() * min(getattr(config, "num_experts_per_tok", None) or experts, experts) // experts
            both[0] += size
            both[1] += size * parameter.requires_grad
    return both[0], both[1]


def _windows(config: PretrainedConfig) -> Counter[int | None]:
    """As transformers' configs say it: one kind for each layer, or one window for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return Counter(window if kind == "sliding_attention" else None for kind in kinds if kind != "linear_attention")
