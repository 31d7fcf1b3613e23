"""What GRPOConfig refuses: settings that are no choice, out of bounds, or at odds with each other."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from grpo_hf.algorithm.advantages import ADVANTAGES, NEEDS_A_GROUP
from grpo_hf.algorithm.aggregation import (
    AGGREGATIONS,
    constant_length,
    local_token_mean,
    sequence_sum,
    token_mean,
    update_mean,
)
from grpo_hf.algorithm.correction import CORRECTION_MODES
from grpo_hf.algorithm.kl import KL_ESTIMATORS
from grpo_hf.algorithm.losses import LEVELS
from grpo_hf.algorithm.trial import check_loss, trial_batch
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.rollout.weight_sync import LORA_SYNCS

if TYPE_CHECKING:
    from grpo_hf.training.config import GRPOConfig

logger = logging.get_logger(__name__)

WEIGHS_BY_LENGTH = (token_mean, update_mean, constant_length, local_token_mean, sequence_sum)
"""Aggregations in which a completion has as many shares as tokens."""


def check_config(config: GRPOConfig) -> None:
    """Raises ValueError that names the value, the limit and the fix."""
    _check_names(config)
    _check_numbers(config)
    _check_pairs(config)
    _check_objective(config)
    _check_engine(config)
    _check_batches(config)
    _check_choice(config)
    config.reward_settings()
    config.tool_settings()
    config.tool_policies()
    config.chosen_guards()


def _check_names(config: GRPOConfig) -> None:
    choices: dict[str, Iterable[Any]] = {
        "loss_aggregation": (None, *AGGREGATIONS),
        "importance_sampling_level": LEVELS,
        "scale_rewards": ("group", "batch", "none"),
        "kl_estimator": KL_ESTIMATORS,
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "token_layout": ("auto", *LAYOUTS),
        "overlong_prompts": ("error", "drop"),
        "bad_gold_rows": ("error", "drop", "keep"),
        "vllm_mode": ("colocate", "server"),
        "vllm_lora_sync": LORA_SYNCS,
        "rollout_ahead": (0, 1),
        "vllm_importance_sampling_mode": CORRECTION_MODES,
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            near = difflib.get_close_matches(str(value), map(str, known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, known))}{hint}")


BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "{} >= 1": (
        lambda value: value >= 1,
        "num_generations num_generations_eval num_iterations max_completion_length tokens_per_microbatch "
        "dynamic_sampling_max_rounds skip_solved_after revisit_after ref_model_sync_steps "
        "vllm_max_model_length vllm_tensor_parallel_size",
    ),
    "{} >= 2": (lambda value: value >= 2, "advantage_k"),
    "{} >= 0": (
        lambda value: value >= 0,
        "eval_temperature top_k profile epsilon epsilon_high beta kl_cov_coef entropy_coef_delta "
        "entropy_coef_min teacher_coef router_aux_loss_coef max_tool_calling_iterations",
    ),
    "{} > 0": (
        lambda value: value > 0,
        "temperature repetition_penalty vllm_server_timeout sapo_temperature_pos sapo_temperature_neg",
    ),
    "0 < {} <= 1": (lambda value: 0 < value <= 1, "top_p vllm_gpu_memory_utilization clip_cov_ratio kl_cov_ratio"),
    "0 <= {} <= 1": (lambda value: 0 <= value <= 1, "min_p ref_model_mixup_alpha top_entropy_quantile"),
}
"""The settings that each bound is for, where they are not None."""


def _check_numbers(config: GRPOConfig) -> None:
    for bound, (holds, names) in BOUNDS.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value}, but {bound.format(name)} is needed")
    if 0 < config.max_steps <= config.profile:
        raise ValueError(f"max_steps={config.max_steps}, profile={config.profile}, but profile < max_steps is needed")
    if config.auto_find_batch_size:
        raise ValueError("auto_find_batch_size=True would break up groups; lower tokens_per_microbatch instead")
    if config.torch_compile:
        raise ValueError(
            "torch_compile=True compiles the model's own forward, which is not what is run here; leave it out. On a GPU the "
            "attention over the token tree is compiled by itself"
        )
    if config.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={config.neftune_noise_alpha} adds noise to the policy that is trained and none to the one "
            "that samples, so they would differ; leave it out"
        )
    if config.sync_ref_model and not config.beta:
        raise ValueError("sync_ref_model=True needs a reference model, so beta > 0; beta is 0")


def _check_pairs(config: GRPOConfig) -> None:
    """No lower limit above its upper one, and no k above the number of samples that it chooses from."""
    pairs = [("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), ("clip_cov_lb", "clip_cov_ub")]
    if config.advantage == "pass_at_k":
        pairs.append(("advantage_k", "num_generations"))
    for low, high in pairs:
        least, most = getattr(config, low), getattr(config, high)
        if least is not None and most is not None and not least <= most:
            raise ValueError(f"{low}={least}, {high}={most}, but {low} <= {high} is needed")


def _warn_of_levels(config: GRPOConfig) -> None:
    """Say so where the level of the ratio and the loss are not those of any paper."""
    by_sequence, loss = config.importance_sampling_level == "sequence", config.loss_type
    if loss == "cispo" and config.epsilon_high is None:
        logger.warning(
            "loss_type='cispo' bounds the ratio itself: by epsilon_high=5.0, since none is given (TRL takes epsilon)"
        )
    if loss == "luspo" and not by_sequence:
        logger.warning("loss_type='luspo' is meant for importance_sampling_level='sequence', and that is 'token'")
    elif loss in ("vespo", "gmpo") and by_sequence:
        logger.warning(f"loss_type={loss!r} has a ratio of completions by itself; leave importance_sampling_level 'token'")
    elif by_sequence and loss != "luspo" and config.objective().terms[0].aggregation in WEIGHS_BY_LENGTH:
        given = config.loss_aggregation if loss == "grpo" else None
        logger.warning(
            f"importance_sampling_level='sequence' with loss_type={loss!r} weights each sequence by its completion length; "
            + ("for GSPO set loss_type='grpo'" if given is None else "for GSPO leave loss_aggregation out")
        )


def _check_objective(config: GRPOConfig) -> None:
    """Try it on made-up tokens, which have what this run's tokens will have."""
    objective, batch = config.objective(), trial_batch()
    batch = replace(
        objective.prepared(batch),
        rollout_logprobs=batch.rollout_logprobs if config.use_vllm else None,
        ref_logprobs=batch.ref_logprobs if config.beta else None,
        teacher_logprobs=None,
    )
    check_loss(objective.terms[0].value, batch, f"loss_type={config.loss_type!r}")
    low, start, high = config.entropy_coef_min, config.entropy_coef, config.entropy_coef_max
    if config.use_adaptive_entropy and not low <= start <= high:
        raise ValueError(
            f"entropy_coef_min={low}, entropy_coef={start}, entropy_coef_max={high}, but with use_adaptive_entropy=True "
            "entropy_coef_min <= entropy_coef <= entropy_coef_max is needed"
        )
    if config.multi_objective_aggregation == "normalize_then_sum" and config.advantage not in (None, "gdpo"):
        raise ValueError(
            f"multi_objective_aggregation='normalize_then_sum' is advantage='gdpo', and advantage is {config.advantage!r}; "
            "set one of them"
        )
    config.credit()
    _warn_of_levels(config)


