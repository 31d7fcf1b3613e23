"""The sides of a comparison, each in a process of its own that takes a step when it is told to (`__main__.py`).

All are given the same completions with the same rewards, where each samples: TRL's `rollout_func`, grpo_hf's engine, a plain
loop's list. So all train on the same tokens, and the clock runs from the moment the completions are there to the end of the
optimizer step.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SIDES = {
    "trl": "benchmarks.sides.trl:train",
    "trl_head": "benchmarks.sides.trl:train_compact_head",
    "trl_async_tree": "benchmarks.sides.trl_async_tree:train",
    "prefix_grouper": "benchmarks.sides.prefix_grouper:train",
    "liger": "benchmarks.sides.liger:train",
    "padded": "benchmarks.sides.ours:train_padded",
    "grpo_hf": "benchmarks.sides.ours:train",
    "grpo_hf_vllm": "benchmarks.sides.ours:train_with_vllm",
}
"""Each is called with the case, the model's folder, one to write to, the data and the clock; it trains until its process
ends."""

NEEDS = {
    "trl": "trl",
    "trl_head": "trl",
    "trl_async_tree": "trl",
    "prefix_grouper": "prefix_grouper",
    "liger": "liger_kernel",
    "grpo_hf_vllm": "vllm",
}
"""The package that a side is made of, where it is not grpo_hf alone."""


def is_installed(side: str) -> bool:
    """Whether the side can run here."""
    return side not in NEEDS or find_spec(NEEDS[side]) is not None


def gradient_file(folder: Path, side: str) -> Path:
    """Where a side leaves the gradient of its first rollout."""
    return folder / f"{side}.pt"
