"""Sampling with `model.generate`: needs nothing but transformers, shares the trainer's weights."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable
from itertools import compress
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_hf.rollout.engine import Request, Sampling
from grpo_hf.rollout.peers import ALONE, Peers
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
    """The engine for machines without vLLM: one `generate` call for all requests that wait."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        pad_token_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        peers: Peers | None = None,
    ):
        """``tokenizer`` is for stop strings alone; ``dtype`` is what autocast computes in, None without it; ``peers``: the
        processes that a forward pass takes, each of which goes on until all have finished, None where it takes one."""
        self.model, self.pad_token_id, self.dtype, self.peers = model, pad_token_id, dtype, peers
        self.tokenizer: Any = tokenizer
        # A model's own generation defaults (a repetition penalty, say) would sample from another distribution. Under PEFT
        # it is the model inside that generate reads them from.
        self.lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def sync_weights(self, version: int) -> None:
        """Nothing to do: the engine reads the trainer's own tensors."""

    def requests(self, sampling: Sampling) -> TransformersRequests:
        """See Engine.requests."""
        if sampling.structured:
            raise ValueError("structured outputs need vLLM: set use_vllm=True, or leave the regex and the schema out")
        return TransformersRequests(self, sampling)

    def abort(self) -> None:
        """Nothing is ever in progress."""

    @torch.no_grad()
    def generate(self, batch: list[Request], sampling: Sampling) -> list[tuple[Hashable, list[Completion]]]:
        """The completions of each request, all sampled together; with no request something that takes as many passes as
        the other processes need."""
        rows = [request.ids for request in batch for _ in range(request.count)] or [[self.pad_token_id]]
        seeds = [request.seed + n for request in batch for n in range(request.count)] or [0]
        longest, steps = max(map(len, rows)), max((request.max_tokens for request in batch), default=1)
        device = self.model.device
        input_ids = torch.tensor([[self.pad_token_id] * (longest - len(ids)) + ids for ids in rows], device=device)
        attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        criteria = transformers.StoppingCriteriaList()
        if sampling.stop_strings:
            assert self.tokenizer is not None
            criteria.append(StopAtText(sampling.stop_strings, self.tokenizer, prompt_length=longest))
        own_defaults, was_training = self.lm.generation_config, self.model.training
        self.lm.generation_config = GenerationConfig()
        self.model.eval()
        try:
            # Around all tokens it casts the weights once; inside the model's own forward it would for each token.
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    logits_processor=processors_for(sampling, seeds, prompt_length=longest, max_steps=steps),
                    synced_gpus=self.peers is not None,
                    stopping_criteria=criteria,
                    generation_config=GenerationConfig(
                        do_sample=False,
                        max_new_tokens=steps,
                        eos_token_id=list(sampling.stop_token_ids),
                        pad_token_id=self.pad_token_id,
                    ),
                    **without_router_logits(self.lm.config),
                )
        finally:
            self.lm.generation_config = own_defaults
            self.model.train(was_training)
        tokens = iter(output[:, longest:].tolist())
        return [(item.key, [self._completion(next(tokens), item, sampling) for _ in range(item.count)]) for item in batch]

    def _completion(self, tokens: list[int], request: Request, sampling: Sampling) -> Completion:
        completion = cut_at_stop(tokens[: request.max_tokens], sampling.stop_token_ids)
        return cut_at_text(completion, sampling.stop_strings, self.tokenizer) if sampling.stop_strings else completion


class TransformersRequests:
    """See Requests: a batch at a time, whose rows do not depend on each other.

    Where forward passes take all processes, so does a batch: those that have nothing in it, and those that have finished,
    join in until nobody waits.
    """

    patience = 0.02

    def __init__(self, engine: TransformersEngine, sampling: Sampling):
        self.engine, self.sampling, self.peers = engine, sampling, engine.peers or ALONE
        self.waiting: list[Request] = []

    def __enter__(self) -> TransformersRequests:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.waiting = []
        while kind is None and self._next_batch() is not None:
            pass

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """See Requests.add."""
        limit = self.sampling.max_completion_length if max_tokens is None else max_tokens
        self.waiting.append(Request(key, ids, seed, count, limit))

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """See Requests.finished."""
        found = None
        while self.waiting and not found:
            found = self._next_batch()
        return found or []

    def _next_batch(self) -> list[tuple[Hashable, list[Completion]]] | None:
        """This process's part of a batch; None where nobody waits."""
        everyone = self.peers.gather([(len(request.ids), request.max_tokens) for request in self.waiting])
        if not any(everyone):
            return None
        fits = fitting([size for sizes in everyone for size in sizes], self.engine.lm.config)
        first = sum(map(len, everyone[: self.peers.rank]))
        mine = fits[first : first + len(self.waiting)]
        batch = list(compress(self.waiting, mine))
        self.waiting = [request for request, is_in in zip(self.waiting, mine, strict=True) if not is_in]
        return self.engine.generate(batch, self.sampling)


def without_router_logits(config: PretrainedConfig) -> dict[str, bool]:
    """What keeps a model whose config asks for them from a loss over them, which it cannot take of one new token a row."""
    asks = getattr(config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if asks else {}


def fitting(sizes: list[tuple[int, int]], config: PretrainedConfig) -> list[bool]:
    """Which of these (tokens, tokens to come at most) make a batch: the first, and what fits the model's context beside it.

    All are padded to the longest, and a row that has ended goes on to the end of its batch.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    fits: list[bool] = []
    longest, steps = 0, 0
    for size in sizes:
        both = max(longest, size[0]), max(steps, size[1])
        fits.append(not fits or sum(both) <= context)
        if fits[-1]:
            longest, steps = both
    return fits


def processors_for(
    sampling: Sampling, seeds: list[int], *, prompt_length: int, max_steps: int
) -> transformers.LogitsProcessorList:
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
    processors.append(SeededSampling(seeds, prompt_length=prompt_length, max_steps=max_steps))
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
