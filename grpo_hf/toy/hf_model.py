"""The sorting model as a transformers causal LM, so that the language-model trainer can train it as it is.

It is causal: the token after ``prompt_length + i`` tokens depends on the prompt alone. Every prompt must hold exactly
``prompt_length`` tokens, and padding may only follow the response.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from grpo_hf.toy.model import SortingDecoder


class SortingConfig(PreTrainedConfig):
    """Sizes of a sorting model; the defaults are the lecture's."""

    model_type = "grpo_hf_sorting"

    vocab_size: int = 5
    hidden_size: int = 10
    prompt_length: int = 3
    response_length: int = 3
    tie_word_embeddings: bool = True
    use_cache: bool = False

    @property
    def max_position_embeddings(self) -> int:
        """A prompt and its response."""
        return self.prompt_length + self.response_length


class SortingBackbone(SortingDecoder):
    """Token ids -> hidden states: position ``prompt_length - 1 + i`` holds the vector of response position i."""

    def __init__(self, config: SortingConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            embedding_dim=config.hidden_size,
            prompt_length=config.prompt_length,
            response_length=config.response_length,
        )
        self.prompt_length = config.prompt_length

    def forward(self, input_ids: Int[Tensor, "batch time"], **kwargs: Any) -> BaseModelOutputWithPast:
        time = input_ids.shape[1]
        if time < self.prompt_length:
            raise ValueError(
                f"got {time} tokens: every prompt of this model has exactly {self.prompt_length} "
                "(prompt_length in its config)"
            )
        first = self.prompt_length - 1
        decoded = self.decode(input_ids[:, : self.prompt_length])[:, : time - first]
        after = max(time - first - decoded.shape[1], 0)
        hidden = nn.functional.pad(decoded, (0, 0, first, after))
        return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, hidden))


class SortingForCausalLM(PreTrainedModel, GenerationMixin):
    """``SortingBackbone`` and an output layer tied to its embedding; there is no cache, whatever ``use_cache`` says."""

    config_class = SortingConfig
    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: SortingConfig) -> None:
        super().__init__(config)
        self.model = SortingBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch time vocab]; those before ``prompt_length - 1`` and after the response are all 0."""
        hidden: Float[Tensor, "batch time dim"] = self.model(input_ids=input_ids).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept]))

    def get_decoder(self) -> SortingBackbone:
        return self.model

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Int[Tensor, "batch time"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens at every step: there is no cache to hold the earlier ones."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SortingBackbone):
            module.reset_parameters()


AutoConfig.register(SortingConfig.model_type, SortingConfig)
AutoModelForCausalLM.register(SortingConfig, SortingForCausalLM)
