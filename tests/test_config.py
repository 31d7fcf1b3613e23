"""GRPOConfig: TRL's names and defaults, the numbers that follow from the batch sizes, and an error for what cannot work."""

import dataclasses
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from grpo_hf import GRPOConfig
from grpo_hf.algorithm.aggregation import AGGREGATIONS
from grpo_hf.algorithm.correction import corrected, measured
from grpo_hf.algorithm.kl import KL_ESTIMATORS
from grpo_hf.algorithm.losses import LEVELS, LOSSES
from grpo_hf.algorithm.trial import gradient_of, trial_batch
from grpo_hf.training.trl_names import ASKS_FOR_NOTHING, TRL_ONLY
from tests.tiny import tiny_trainer


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**({"output_dir": "unused", "use_cpu": True} | settings))


# ---- Defaults

TRL_DEFAULTS = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "num_generations": 8,
    "num_generations_eval": None,
    "max_completion_length": 512,
    "shuffle_dataset": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "use_vllm": False,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "importance_sampling_level": "token",
    "reward_weights": None,
    "scale_rewards": "group",
    "loss_type": "dapo",
    "mask_truncated_completions": False,
    "use_bias_correction_kl": True,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "log_completions": False,
    "num_completions_to_print": None,
}


@pytest.mark.parametrize(("name", "value"), TRL_DEFAULTS.items(), ids=TRL_DEFAULTS)
def test_a_shared_name_has_trls_default(name: str, value: Any) -> None:
    assert getattr(config(), name) == value


def test_where_a_default_is_not_trls() -> None:
    settings = config()
    assert settings.disable_dropout is True, "the policy that is trained is the one that sampled"
    assert settings.bf16 is False, "on the CPU; on a GPU that has it it is on"
    assert settings.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert settings.remove_unused_columns is False, "verifiers read the columns"


@pytest.mark.parametrize(("setting", "budget"), [({}, 2048), ({"tokens_per_microbatch": 100}, 100)])
def test_the_budget_is_the_devices_unless_it_is_given(tmp_path: Path, setting: dict, budget: int) -> None:
    assert tiny_trainer(tmp_path, **setting).policy.tokens_per_microbatch == budget


def test_every_setting_has_a_help_text() -> None:
    assert [item.name for item in dataclasses.fields(GRPOConfig) if not item.metadata.get("help")] == []


def test_transformers_own_parser_takes_it() -> None:
    """As scripts written for TRL do."""
    arguments = ["--output_dir", "unused", "--use_cpu", "--scale_rewards", "none", "--reward_weights", "1", "0.5"]
    arguments += ["--model_init_kwargs", '{"dtype": "bfloat16"}']
    (parsed,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(arguments)
    assert (parsed.scale_rewards, parsed.reward_weights) == ("none", [1.0, 0.5])
    assert parsed.model_init_kwargs == {"dtype": "bfloat16"}


# ---- Derived numbers

# settings -> prompts a rollout, optimizer steps a rollout's completions make, completions of one step
BATCHES = {
    "default": ({}, 1, 1, 8),
    "several groups": ({"per_device_train_batch_size": 32}, 4, 1, 32),
    "accumulation": ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3}, 6, 1, 48),
    "a group over several batches": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1, 1, 8),
    "two updates a rollout": ({"steps_per_generation": 2}, 2, 2, 8),
    "both": ({"gradient_accumulation_steps": 2, "steps_per_generation": 6}, 6, 3, 16),
    "by completions": ({"generation_batch_size": 64, "gradient_accumulation_steps": 4}, 8, 2, 32),
}


@pytest.mark.parametrize(("settings", "prompts", "updates", "completions"), BATCHES.values(), ids=BATCHES)
def test_what_batch_sizes_mean(settings: dict, prompts: int, updates: int, completions: int) -> None:
    made = config(**settings)
    assert (made.prompts_per_rollout, made.updates_per_rollout) == (prompts, updates)
    assert prompts * made.num_generations == updates * completions


# As TRL counts: rollouts = prompts // prompts_per_rollout; each is num_iterations * steps_per_generation micro-steps, of
# which gradient_accumulation_steps make an optimizer step. Groups of 4, batches of 8: 2 prompts a batch.
STEPS = {
    "one pass over 6 prompts": (6, {}, 1, 3),
    "the odd prompt waits": (7, {}, 1, 3),
    "accumulation": (8, {"gradient_accumulation_steps": 2}, 1, 2),
    "iterations": (6, {"num_iterations": 2}, 1, 6),
    "steps per generation": (8, {"steps_per_generation": 2}, 1, 4),
    "all of them": (16, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 3}, 1, 12),
    "three passes": (6, {}, 3, 9),
    "half a pass": (12, {}, 0.5, 3),
}


