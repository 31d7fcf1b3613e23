"""Whether a run that resumes is the one that was saved: by its settings, data, verifiers and weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from enum import Enum
from types import FunctionType
from typing import Any

from torch import nn

from grpo_hf.rewards import Reward
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.training.config import GRPOConfig

FREE = (
    "output_dir resume_from_checkpoint run_name report_to project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id disable_tqdm log_level log_level_replica log_on_each_node logging_first_step logging_steps "
    "logging_strategy logging_nan_inf_filter include_num_input_tokens_seen save_strategy save_steps save_total_limit "
    "save_on_each_node save_only_model enable_jit_checkpoint load_best_model_at_end metric_for_best_model "
    "greater_is_better eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches "
    "eval_use_gather_object batch_eval_metrics include_for_metrics prediction_loss_only per_device_eval_batch_size "
    "eval_temperature num_generations_eval do_train do_eval do_predict push_to_hub hub_model_id hub_strategy hub_token "
    "hub_private_repo hub_always_push hub_revision log_completions num_completions_to_print save_rollouts write_report "
    "profile tokens_per_microbatch gradient_checkpointing gradient_checkpointing_kwargs keep_zero_signal "
    "torch_empty_cache_steps skip_memory_metrics vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_weights_folder vllm_gpu_memory_utilization vllm_enable_sleep_mode "
    "vllm_lora_sync reward_workers reward_concurrency dataloader_num_workers dataloader_pin_memory ddp_timeout "
    "ddp_bucket_cap_mb ddp_backend debug local_rank accelerator_config ignore_data_skip"
).split()
"""Settings that change no number of a run, or only its evaluations."""

SAID = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio "
    "weight_decay max_grad_norm reward_timeout reward_memory_gb reward_policy reward_max_fault_share bad_gold_rows "
    "guards"
).split()
"""Settings that are changed on purpose in the middle of a run: what follows is not what would have been, which is said."""

PROCESSES = "number of processes"
"""Each has samples of its own in a checkpoint."""


def describe_run(
    args: GRPOConfig, prompts: PromptSet, rewards: list[Reward], weights: list[float], model: nn.Module
) -> dict[str, Any]:
    """What makes a run this run, as JSON holds it."""
    shapes = [[name, list(getattr(p, "ds_shape", p.shape)), p.requires_grad] for name, p in model.named_parameters()]
    settings = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in FREE}
    identity = settings | {
        PROCESSES: args.world_size,
        "training prompts": _digest([prompts.ids]),
        "rewards": [reward.name for reward in rewards],
        "weights of the rewards": weights,
        "names and shapes of the weights": _digest(shapes),
    }
    return json.loads(json.dumps(identity, default=_plain))


def check_same_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: str) -> str | None:
    """What was changed on purpose, to be said; ValueError for a change that makes it another run."""
    changes = {
        name: f"{name} {saved.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    }
    refused = [text for name, text in changes.items() if name not in SAID]
    if PROCESSES in changes:
        refused.append(f"start it with accelerate launch --num_processes {saved.get(PROCESSES)}")
    if refused:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(refused)}. Set these as they were, or start a new run from its "
            f"weights: model={checkpoint!r} and another output_dir"
        )
    return f"resuming {checkpoint} with changed settings: {'; '.join(changes.values())}" if changes else None


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return f"{value.__module__}:{value.__qualname__}"
    return value.value if isinstance(value, Enum) else str(value)