def _check_engine(config: GRPOConfig) -> None:
    structured = config.vllm_structured_outputs_regex is not None or config.vllm_structured_outputs_json is not None
    if structured and not config.use_vllm:
        raise ValueError("vllm_structured_outputs_regex and vllm_structured_outputs_json need use_vllm=True")
    if config.vllm_mode == "server" and not config.use_vllm:
        raise ValueError(
            "vllm_mode='server' asks for vLLM, and use_vllm is False; set use_vllm=True, or leave vllm_mode out"
        )
    if config.vllm_server_base_url is not None and config.vllm_mode != "server":
        raise ValueError(
            f"vllm_server_base_url={config.vllm_server_base_url!r} is for vllm_mode='server', and vllm_mode is "
            f"{config.vllm_mode!r}; set use_vllm=True and vllm_mode='server', or leave the address out"
        )
    parts = config.vllm_tensor_parallel_size
    if parts > 1 and (not config.use_vllm or config.vllm_mode != "colocate"):
        raise ValueError(
            f"vllm_tensor_parallel_size={parts} is for vLLM in the training processes, so use_vllm=True and "
            "vllm_mode='colocate'; a server takes grpo-hf serve MODEL --tensor-parallel-size"
        )
    if config.world_size % parts:
        raise ValueError(
            f"vllm_tensor_parallel_size={parts} processes share an engine, and {config.world_size} processes train: the "
            "second has to be a multiple of the first"
        )
    if not config.rollout_ahead:
        return
    if not config.use_vllm or config.vllm_mode != "server":
        raise ValueError(
            f"rollout_ahead=1 samples while training goes on, which takes a server: set use_vllm=True and "
            f"vllm_mode='server' (use_vllm is {config.use_vllm}, vllm_mode {config.vllm_mode!r})"
        )
    if structured or not config.vllm_importance_sampling_correction:
        raise ValueError(
            "rollout_ahead=1 trains on samples of older weights, which the loss must be corrected for: set "
            "vllm_importance_sampling_correction=True and leave structured outputs, which have no log-probs to do it "
            "with, out"
        )