@pytest.mark.parametrize(("prompts", "settings", "epochs", "steps"), STEPS.values(), ids=STEPS)
def test_optimizer_steps_of_a_run(tmp_path: Path, prompts: int, settings: dict, epochs: float, steps: int) -> None:
    dataset = [{"prompt": f"w{number}"} for number in range(prompts)]
    trainer = tiny_trainer(tmp_path, dataset=dataset, num_train_epochs=epochs, max_steps=-1, **settings)
    made = trainer.args
    micro_steps = prompts // made.prompts_per_rollout * made.num_iterations * (made.steps_per_generation or 1)
    if made.steps_per_generation is None:
        micro_steps *= made.gradient_accumulation_steps
    assert steps == math.ceil(epochs * micro_steps / made.gradient_accumulation_steps)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert trainer.state.epoch == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, "group"),
        ({"scale_rewards": True}, "group"),
        ({"scale_rewards": "batch"}, "batch"),
        ({"scale_rewards": "none"}, "centered"),
        ({"scale_rewards": False}, "centered"),
        ({"advantage": "leave_one_out"}, "leave_one_out"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "gdpo"),
        ({"advantage": "raw", "scale_rewards": "batch"}, "raw"),
    ],
)
def test_which_advantage_a_run_uses(settings: dict, form: str) -> None:
    assert config(**settings).advantage_form == form


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_makes_an_objective(loss_type: str, level: str) -> None:
    """On the first update, π_θ = π_old, one more likely token of a better completion lowers the loss."""
    bound = {"cispo": {"epsilon_high": 5.0}, "clip_cov": {"clip_cov_lb": 4.9}}.get(loss_type, {})
    objective = config(loss_type=loss_type, importance_sampling_level=level, **bound).objective()
    batch = trial_batch()
    gradient, _ = gradient_of(objective, replace(batch, old_logprobs=batch.logprobs.detach()))
    assert torch.equal(gradient.sign(), -batch.advantages.sign())


