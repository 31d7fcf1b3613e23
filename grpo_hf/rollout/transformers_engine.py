"""Sampling with `model.generate`: needs nothing but transformers, shares the trainer's weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_hf.rollout.engine import Sampling
from grpo_hf.types import Completion


class SeededSampling(transformers.LogitsProcessor):
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


class StopAtText(transformers.StoppingCriteria):
    """Ends the rows whose newest tokens spell a stop string; `cut_at_text` says which token was the last."""

    def __init__(self, stop_strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, *, prompt_length: int):
        self.stop_strings, self.tokenizer, self.prompt_length = stop_strings, tokenizer, prompt_length
        self.window = max(map(len, stop_strings)) + 8  # tokens; those around it may share a character's bytes

    def __call__(  # type: ignore[override]
        self, input_ids: Int[Tensor, "rows time"], scores: Tensor, **options: Any
    ) -> Bool[Tensor, " rows"]:
        """True for the rows that end here."""
        newest = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop_strings) for text in texts], device=input_ids.device)


class TransformersEngine:
    """The engine for machines without vLLM: one `generate` call for all prompts."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        pad_token_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        together: bool = False,
    ):
        """``tokenizer`` is for stop strings alone; ``dtype`` is what autocast computes in, None without it; ``together``:
        forward passes take all processes, so that each goes on until all have finished."""
        self.model, self.pad_token_id, self.dtype, self.together = model, pad_token_id, dtype, together
        self.tokenizer: Any = tokenizer

    def sync_weights(self, version: int) -> None:
        """Nothing to do: the engine reads the trainer's own tensors."""

    @torch.no_grad()
    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See Engine.sample; all groups finish together."""
        if sampling.structured:
            raise ValueError("structured outputs need vLLM: set use_vllm=True, or leave the regex and the schema out")
        if not prompts and not self.together:
            return
        rows = [ids for ids in prompts for _ in range(num_generations)] or [[self.pad_token_id]]
        row_seeds = [seed + n for seed in seeds for n in range(num_generations)] or [0]
        longest = max(map(len, rows))
        device = self.model.device
        input_ids = torch.tensor([[self.pad_token_id] * (longest - len(ids)) + ids for ids in rows], device=device)
        attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        processors = processors_for(sampling, row_seeds, prompt_length=longest)
        criteria = transformers.StoppingCriteriaList()
        if sampling.stop_strings:
            assert self.tokenizer is not None
            criteria.append(StopAtText(sampling.stop_strings, self.tokenizer, prompt_length=longest))
        # A model's own generation defaults (a repetition penalty, say) would sample from another distribution. Under PEFT
        # it is the model inside that generate reads them from.
        lm: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        own_defaults, was_training = lm.generation_config, self.model.training
        lm.generation_config = GenerationConfig()
        self.model.eval()
        try:
            # Around all tokens it casts the weights once; inside the model's own forward it would for each token.
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    logits_processor=processors,
                    synced_gpus=self.together,
                    stopping_criteria=criteria,
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
        for number in range(len(prompts)):
            completions = [cut_at_stop(next(tokens), sampling.stop_token_ids) for _ in range(num_generations)]
            if sampling.stop_strings:
                completions = [cut_at_text(item, sampling.stop_strings, self.tokenizer) for item in completions]
            yield number, completions

    def abort(self) -> None:
        """Nothing is ever in progress."""


def processors_for(sampling: Sampling, seeds: list[int], *, prompt_length: int) -> transformers.LogitsProcessorList:
    """transformers' processors in its own order, then the draw; temperature 0 leaves the arg max to generate."""
    processors = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1.0:
        processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(transformers.MinPLogitsWarper(sampling.min_p))
    processors.append(SeededSampling(seeds, prompt_length=prompt_length, max_steps=sampling.max_completion_length))
    return processors


def cut_at_stop(tokens: list[int], stop_token_ids: tuple[int, ...]) -> Completion:
    """Tokens up to and with the first stop token; without one the completion is truncated."""
    for place, token in enumerate(tokens):
        if token in stop_token_ids:
            return Completion(ids=tokens[: place + 1], truncated=False)
    return Completion(ids=tokens, truncated=True)


def cut_at_text(completion: Completion, stop_strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Completion:
    """The completion up to and with the token that completes the first stop string in its text."""

    def ended(length: int) -> bool:
        text: Any = tokenizer.decode(completion.ids[:length], skip_special_tokens=True)
        return any(stop in text for stop in stop_strings)

    length = bisect_left(range(1, len(completion.ids) + 1), True, key=ended) + 1
    if length > len(completion.ids):
        return completion
    return Completion(ids=completion.ids[:length], truncated=False)
