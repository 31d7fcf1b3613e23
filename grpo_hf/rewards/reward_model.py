"""A sequence-classification model as a verifier: its first logit is the score, as in TRL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ARCHITECTURE = "ForSequenceClassification"


class RewardModel:
    """Scores prompt and completion together; runs in this process, on the device that it is put on.

    Raises:
        ValueError: the named model is none of sequence classification.
    """

    in_process = True  # a worker has no device, and nobody wants its weights twice

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        batch_tokens: int = 16384,
    ):
        named = isinstance(model, str)
        config: Any = _config(model) if isinstance(model, str) else model.config
        if named and not any(name.endswith(ARCHITECTURE) for name in config.architectures or []):
            raise ValueError(
                f"the reward {model!r} is a model of {config.architectures}, but a reward model is one of *{ARCHITECTURE}"
            )
        self.source = str(config._name_or_path or type(model).__name__)
        self.model: PreTrainedModel | None = None if named else model  # type: ignore[assignment]
        self.processing_class, self.batch_tokens = processing_class, batch_tokens
        self.__name__ = self.source.rstrip("/").split("/")[-1]

    def to(self, device: torch.device | None) -> tuple[PreTrainedModel, Any]:
        """Load what is not loaded, and move it; the model and its tokenizer."""
        if self.model is None:
            self.model = AutoModelForSequenceClassification.from_pretrained(self.source)
        tokenizer: Any = self.processing_class or AutoTokenizer.from_pretrained(self.source)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.processing_class = tokenizer
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the last other token is scored
        self.model.to(device or self.model.device).eval()  # type: ignore[arg-type]
        return self.model, tokenizer

    @torch.inference_mode()
    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """One score a completion."""
        model, tokenizer = self.to(None)
        texts = [_text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        scores = [0.0] * len(ids)
        for numbers in self._batches(ids):
            listed = {"input_ids": [ids[number] for number in numbers]}
            batch = tokenizer.pad(listed, padding_side="right", return_tensors="pt").to(model.device)
            for number, score in zip(numbers, model(**batch).logits[:, 0].float().tolist(), strict=True):
                scores[number] = score
        return scores

    def _batches(self, ids: list[list[int]]) -> Iterator[list[int]]:
        """Numbers of texts of like length, as many as fit into the token budget when padded."""
        batch: list[int] = []
        for number in sorted(range(len(ids)), key=lambda n: -len(ids[n])):
            if batch and len(ids[batch[0]]) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"the reward {name!r} is neither a verifier nor a model that can be read: {error}") from error


def _text(prompt: Any, completion: Any, tokenizer: Any) -> str:
    return (
        prompt + completion
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    )
