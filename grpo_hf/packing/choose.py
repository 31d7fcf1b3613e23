"""Decides once, at start-up, by trying it, which layout a model can take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.packing.attention import SHARED_PREFIX
from grpo_hf.packing.layout import packed_batch, padded_batch
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.types import Completion, Group, PackedBatch, Prompt

logger = logging.get_logger(__name__)

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
"""Largest accepted difference of a log-prob, in nats, in float32 and in half precision."""

COMPLETION_LENGTHS = (5, 1, 3)
"""Of the completions that the layouts are tried on; uneven, with a one-token completion."""


@torch.no_grad()
def choose_layout(model: PreTrainedModel, prompts: list[list[int]], requested: str = "auto") -> str:
    """ "packed" where a packed row gives the same log-probs as the model's own forward row by row, else "padded".

    ``prompts`` are the token ids of a few real prompts to try on. The choice is logged with its reason, and the model is
    left set up for it. Raises ValueError when the requested layout (or, with "auto", neither) gives those log-probs.
    """
    was_training, own_attention = model.training, model.config._attn_implementation
    model.eval()
    groups = _groups_to_try(prompts)
    if model._supports_attention_backend:
        model.set_attn_implementation("eager")  # sdpa leaves out soft caps and sinks
    expected = torch.cat([_row_logprobs(model, group, item) for group in groups for item in group.completions])
    tolerance = TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    reasons: list[str] = []
    for layout in ("packed", "padded") if requested == "auto" else (requested,):
        reason = _why_not(model, layout, groups, expected, tolerance, own_attention)
        if reason is None:
            model.train(was_training)
            logger.warning_once(f"Token layout: {layout}" + "".join(f" ({text})" for text in reasons))
            return layout
        reasons.append(f"not {layout}, since {reason}")
    raise ValueError(
        f"{type(model).__name__} cannot be trained: no layout gives the log-probs of its own forward within {tolerance} "
        f"nats; {'; '.join(reasons)}. If its head scales or caps its logits, add that to LOGIT_TRANSFORMS."
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that the policy that is trained is the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _why_not(
    model: PreTrainedModel, layout: str, groups: list[Group], expected: Tensor, tolerance: float, own_attention: str
) -> str | None:
    if layout == "packed" and not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    if layout == "packed" and any(
        getattr(module, "attention_dropout", 0.0) or getattr(getattr(module, "attn_dropout", None), "p", 0.0)
        for module in model.modules()
    ):
        return "its attention has dropout (disable_dropout=True switches that off)"
    if model._supports_attention_backend:
        model.set_attn_implementation(SHARED_PREFIX if layout == "packed" else own_attention)
    batch: PackedBatch = packed_batch(groups) if layout == "packed" else padded_batch(groups)
    difference = (batch_logprobs(model, batch.to(model.device))[0] - expected).abs().max().item()
    return None if difference <= tolerance else f"its log-probs differ by up to {difference:.3g} nats"


def _groups_to_try(prompts: list[list[int]]) -> list[Group]:
    """The prompts' own tokens serve as completions too, so every id is in the vocabulary."""
    return [
        Group(
            Prompt(ids=ids, raw="", row={}, index=number),
            [Completion((ids * length)[-length:], truncated=False) for length in COMPLETION_LENGTHS],
        )
        for number, ids in enumerate(prompts)
    ]


def _row_logprobs(model: PreTrainedModel, group: Group, completion: Completion) -> Tensor:
    ids = torch.tensor([group.prompt.ids + completion.ids], device=model.device)
    start = len(group.prompt.ids)
    return token_logprobs(model(input_ids=ids).logits[0, start - 1 : -1].float(), ids[0, start:])
