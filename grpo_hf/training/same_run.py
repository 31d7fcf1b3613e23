"""Whether a run that resumes is the one that was saved: by its settings, data, verifiers and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import Enum
from types import FunctionType
from typing import Any

from peft import PeftModel
from torch import nn

from grpo_hf.rewards import Reward
from grpo_hf.rewards.loading import choose
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.fingerprint import digest, digest_of_code, digest_of_columns, digest_of_weights

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
    "ddp_bucket_cap_mb ddp_backend debug local_rank accelerator_config ignore_data_skip per_device_train_batch_size "
    "gradient_accumulation_steps steps_per_generation generation_batch_size log_unique_prompts log_multimodal "
    "pad_to_multiple_of vllm_max_model_length tool_workers tool_concurrency tool_environments"
).split()
"""Settings that change no number of a run, or only its evaluations."""

OPTIMIZER = ["learning_rate", "weight_decay"]
SCHEDULE = ["max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"]
"""Settings that are in the state of optimizer and schedule, too; the new ones replace it."""

SAMPLING = ["temperature"]
"""Settings of the samples: what was sampled ahead is sampled again."""

PROCESSES = "number of processes"

SAID = [
    *OPTIMIZER,
    *SCHEDULE,
    *SAMPLING,
    PROCESSES,
    *(
        "max_grad_norm beta epsilon epsilon_high delta entropy_coef sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps reward_timeout reward_memory_gb reward_policy reward_max_fault_share bad_gold_rows guards "
        "tool_timeout tool_memory_gb tool_result_chars tool_policy stop_at"
    ).split(),
]
"""What is changed on purpose in the middle of a run: what follows is not what would have been, which is said."""

BETWEEN_ROLLOUTS = ["temperature", "beta", "entropy_coef"]
"""Those of them that the log-probs and the choice of tokens of a rollout depend on."""

REFERENCE = "weights of the reference"


@dataclass(frozen=True)
class Changes:
    """What a run that goes on has otherwise than its checkpoint."""

    names: frozenset[str] = frozenset()
    """Settings, and the number of processes."""
    said: str = ""
    """What to say of them; nothing where there are none."""

    @property
    def schedule(self) -> bool:
        """Whether optimizer and schedule have other settings than their saved state."""
        return not self.names.isdisjoint([*OPTIMIZER, *SCHEDULE])

    @property
    def sampling(self) -> bool:
        """Whether samples would be others."""
        return not self.names.isdisjoint([*SAMPLING, PROCESSES])


def describe_run(
    args: GRPOConfig, prompts: PromptSet, rewards: list[Reward], weights: list[float], model: nn.Module
) -> dict[str, Any]:
    """What makes a run this run, as JSON holds it; ``model`` as it is before the first step."""
    shapes = [[name, list(getattr(p, "ds_shape", p.shape)), p.requires_grad] for name, p in model.named_parameters()]
    settings = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in FREE}
    asked = sorted({name for reward in rewards for name in _columns(reward, prompts)})
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    identity = settings | {
        PROCESSES: args.world_size,
        "completions of an update": args.prompts_per_rollout * args.num_generations // args.updates_per_rollout,
        "updates of a rollout": args.updates_per_rollout,
        "DeepSpeed": args.deepspeed_plugin is not None,
        "training prompts": digest([prompts.ids]),
        "columns that verifiers read": [asked, digest_of_columns(prompts.dataset, prompts.kept, asked) if asked else None],
        "code of the user's own functions": _own_code(args),
        "rewards": [reward.name for reward in rewards],
        "code and options of the rewards": {reward.name: digest_of_code(reward) for reward in rewards},
        "weights of the rewards": weights,
        "names and shapes of the weights": digest(shapes),
        "frozen weights": digest_of_weights(frozen) if frozen else None,
        "adapters": _adapters(model),
        REFERENCE: digest_of_weights(model.named_parameters()) if args.beta and not frozen else None,
    }
    return json.loads(json.dumps(identity, default=_plain))


def check_same_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: str, *, within_rollout: bool = False) -> Changes:
    """What was changed on purpose; ValueError for a change that makes it another run, or that has to wait for a new rollout
    where the checkpoint is ``within`` one."""
    changes = {
        name: ", ".join(_differences(name, saved.get(name), now.get(name)))
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    }
    if "beta" in changes and None in (saved.get(REFERENCE), now.get(REFERENCE)):
        changes.pop(REFERENCE, None)  # there is none without it
    refused = [text for name, text in changes.items() if name not in SAID]
    if now.get("DeepSpeed"):  # which loads the state of optimizer and schedule by itself
        refused += [f"under DeepSpeed {text}" for name, text in changes.items() if name in (*OPTIMIZER, PROCESSES)]
    if refused:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(refused)}. Set these as they were, or start a new run from its "
            f"weights: model={checkpoint!r} and another output_dir"
        )
    late = [text for name, text in changes.items() if name in BETWEEN_ROLLOUTS]
    if within_rollout and late:
        raise ValueError(
            f"{checkpoint} is in the middle of a rollout, which was made with other settings: {'; '.join(late)}. Go on "
            "from a checkpoint between rollouts, whose step is a multiple of the steps that each takes: "
            "steps_per_generation / gradient_accumulation_steps * num_iterations"
        )
    said = f"resuming {checkpoint} with changed settings: {'; '.join(changes.values())}" if changes else ""
    if PROCESSES in changes:
        said += ". Sums over processes are taken in another order: numbers go on equal up to rounding, not to the last bit"
        said += "; with dynamic_sampling other prompts are drawn"
    return Changes(frozenset(changes), said)


def _differences(name: str, saved: Any, now: Any) -> list[str]:
    """What to say of two values that differ; of two dicts, of the keys that do."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return [f"{name} {saved!r} -> {now!r}"]
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    return [text for key in changed for text in _differences(f"{name}.{key}", saved.get(key), now.get(key))]


def _own_code(args: GRPOConfig) -> dict[str, str]:
    """Of loss, advantages and curriculum, where they are functions of the user's and no names of ours."""
    chosen = {name: getattr(args, name) for name in ("loss_type", "advantage", "curriculum")}
    own = {name: value for name, value in chosen.items() if callable(value) or ":" in str(value)}
    return {name: digest_of_code(choose(name, value, {})) for name, value in own.items()}


def _columns(reward: Reward, prompts: PromptSet) -> list[str]:
    """Of the dataset, as far as the verifier is given them."""
    return list(prompts.dataset.column_names) if reward.takes_all else [*reward.columns, *reward.optional_columns]


def _adapters(model: nn.Module) -> dict[str, Any] | None:
    """The settings of PEFT's adapters, but for what says how they are loaded."""
    if not isinstance(model, PeftModel):
        return None
    loading = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    return {
        name: {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
            if key not in loading
        }
        for name, config in model.peft_config.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return f"{value.__module__}:{value.__qualname__}"
    return value.value if isinstance(value, Enum) else str(value)
