"""The model that on-policy distillation learns from."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.models import load_config, load_tokenizer


def check_vocabulary(teacher: str | PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Raise ValueError where the teacher reads the tokenizer's ids differently, as far as its own tokenizer tells, or has no
    row in its embedding for one."""
    if teacher is None:
        return
    name = teacher if isinstance(teacher, str) else teacher.config._name_or_path
    theirs = tokenizer_of(name, **options)
    if theirs is not None:
        known = theirs.get_vocab()
        different = sorted(token for token, number in tokenizer.get_vocab().items() if known.get(token) != number)
        if different:
            raise ValueError(
                f"the teacher {name!r} has another vocabulary: {len(different)} tokens have another id or are missing, such "
                f"as {', '.join(map(repr, different[:3]))}; take a teacher of the model's own family, with the same "
                "tokenizer"
            )
    rows = load_config(teacher, **options).vocab_size
    largest = max(tokenizer.get_vocab().values())
    if rows <= largest:
        raise ValueError(
            f"the teacher {name!r} knows {rows} token ids, and the tokenizer has ids up to {largest}; take a teacher of the "
            "model's own family, with the same tokenizer"
        )


def tokenizer_of(name: str, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder or repository; None where there is none."""
    try:
        return load_tokenizer(name, **options) if name else None
    except (OSError, ValueError):
        return None


def load_teacher(teacher: str | PreTrainedModel | None, args: GRPOConfig) -> PreTrainedModel | None:
    """The teacher, frozen, on the device; one that is given by name in its own dtype."""
    if teacher is None:
        return None
    model: Any = teacher
    if isinstance(teacher, str):
        options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": args.trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(teacher, **options)
    model.to(args.device)
    return model.eval().requires_grad_(False)


def rewards_beside(teacher: Any, reward_funcs: Any) -> Any:
    """The rewards; where there are none but a teacher, one that is 0."""
    return {"name": no_reward, "in_process": True} if reward_funcs is None and teacher is not None else reward_funcs


def no_reward(completion: str) -> float:
    """0: the teacher is all that is learned from."""
    return 0.0
