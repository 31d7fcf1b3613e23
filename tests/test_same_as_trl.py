"""The objectives that TRL has too, by its own code on the same tensors; skipped where TRL is not installed."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from grpo_hf import GRPOConfig
from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.sequences import counted_mean
from grpo_hf.types import TokenBatch

trl = pytest.importorskip("trl", minversion="1.16")

ROWS, LENGTHS = 6, torch.tensor([7, 4, 1, 9, 5, 9])
MASK = torch.arange(9) < LENGTHS[:, None]


def made(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probs of six completions, padded to the longest: ratios inside and outside the clips, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)

    logprobs = -0.2 - noise(1.0).abs()
    old = (logprobs + noise(0.3)).clamp(max=-0.01)
    sampled = (old + noise(0.2)).clamp(max=-0.01)
    advantages = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return {
        "logprobs": logprobs,
        "old": old,
        "sampled": sampled,
        "ref": logprobs + noise(0.3),
        "entropy": noise(1.0).abs(),
        "advantages": advantages,
    }


def settings_of(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**({"output_dir": "unused", "use_cpu": True, "max_completion_length": 9} | settings))


def by_trl(data: dict[str, torch.Tensor], args: GRPOConfig) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Its loss, the gradient by log-prob, and its metrics, of one step of one batch in one process."""
    is_gmpo = args.loss_type == "gmpo"
    cls = importlib.import_module("trl.experimental.gmpo").GMPOTrainer if is_gmpo else trl.GRPOTrainer
    logprobs, entropy = (data[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    metrics: dict[str, list[float]] = {}
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
        pad_across_processes=lambda value, **_: value,
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": DictOfLists(metrics)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        max_completion_length=args.max_completion_length,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        use_adaptive_entropy=False,
        **{
            name: getattr(args, name)
            for name in "loss_type importance_sampling_level top_entropy_quantile off_policy_mask_threshold beta use_vllm "
            "vllm_importance_sampling_correction entropy_coef".split()
        },
    )
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(trainer, name, getattr(cls, name))
    trainer.get_high_entropy_mask = partial(cls.get_high_entropy_mask, trainer)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, 9, dtype=torch.long),
        "completion_mask": MASK.long(),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": LENGTHS.sum(),
    }
    if args.use_vllm:
        inputs["sampling_per_token_logps"] = data["sampled"]
        inputs["importance_sampling_ratio"] = its_correction(data, args)
    args.steps_per_generation = 1
    loss = cls._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient[MASK], {name: values[-1] for name, values in metrics.items()}


class DictOfLists(dict):
    """What TRL appends its metrics to."""

    def __init__(self, kept: dict[str, list[float]]):
        self.kept = kept

    def __getitem__(self, name: str) -> list[float]:
        return self.kept.setdefault(name, [])


def its_correction(data: dict[str, torch.Tensor], args: GRPOConfig) -> torch.Tensor:
    """As its `_generate_and_score_completions` has it, for the modes by token that are tried here."""
    ratio = ((data["old"] - data["sampled"]) * MASK).exp()
    high = args.vllm_importance_sampling_clip_max
    assert args.vllm_importance_sampling_mode.startswith("token")
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(max=high)
    return ratio.masked_fill(ratio > high, 0.0)


def by_us(data: dict[str, torch.Tensor], args: GRPOConfig) -> tuple[float, torch.Tensor, dict[str, float]]:
    logprobs, entropy = (data[name][MASK].clone().requires_grad_() for name in ("logprobs", "entropy"))
    completion = torch.arange(ROWS).repeat_interleave(LENGTHS)
    batch = TokenBatch(
        logprobs=logprobs,
        entropy=entropy,
        advantages=data["advantages"][completion],
        old_logprobs=data["old"][MASK],
        completion=completion,
        lengths=LENGTHS,
        rollout_logprobs=data["sampled"][MASK] if args.use_vllm else None,
        ref_logprobs=data["ref"][MASK],
    )
    tokens = float(LENGTHS.sum())
    loss, metrics = args.objective()(batch, Denominators(tokens, ROWS, tokens, 1, 9, tokens))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    said = {name: value[~value.isnan()].mean().item() for name, value in metrics.items()}
    said["clip_ratio/low_min"] = counted_mean(metrics.get("clip_ratio/low", logprobs), batch).min().item()
    said["clip_ratio/high_max"] = counted_mean(metrics.get("clip_ratio/high", logprobs), batch).max().item()
    return loss.item(), gradient, said


BY_TOKEN = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1}
CASES = {
    **{name: {"loss_type": name} for name in ("dapo", "grpo", "dr_grpo", "bnpo", "sapo", "vespo", "gmpo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.02},
    "delta": {"delta": 1.3, "epsilon_high": 0.25},
    "kl": {"beta": 0.1},
    "kl, plain": {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.02, "beta": 0.1},
    "off-policy mask, engine": {"off_policy_mask_threshold": 0.02} | BY_TOKEN,
    "top entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "engine": BY_TOKEN,
    "vespo, truncated": {"loss_type": "vespo"} | BY_TOKEN,
    "vespo, masked": {"loss_type": "vespo"} | BY_TOKEN | {"vllm_importance_sampling_mode": "token_mask"},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_loss_gradient_and_metrics(settings: dict[str, Any]) -> None:
    data, args = made(), settings_of(**settings)
    loss, gradient, metrics = by_trl(data, args)
    ours, our_gradient, our_metrics = by_us(data, args)
    assert ours == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-3
    for name, value in metrics.items():
        mine = our_metrics.get(name, our_metrics.get(name.removesuffix("_mean")))
        if name not in ("policy_loss", "entropy_coef"):
            assert mine == pytest.approx(value, rel=1e-5, abs=1e-7), name


OF_ITS_OWN = {"bf16": "on where there is a GPU that has it", "disable_dropout": "the policy that sampled is trained"}


def test_a_setting_at_its_default_is_accepted() -> None:
    """All that are its GRPOConfig's own; and means the same, but for these."""
    its = {item.name: item.default for item in dataclasses.fields(trl.GRPOConfig)}
    inherited = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    own = {name: value for name, value in its.items() if name not in inherited}
    assert len(own) > 60 and "vllm_model_impl" in own
    made = settings_of(**(own | {"max_completion_length": 9}))
    for name, value in own.items():
        if hasattr(made, name) and name not in {*OF_ITS_OWN, "max_completion_length"}:
            assert getattr(made, name) == value, name


def test_multi_objective_aggregation() -> None:
    """Its two lines for normalize_then_sum, with its own helper."""
    nanstd = importlib.import_module("trl.trainer.utils").nanstd
    scores, weights = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5])
    scores[0, 1, 0] = torch.nan
    normalized = (scores - scores.nanmean(1, True)) / (nanstd(scores, dim=1, keepdim=True) + 1e-4)
    rewards = (normalized.view(-1, 2) * weights).nansum(1)
    expected = (rewards - rewards.mean()) / (nanstd(rewards) + 1e-4)
    torch.testing.assert_close(ADVANTAGES["gdpo"](scores, weights).flatten(), expected, rtol=1e-4, atol=1e-5)