OPTIONS = {
    "dapo": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    "cispo": {"epsilon_high": 3.0},
    "sapo": {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    "kl_cov": {"kl_cov_coef": 2.0},
    "reinforce": {},
}


@pytest.mark.parametrize(("loss_type", "options"), OPTIONS.items(), ids=OPTIONS)
def test_a_loss_gets_the_settings_that_it_names(loss_type: str, options: dict[str, float]) -> None:
    """All of them, and no others."""
    others = {"epsilon_high": 3.0, "sapo_temperature_neg": 3.0}
    (policy,) = config(loss_type=loss_type, **(others | options)).objective().terms
    assert policy.value.func is LOSSES[loss_type][0]
    assert policy.value.keywords == options


def test_settings_reach_the_objective() -> None:
    settings = {"beta": 0.04, "entropy_coef": 0.01, "kl_estimator": "k2", "use_bias_correction_kl": False}
    objective = config(loss_type="grpo", importance_sampling_level="sequence", **settings).objective()
    policy, kl, entropy = objective.terms
    assert [term.name for term in objective.terms] == ["policy", "kl", "entropy"]
    assert (policy.coefficient, kl.coefficient, entropy.coefficient) == (1.0, 0.04, -0.01)
    assert policy.aggregation is kl.aggregation is AGGREGATIONS["sequence_mean"]
    assert kl.value.keywords == {"estimator": KL_ESTIMATORS["k2"], "bias_correction": False}
    assert objective.level is LEVELS["sequence"]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_another_aggregation_than_the_losss_own(name: str) -> None:
    assert config(loss_type="grpo", loss_aggregation=name).objective().terms[0].aggregation is AGGREGATIONS[name]


def test_selections_get_the_settings_that_they_name() -> None:
    selections = (
        config(loss_type="clip_cov", clip_cov_ratio=0.1, clip_cov_ub=3.0, top_entropy_quantile=0.2).objective().selections
    )
    of_clip = {"epsilon": 0.2, "epsilon_high": None}
    assert selections["clip_cov"].keywords == {"clip_cov_ratio": 0.1, "clip_cov_lb": 1.0, "clip_cov_ub": 3.0} | of_clip
    assert selections["top_entropy"].keywords == {"top_entropy_quantile": 0.2}
    assert config(advantage="pass_at_k", advantage_k=3).credit().keywords == {"advantage_k": 3}
    assert config().objective().selections == {}


def test_vespo_takes_the_engines_weights_into_its_own() -> None:
    settings = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"}
    (policy,) = config(use_vllm=True, **settings).objective().terms
    assert policy.factors == (measured,) and policy.value.keywords["vllm_importance_sampling_correction"] is True
    (policy,) = config(**settings).objective().terms
    assert policy.value.keywords["vllm_importance_sampling_correction"] is False, "there is no engine"


def test_the_engine_is_corrected_for_or_measured() -> None:
    def factors(**settings: Any) -> tuple:
        return config(**settings).objective().terms[0].factors

    assert factors() == factors(use_vllm=True, vllm_importance_sampling_correction=False) == (measured,)
    bounds = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": None}
    (_, mask) = factors(off_policy_mask_threshold=0.5)
    assert mask.keywords == {"threshold": 0.5}
    (factor,) = factors(use_vllm=True, vllm_importance_sampling_mode="token_mask", **bounds)
    assert factor.func is corrected
    assert factor.keywords == {"mode": "token_mask", "low": 0.5, "high": None}


# ---- Errors

ERRORS = {
    # names
    "unknown setting": (
        {"num_generation": 4},
        "unknown setting 'num_generation'; did you mean num_generations or num_generations_eval",
    ),
    "nothing near": ({"xyzzy": 1}, r"unknown setting 'xyzzy'$"),
    "TRL only": ({"max_prompt_length": 512}, "no setting 'max_prompt_length': use overlong_prompts='drop'"),
    "TRL only, another way": ({"vllm_importance_sampling_cap": 2.0}, "use vllm_importance_sampling_clip_max"),
    "loss_type": (
        {"loss_type": "dr-grpo"},
        r"loss_type='dr-grpo' is not one of dapo, grpo, dr_grpo, .* \(nearest: dr_grpo\), nor path/file.py:function",
    ),
    "importance_sampling_level": (
        {"importance_sampling_level": "sequences"},
        "is not one of token, sequence; did you mean 'sequence'",
    ),
    "scale_rewards": ({"scale_rewards": "groups"}, "is not one of group, batch, none; did you mean 'group'"),
    "advantage": ({"advantage": "leave_1_out"}, r"\(nearest: leave_one_out\), nor path/file.py:function"),
    "loss without a name": ({"loss_type": lambda batch: (batch.logprobs, {})}, "give a function at the top of a file"),
    "credit without a name": ({"advantage": lambda scores, weights: scores[..., 0]}, "function at the top of a file"),
    "loss_aggregation": ({"loss_aggregation": "token_sum"}, "loss_aggregation='token_sum' is not one of None, token_mean"),
    "kl_estimator": ({"kl_estimator": "k4"}, "kl_estimator='k4' is not one of k1, k2, k3"),
    "token_layout": ({"token_layout": "packd"}, "is not one of auto, packed, padded; did you mean 'packed'"),
    "overlong_prompts": ({"overlong_prompts": "cut"}, "overlong_prompts='cut' is not one of error, drop"),
    # numbers
    "no generations": ({"num_generations": 0}, "num_generations=0, but num_generations >= 1 is needed"),
    "no generations in evaluation": ({"num_generations_eval": 0}, "num_generations_eval=0, but"),
    "no iterations": ({"num_iterations": 0}, "num_iterations=0, but num_iterations >= 1 is needed"),
    "no completion": ({"max_completion_length": 0}, "max_completion_length=0, but"),
    "no tokens": ({"tokens_per_microbatch": 0}, "tokens_per_microbatch=0, but"),
    "greedy training": ({"temperature": 0.0}, "temperature=0.0, but temperature > 0 is needed"),
    "negative eval_temperature": ({"eval_temperature": -1.0}, "eval_temperature=-1.0, but eval_temperature >= 0"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0, but 0 < top_p <= 1 is needed"),
    "top_k": ({"top_k": -1}, "top_k=-1, but top_k >= 0 is needed"),
    "min_p": ({"min_p": 1.5}, "min_p=1.5, but 0 <= min_p <= 1 is needed"),
    "repetition_penalty": ({"repetition_penalty": 0.0}, "repetition_penalty=0.0, but repetition_penalty > 0 is needed"),
    "epsilon": ({"epsilon": -0.1}, "epsilon=-0.1, but epsilon >= 0 is needed"),
    "epsilon_high": ({"epsilon_high": -0.1}, "epsilon_high=-0.1, but epsilon_high >= 0 is needed"),
    "beta": ({"beta": -0.1}, "beta=-0.1, but beta >= 0 is needed"),
    "delta inside the clip": ({"delta": 1.2}, "delta=1.2, but delta > 1 \\+ epsilon_high is needed"),
    "delta inside the high clip": ({"delta": 1.2, "epsilon_high": 0.3}, "epsilon_high=0.3, delta=1.2, but"),
    "ref_model_mixup_alpha": (
        {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.5},
        "ref_model_mixup_alpha=1.5, but 0 <= ref_model_mixup_alpha <= 1 is needed",
    ),
    "ref_model_sync_steps": (
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 0},
        "ref_model_sync_steps=0, but ref_model_sync_steps >= 1 is needed",
    ),
    "cispo with a distance": ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high=0.28: .* at least 1"),
    "no rounds": ({"dynamic_sampling_max_rounds": 0}, "dynamic_sampling_max_rounds=0, but"),
    "skip at once": ({"skip_solved_after": 0}, "skip_solved_after=0, but skip_solved_after >= 1 is needed"),
    "never skipped": ({"revisit_after": 0}, "revisit_after=0, but revisit_after >= 1 is needed"),
    "curriculum": ({"curriculum": "skip_solve"}, "curriculum='skip_solve' is not one of .*nearest: skip_solved"),
    "curriculum without a name": ({"curriculum": lambda history: True}, "give a function at the top of a file"),
    "advantage_k": ({"advantage_k": 1}, "advantage_k=1, but advantage_k >= 2 is needed"),
    "advantage_k of a small group": (
        {"advantage": "pass_at_k", "advantage_k": 8, "num_generations": 4},
        "advantage_k=8, num_generations=4, but advantage_k <= num_generations is needed",
    ),
    "clip_cov_lb": ({"clip_cov_lb": 9.0}, "clip_cov_lb=9.0, clip_cov_ub=5.0, but clip_cov_lb <= clip_cov_ub is needed"),
    "sapo_temperature_pos": ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos=0.0, but sapo_temperature_pos > 0"),
    "top_entropy_quantile": ({"top_entropy_quantile": 1.5}, "1.5, but 0 <= top_entropy_quantile <= 1 is needed"),
    "entropy bounds": (
        {"use_adaptive_entropy": True, "entropy_coef": 2.0},
        "entropy_coef_min=0.0, entropy_coef=2.0, entropy_coef_max=1.0, but with use_adaptive_entropy=True",
    ),
    "two ways to sum rewards": (
        {"multi_objective_aggregation": "normalize_then_sum", "advantage": "raw"},
        "is advantage='gdpo', and advantage is 'raw'; set one of them",
    ),
    "multi_objective_aggregation": ({"multi_objective_aggregation": "sum"}, "is not one of sum_then_normalize, normalize"),
    "vespo by sequence": (
        {"loss_type": "vespo", "use_vllm": True},
        "vllm_importance_sampling_mode='sequence_mask', but loss_type='vespo' .* 'token_truncate' or 'token_mask'",
    ),
    # what cannot go together
    "dynamic sampling without groups": (
        {"dynamic_sampling": True, "num_generations": 1, "advantage": "raw"},
        "dynamic_sampling=True .* num_generations=1 has none",
    ),
    "dynamic sampling ahead": (
        {"dynamic_sampling": True, "rollout_ahead": 1, "use_vllm": True, "vllm_mode": "server"},
        "rollout_ahead=1 asks for the next rollout before this one's rewards are known",
    ),
    "half an engine": (
        {"vllm_tensor_parallel_size": 2, "use_vllm": True},
        "=2 processes share an engine, and 1 processes train: the second has to be a multiple of the first",
    ),
    "a server's own option": (
        {"vllm_tensor_parallel_size": 2, "use_vllm": True, "vllm_mode": "server"},
        "a server takes grpo-hf serve MODEL --tensor-parallel-size",
    ),
    "curriculum ahead": (
        {"curriculum": "skip_solved", "rollout_ahead": 1, "use_vllm": True, "vllm_mode": "server"},
        "set rollout_ahead=0",
    ),
    "torch_compile": ({"torch_compile": True}, "torch_compile=True compiles the model's own forward, which"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "would break up groups; lower tokens_per_microbatch"),
    "sync_ref_model without beta": ({"sync_ref_model": True}, "needs a reference model, so beta > 0; beta is 0"),
    # batches
    "group of 1": (
        {"num_generations": 1},
        "num_generations=1 makes every 'group' advantage 0; .* set advantage to one of max_only, raw",
    ),
    "half a group": (
        {"per_device_train_batch_size": 12},
        "12 \\* 1 = 12 completions at a time, which does not hold whole groups of num_generations=8; nearest: 8 or 16",
    ),
    "less than a group": ({"per_device_train_batch_size": 4}, "4 \\* 1 = 4 completions .*; nearest: 8 completions"),
    "half a group over several batches": (
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        "3 \\* 4 = 12 completions at a time, .*; nearest: 8 or 16",
    ),
    "half an optimizer step": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
        "steps_per_generation=6 is not a multiple of gradient_accumulation_steps=4, .*; nearest: 4 or 8",
    ),
    "no steps per generation": ({"steps_per_generation": 0}, "steps_per_generation=0 is not a multiple of .*; nearest: 1"),
    "generation_batch_size": (
        {"generation_batch_size": 20},
        "generation_batch_size=20 is not a multiple of .* \\* processes = 8 \\* 1; nearest: 16 or 24",
    ),
    "the rollout's size twice": (
        {"generation_batch_size": 16, "steps_per_generation": 2},
        "generation_batch_size=16 and steps_per_generation=2 say the same thing twice",
    ),
}


