"""Decides once, at start-up, by trying it, which layout a model can take, and whether its router's loss can be had."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.algorithm.router import RouterLoss, load_balancing
from grpo_hf.packing.attention import TOKEN_TREE
from grpo_hf.packing.layout import packed_batch, padded_batch
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.types import TrainingSample

logger = logging.get_logger(__name__)

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
"""Largest accepted difference of a log-prob, in nats, in float32 and in half precision."""

NOISE = ("dropout", "drop_path", "layerdrop", "jitter")
"""Parts of the names of numbers that make a model's training forward random."""

CONTINUATIONS = (5, 1, 3)
"""Tokens that follow the prompts which the layouts are tried on, and that follow those again: a tree of three levels."""


@torch.no_grad()
def choose_layout(
    model: PreTrainedModel, prompts: list[list[int]], requested: str = "auto", *, training: bool = False
) -> str:
    """ "packed" where a token tree gives the same log-probs as the model's own forward row by row, else "padded".

    ``prompts`` are the token ids of a few real prompts to try on. The choice is logged with its reason, and the model is
    left set up for it. Raises ValueError when the requested layout (or, with "auto", neither) gives those log-probs;
    with ``training`` those are of a forward as training runs it, which then has to have no dropout.
    """
    was_training, own_attention = model.training, model.config._attn_implementation
    model.eval()
    samples = _samples_to_try(prompts)
    if model._supports_attention_backend:
        model.set_attn_implementation("eager")  # sdpa leaves out soft caps and sinks
    expected = torch.cat([_row_logprobs(model, sample) for sample in samples])
    tolerance = TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    reasons: list[str] = []
    tries = [("packed", "packed", TOKEN_TREE), ("padded", "padded", own_attention)]
    if model._supports_attention_backend and own_attention != "eager":
        tries.append(("padded", "padded with eager attention", "eager"))
    for layout, said, attention in tries:
        if requested not in ("auto", layout):
            continue
        reason = _why_not(model, layout, samples, expected, tolerance, attention, training)
        if reason is None:
            model.train(was_training)
            logger.warning_once(f"Token layout: {said}" + "".join(f" ({text})" for text in reasons))
            return layout
        reasons.append(f"not {said}, since {reason}")
    raise ValueError(
        f"{type(model).__name__} cannot be trained: no layout gives the log-probs of its own forward within {tolerance} "
        f"nats; {'; '.join(reasons)}. If its head scales or caps its logits, add that to LOGIT_TRANSFORMS."
    )


@torch.no_grad()
def choose_router_loss(model: PreTrainedModel, prompt: list[int], requested: float | None = None) -> RouterLoss | None:
    """The load-balancing loss of a model with experts, with its config's coefficient where None is requested; None at 0.

    It is tried on the ids of a real prompt. Raises ValueError when the model itself has another such loss or, for a
    coefficient that is requested, none; without one nothing is added then, which is logged.
    """
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if requested is None else requested
    if not coefficient or not hasattr(config, "output_router_logits"):
        return None
    name, said = type(model).__name__, f"router_aux_loss_coef={coefficient}" + " in its config" * (requested is None)
    experts_per_token: Any = getattr(model, "num_experts_per_tok", None)
    batch, was_training = padded_batch(_samples_to_try([prompt])[:1]).to(model.device), model.training
    model.eval()
    of_model = experts_per_token and model(input_ids=batch.input_ids, output_router_logits=True).aux_loss
    if of_model is None:
        if requested is None:
            logger.warning_once(f"No load-balancing loss is added: {name} has none of its own, though {said}")
            model.train(was_training)
            return None
        raise ValueError(f"{said}, but {name} has no load-balancing loss in transformers; leave it out or set it to 0")
    sent, probability = batch_logprobs(model, batch, experts_per_token=experts_per_token)[2]
    difference = (load_balancing(sent, probability, experts_per_token) - of_model).abs().item()
    if difference > (TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE):
        raise ValueError(
            f"{said}, but the load-balancing loss of {name} is not that of Switch Transformers over the logits that it "
            f"returns: on a prompt it differs by {difference:.3g}; set router_aux_loss_coef=0"
        )
    model.train(was_training)
    return RouterLoss(coefficient, experts_per_token)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability, of adapters too, and the jitter of routers to 0, so that the policy that is trained is
    the one that sampled."""
    for module in model.modules():
        is_dropout = "dropout" in type(module).__name__.lower()
        for name, value in vars(module).items():
            if (is_dropout and name == "p") or any(noise in name for noise in NOISE):
                if isinstance(value, float):
                    setattr(module, name, 0.0)
                elif isinstance(value, dict):  # by adapter
                    value.update({adapter: 0.0 for adapter, share in value.items() if isinstance(share, float)})


def _why_not(
    model: PreTrainedModel,
    layout: str,
    samples: list[TrainingSample],
    expected: Tensor,
    tolerance: float,
    attention: str,
    training: bool,
) -> str | None:
    if layout == "packed" and not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    if layout == "packed" and any(
        getattr(module, "attention_dropout", 0.0) or getattr(getattr(module, "attn_dropout", None), "p", 0.0)
        for module in model.modules()
    ):
        return "its attention has dropout (disable_dropout=True switches that off)"
    if model._supports_attention_backend:
        model.set_attn_implementation(attention)
    batch = (packed_batch(samples) if layout == "packed" else padded_batch(samples)).to(model.device)

    def difference(mode: bool) -> float:
        model.train(mode)
        return (batch_logprobs(model, batch)[0] - expected).abs().max().item()

    try:
        found = difference(training)
        of_itself = found if found <= tolerance else difference(False)
    except Exception as error:  # whatever a model's own code makes of a mask or keyword that it was not written for
        return f"its forward ends in {type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
    finally:
        model.eval()
    if found <= tolerance:
        return None
    random = " in training alone, where its forward is random otherwise than by a dropout that could be switched off"
    return f"its log-probs differ by up to {found:.3g} nats" + (random if of_itself <= tolerance else "")


def _samples_to_try(prompts: list[list[int]]) -> list[TrainingSample]:
    """Each prompt with continuations, and theirs; made of the prompts' own tokens, so that every id is in the vocabulary."""
    samples: list[TrainingSample] = []
    for (group, ids), *lengths in product(enumerate(prompts), CONTINUATIONS, CONTINUATIONS):
        turns = [[ids[(place + shift) % len(ids)] for place in range(n)] for shift, n in enumerate(lengths, start=1)]
        sequence, targets = (*ids, *turns[0], *turns[1]), sum(lengths)
        is_target = torch.arange(len(sequence)) >= len(ids)
        samples.append(
            TrainingSample(
                ids=sequence,
                is_target=is_target,
                advantages=is_target.float(),
                completion=len(samples),
                group=group,
                completion_length=targets,
                versions=torch.zeros(targets, dtype=torch.long),
            )
        )
    return samples


def _row_logprobs(model: PreTrainedModel, sample: TrainingSample) -> Tensor:
    ids = torch.tensor([sample.ids], device=model.device)
    logprobs = token_logprobs(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
    return logprobs[sample.is_target[1:]]
