"""Which engine samples a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.rollout.transformers_engine import TransformersEngine
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.training.config import GRPOConfig

LARGE_DIFFERENCE = 0.1
"""Nats, the mean over tokens: bfloat16 gives about 0.01, different weights or another attention 1 and more."""


def make_engine(
    model: PreTrainedModel | PeftModel,
    args: GRPOConfig,
    *,
    sampling: Sampling,
    prompts: Iterable[PromptSet],
    pad_token_id: int,
    autocast: Callable[[], Any],
    finished_updates: Callable[[], int],
) -> Engine:
    """The engine that the settings ask for, on the model's device; ``prompts`` are all that it will be given."""
    if not args.use_vllm:
        return TransformersEngine(model, pad_token_id=pad_token_id, autocast=autocast)
    return VLLMEngine(
        model,
        version=finished_updates,
        sampling=sampling,
        max_prompt_length=max(len(ids) for part in prompts for ids in part.ids),
        dtype=args.compute_dtype,
        num_processes=args.world_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        sleep_mode=args.vllm_enable_sleep_mode,
    )


def mismatch_warning(measured: dict[str, Any]) -> str | None:
    """What to say when the engine's log-probs are so far from the trainer's that they cannot be of one model."""
    mean = measured.get("sampling/sampling_logp_difference/mean", 0.0)
    if mean < LARGE_DIFFERENCE:
        return None
    return (
        f"vLLM's log-probs of its samples differ from the trainer's by {mean:.2g} on average: it does not compute this "
        "model as transformers does, and the correction will drop or shrink most of the loss. Set use_vllm=False, or try "
        "another version of vLLM"
    )