@pytest.mark.parametrize(("settings", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_work_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("name", TRL_ONLY)
def test_a_name_of_trl_that_is_not_here_says_what_to_use(name: str) -> None:
    """Unless it asks for nothing."""
    assert name not in {item.name for item in dataclasses.fields(GRPOConfig)}
    with pytest.raises(ValueError, match=f"no setting '{name}': .{{10,}}"):
        config(**{name: "something"})
    config(**{name: None})
    config(**{name: ASKS_FOR_NOTHING.get(name)})


def test_generation_kwargs_are_settings_under_other_names() -> None:
    given = {
        "temperature": 0.7,
        "max_new_tokens": 32,
        "stop": "END",
        "eos_token_id": [3, 4],
        "do_sample": True,
        "num_beams": 1,
    }
    made = config(generation_kwargs=given, temperature=1.0)
    assert (made.temperature, made.max_completion_length) == (0.7, 32)
    assert (made.stop_strings, made.stop_token_ids) == (["END"], [3, 4])
    for given, message in {
        "beams": ({"num_beams": 4}, "has num_beams=4, but completions are samples of the policy"),
        "another filter": (
            {"suppress_tokens": [1]},
            "has 'suppress_tokens', which the loss could not account for; it may have",
        ),
        "a bound": ({"top_p": 0.0}, "top_p=0.0, but 0 < top_p <= 1 is needed"),
    }.values():
        with pytest.raises(ValueError, match=message):
            config(generation_kwargs=given)


def test_trust_remote_code_goes_to_what_is_loaded() -> None:
    assert config(trust_remote_code=True).model_init_kwargs == {"trust_remote_code": True}
    assert config(trust_remote_code=True, model_init_kwargs={"revision": "x"}).model_init_kwargs["revision"] == "x"
    assert config().model_init_kwargs is None


WARNINGS = {
    "GSPO by sums": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "loss_aggregation": "sequence_sum"},
        "for GSPO leave loss_aggregation out",
    ),
    "GSPO by tokens": (
        {"importance_sampling_level": "sequence"},
        "weights each sequence by its completion length; for GSPO",
    ),
    "cispo without a bound": ({"loss_type": "cispo"}, "by epsilon_high=5.0, since none is given"),
    "LUSPO by tokens": ({"loss_type": "luspo"}, "is meant for importance_sampling_level='sequence'"),
    "VESPO by sequence": (
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        "a ratio of completions by itself",
    ),
    "GSPO": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, None),
    "LUSPO": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, None),
}


@pytest.mark.parametrize(("settings", "message"), WARNINGS.values(), ids=WARNINGS)
def test_levels_of_no_paper_are_warned_of(settings: dict, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("grpo_hf.training.config_checks"), "warning", said.append)
    config(**settings)
    assert len(said) == (message is not None) and all(str(message) in text for text in said)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 1, "advantage": "raw"},
        {"num_generations": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"delta": 1.3},
        {"delta": 1.2, "epsilon_high": 0.0},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"eval_temperature": 0.0},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask"},
        {"advantage": "opo"},
    ],
    ids=str,
)
def test_what_can_work_is_not(settings: dict) -> None:
    config(**settings)
