"""Sampling with `model.generate`: needs nothing but transformers, shares the trainer's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_hf.rollout.engine import Sampling
from grpo_hf.types import Completion


class SeededSampling(LogitsProcessor):
    """Draws each row's token with that row's own random numbers and leaves it as the only choice.

    Inverse transform sampling: the first token whose cumulative probability exceeds u. One u a row and step, drawn from
    the row's seed, so a sample does not depend on which rows share its batch.
    """

    def __init__(self, seeds: list[int], *, prompt_length: int, max_steps: int):
        draws = [torch.rand(max_steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        self.draws: Float[Tensor, "rows step"] = torch.stack(draws)
        self.prompt_length = prompt_length

    def __call__(
        self, input_ids: Int[Tensor, "rows time"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Scores that are 0 at the drawn token and -inf elsewhere."""
        draws = self.draws[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        cumulative = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, (draws * cumulative[:, -1]).unsqueeze(-1), right=True)
        # NaN scores lie past every u; the last token stands in, and the loss, which is NaN too, stops the run.
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class TransformersEngine:
    """The engine for machines without vLLM: one `generate` call for all prompts."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        pad_token_id: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        # One autocast around all tokens casts the weights once; inside the model's own forward it would for each token.
        self.model, self.pad_token_id, self.autocast = model, pad_token_id, autocast

    def sync_weights(self) -> None:
        """Nothing to do: the engine reads the trainer's own tensors."""

    @torch.no_grad()
    def sample(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See Engine.sample; all groups finish together."""
        rows = [ids for ids, group in zip(prompts, seeds, strict=True) for _ in group]
        longest = max(map(len, rows))
        device = self.model.device
        input_ids = torch.tensor([[self.pad_token_id] * (longest - len(ids)) + ids for ids in rows], device=device)
        attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        processors = processors_for(sampling, [seed for group in seeds for seed in group], prompt_length=longest)
        # A model's own generation defaults (a repetition penalty, say) would sample from another distribution. Under PEFT
        # it is the model inside that generate reads them from.
        lm: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        own_defaults, was_training = lm.generation_config, self.model.training
        lm.generation_config = GenerationConfig()
        self.model.eval()
        try:
            with self.autocast():
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    logits_processor=processors,
                    generation_config=GenerationConfig(
                        do_sample=False,
                        max_new_tokens=sampling.max_completion_length,
                        eos_token_id=list(sampling.stop_token_ids),
                        pad_token_id=self.pad_token_id,
                    ),
                )
        finally:
            lm.generation_config = own_defaults
            self.model.train(was_training)
        tokens = iter(output[:, longest:].tolist())
        for number, group in enumerate(seeds):
            yield number, [cut_at_stop(next(tokens), sampling.stop_token_ids) for _ in group]


def processors_for(sampling: Sampling, seeds: list[int], *, prompt_length: int) -> LogitsProcessorList:
    """transformers' processors in its own order, then the draw; temperature 0 leaves the arg max to generate."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    processors.append(SeededSampling(seeds, prompt_length=prompt_length, max_steps=sampling.max_completion_length))
    return processors


def cut_at_stop(tokens: list[int], stop_token_ids: tuple[int, ...]) -> Completion:
    """Tokens up to and with the first stop token; without one the completion is truncated."""
    for place, token in enumerate(tokens):
        if token in stop_token_ids:
            return Completion(ids=tokens[: place + 1], truncated=False)
    return Completion(ids=tokens, truncated=True)