def _check_choice(config: GRPOConfig) -> None:
    choice = config.choice()
    if config.dynamic_sampling and config.num_generations == 1:
        raise ValueError(
            "dynamic_sampling=True keeps groups with unequal rewards, and num_generations=1 has none; sample 2 or more "
            "a prompt, or set dynamic_sampling=False"
        )
    if config.rollout_ahead and (choice.dynamic_sampling or choice.curricula):
        raise ValueError(
            "dynamic_sampling, skip_solved_after and curriculum choose prompts by the rewards before them, and "
            "rollout_ahead=1 asks for the next rollout before this one's rewards are known; set rollout_ahead=0"
        )


def _check_batches(config: GRPOConfig) -> None:
    group, batch = config.num_generations, config.per_device_train_batch_size
    accumulation, steps = config.gradient_accumulation_steps, config.batches_per_rollout
    if group == 1 and config.advantage_form in NEEDS_A_GROUP:
        raise ValueError(
            f"num_generations=1 makes every {config.advantage_form!r} advantage 0; sample 2 or more a prompt, or set "
            f"advantage to one of {', '.join(sorted(set(ADVANTAGES) - NEEDS_A_GROUP))}"
        )
    if config.generation_batch_size is not None and config.steps_per_generation is not None:
        raise ValueError(
            f"generation_batch_size={config.generation_batch_size} and steps_per_generation="
            f"{config.steps_per_generation} say the same thing twice; set one of them"
        )
    if config.generation_batch_size is not None and config.generation_batch_size % (batch * config.world_size):
        raise ValueError(
            f"generation_batch_size={config.generation_batch_size} is not a multiple of per_device_train_batch_size * "
            f"processes = {batch} * {config.world_size}; nearest: "
            f"{_nearest(config.generation_batch_size, batch * config.world_size)}"
        )
    if steps % accumulation or steps == 0:
        raise ValueError(
            f"steps_per_generation={steps} is not a multiple of gradient_accumulation_steps={accumulation}, so a "
            f"rollout would not hold whole optimizer steps; nearest: {_nearest(steps, accumulation)}"
        )
    if batch * steps % group:
        raise ValueError(
            f"each process samples per_device_train_batch_size * steps_per_generation = {batch} * {steps} = "
            f"{batch * steps} completions at a time, which does not hold whole groups of num_generations={group}; "
            f"nearest: {_nearest(batch * steps, group)} completions"
        )


def _nearest(value: int, step: int) -> str:
    below = value // step * step
    return " or ".join(str(number) for number in (below, below + step) if number > 0)
