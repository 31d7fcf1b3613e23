"""Models with a PEFT adapter: which can be trained here, and what their reference is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from grpo_hf.rollout.weight_sync import adapter_weights, is_quantized
from grpo_hf.training.models import causal_lm, load_adapter_config

REFERENCE = "reference"
"""PEFT's name of the adapter that stays as the trained one came."""

TOLERANCE = 1e-3
"""Largest accepted difference between the logits of policy and reference before training, relative to the largest logit."""

TRIED_TOKENS = 8
"""Of a prompt, in the passes that tell whether an adapter is trained, and its reference is right."""

NOT_TRAINED: dict[str, str] = {
    PeftType.ADALORA: "its ranks are allocated, and its orthogonality kept, by steps that are not taken here",
    PeftType.XLORA: "its adapters are mixed by the model around the causal LM, and only that LM is run",
}
"""PEFT types that are refused, beside those that learn a prompt, and why."""


def check_adapter_config(config: PeftConfig, *, beta: float) -> None:
    """Raise ValueError for an adapter that would not be trained, or, with ``beta``, has no reference."""
    why = NOT_TRAINED.get(config.peft_type or "")  # type: ignore[arg-type]
    if config.is_prompt_learning:
        why = "its prompt or prefix is put before the tokens by the model around the causal LM, and only that LM is run"
    if getattr(config, "alora_invocation_tokens", None):
        why = "what alora_invocation_tokens switch on is found by the model around the causal LM, and only that LM is run"
    if why:
        raise ValueError(f"{type(config).__name__} would not be trained: {why}. Use a plain LoraConfig")
    bias = getattr(config, "bias", "none")
    if beta > 0 and bias != "none":
        raise ValueError(
            f"beta={beta} with {type(config).__name__}(bias={bias!r}): the reference is the model with another adapter or "
            "none, but trained biases are the model's own; set bias='none' or beta=0"
        )


def config_of(model: str | PreTrainedModel | PeftModel, **options: Any) -> PeftConfig | None:
    """Of the adapter that the model has or, as a folder or repository, is."""
    if isinstance(model, str):
        return load_adapter_config(model, **options)
    return model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None


def check_one_adapter(model: Any, own: PeftConfig | None, peft_config: PeftConfig | None) -> None:
    """Raise ValueError for a model that has an adapter already and is to get another."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model holds its adapter in transformers' own way (load_adapter); give the trainer a PeftModel: "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True), or the adapter's folder as model"
        )
    if own is not None and peft_config is not None:
        raise ValueError(
            f"model has an adapter already ({type(own).__name__}), which peft_config would erase; leave it out to go "
            "on training the one that is there, or put it into the weights first: model = model.merge_and_unload()"
        )


def with_adapter(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, needs_reference: bool
) -> tuple[PreTrainedModel | PeftModel, str | None]:
    """The model with the adapter that it has or is to get, and the name of its reference adapter.

    None: it needs no other reference than the model with its adapter switched off. Checkpoints hold the trained adapter
    alone.
    """
    if peft_config is not None:
        model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    if not isinstance(model, PeftModel):
        return model, None
    trained = model.active_adapters
    if len(trained) != 1:
        raise ValueError(f"{len(trained)} adapters are active ({', '.join(trained)}), but one is trained; use set_adapter")
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=trained)  # type: ignore[method-assign]
    return model, _add_reference(model) if needs_reference else None


def _add_reference(model: PeftModel) -> str | None:
    weights = adapter_weights(model)
    if _changes_nothing(weights):
        return None
    as_before = _trained_marks(model)
    if REFERENCE not in model.peft_config:
        config: Any = copy.deepcopy(model.peft_config[model.active_adapter])
        config.init_lora_weights = True  # others may change the base
        model.add_adapter(REFERENCE, config)
    set_peft_model_state_dict(model, weights, adapter_name=REFERENCE)
    as_before()
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}" in name:
            parameter.requires_grad_(False)
    return REFERENCE


def _changes_nothing(weights: dict[str, Tensor]) -> bool:
    """Whether it is a LoRA as PEFT begins it, with one factor of each product at zero, and nothing beside it."""
    first = [name for name in weights if "lora_B" in name or "lora_embedding_A" in name]
    second = [name for name in weights if "lora_A" in name or "lora_embedding_B" in name]
    return len(first) == len(second) == len(weights) / 2 and not any(weights[name].any() for name in first)


@contextmanager
def reference_weights(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Inside, the model computes with this adapter, or with none."""
    with ExitStack() as stack:
        as_before = _trained_marks(model)
        stack.callback(as_before)
        if adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, model.active_adapter)
            model.set_adapter(adapter)
        as_before()
        yield


def _trained_marks(model: PeftModel) -> Callable[[], None]:
    """What marks the same parameters as trained again: PEFT changes that with the active adapter, and launchers, which have
    cut up and hooked the trained ones, must not see it."""
    marks = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def mark() -> None:
        for parameter, trained in marks:
            parameter.requires_grad_(trained)

    return mark


def check_trained(model: PeftModel, ids: list[int]) -> None:
    """Try a pass over a few of these tokens, after one without a gradient, as sampling is. Raises ValueError for an adapter
    that gets no gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no weight of the PeftModel is trained; load its adapter with is_trainable=True")
    with torch.no_grad():
        _logits(model, ids)
    loss = _logits(model, ids).square().mean()
    none = [None] * len(trained)
    gradients = torch.autograd.grad(loss, [*trained.values()], allow_unused=True) if loss.requires_grad else none
    missed = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    # An expert that no token goes to has no gradient either; a kernel of quantized weights may have none at all.
    if len(missed) == len(trained) or (missed and is_quantized(model)):
        raise ValueError(
            f"{_kind(model)} would not be trained: {len(missed)} of its {len(trained)} tensors, {missed[0]} the first, have "
            "no gradient from the causal LM that is run. Use a plain LoraConfig, or weights that are not quantized"
        )


@torch.no_grad()
def check_reference_weights(model: PeftModel, ids: list[int], *, beta: float, adapter: str | None) -> None:
    """Try a pass over a few of these tokens. Raises ValueError for a reference that is not the policy as it is now, or would
    move with it."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moving = [name for name in trained if f".{model.active_adapter}" not in name]
    if moving:
        raise ValueError(
            f"beta={beta}: the reference is the model with another adapter or none, but {len(moving)} trained tensors are "
            f"the model's own ({', '.join(moving[:3])}); freeze them, or set beta=0"
        )
    logits = _logits(model, ids)
    with reference_weights(model, adapter):
        difference = ((_logits(model, ids) - logits).abs().max() / logits.abs().max()).item()
    if not difference < TOLERANCE:
        raise ValueError(
            f"beta={beta}: no reference can be kept of {_kind(model)}: its logits would differ from the policy's by "
            f"{difference:.2g} of the largest before any step, where {TOLERANCE} is allowed; use a plain LoraConfig, or set "
            "beta=0"
        )


def _logits(model: PeftModel, ids: list[int]) -> Tensor:
    lm, was_training = causal_lm(model), model.training
    logits = lm.eval()(input_ids=torch.tensor([ids[:TRIED_TOKENS]], device=lm.device)).logits.float()
    model.train(was_training)
    return logits


def _kind(model: PeftModel) -> str:
    return type(model.peft_config[model.active_adapter]).__name__
