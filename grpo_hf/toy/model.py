"""CS336 lecture 17's sorting model: all positions of the answer are decoded at once from one vector.

    prompt -> embed -> encode (a matrix per prompt position, summed) -> decode (a matrix per answer position) -> logits

The answers are the lecture's "responses"; they are what the rest of this package calls completions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from grpo_hf.algorithm.logits import token_logprobs


class SortingDecoder(nn.Module):
    """Prompts -> one vector for each position of the answer.

    Every weight may carry one more axis in front, one entry a model (see ``side_by_side``): ``...`` stands for it.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        embedding_dim: int,
        prompt_length: int,
        response_length: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.encode_weights = nn.Parameter(torch.empty(prompt_length, embedding_dim, embedding_dim))
        self.decode_weights = nn.Parameter(torch.empty(response_length, embedding_dim, embedding_dim))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The lecture's start: N(0, 1) embeddings, N(0, 1/dim) matrices."""
        nn.init.normal_(self.embedding.weight, generator=generator)
        for weights in (self.encode_weights, self.decode_weights):
            nn.init.normal_(weights, std=weights.shape[-1] ** -0.5, generator=generator)

    def decode(self, prompts: Int[Tensor, "prompts prompt_pos"]) -> Float[Tensor, "... prompts pos dim"]:
        """Embed, encode into one vector a prompt, decode into one vector a position."""
        embedded = self.embedding.weight[..., prompts, :]
        encoded = einsum(embedded, self.encode_weights, "... prompts pos dim1, ... pos dim1 dim2 -> ... prompts dim2")
        return einsum(encoded, self.decode_weights, "... prompts dim2, ... pos dim2 dim1 -> ... prompts pos dim1")


class SortingModel(SortingDecoder):
    """Prompts -> logits of every position of the answer; the embedding is the output layer too."""

    def forward(self, prompts: Int[Tensor, "prompts prompt_pos"]) -> Float[Tensor, "... prompts pos vocab"]:
        decoded = self.decode(prompts)
        return einsum(decoded, self.embedding.weight, "... prompts pos dim1, ... vocab dim1 -> ... prompts pos vocab")


def side_by_side(models: Sequence[SortingModel]) -> SortingModel:
    """Stack models of equal shape into one whose weights and logits have a first axis ``seed``.

    They share nothing, so the gradient of a sum of their losses is each one's own gradient: many seeds train in
    about the time of one.
    """
    stacked = copy.deepcopy(models[0])
    for name, parameter in stacked.named_parameters():
        parameter.data = torch.stack([model.get_parameter(name).detach() for model in models])
    return stacked


def sample(
    logits: Float[Tensor, "prompts pos vocab"],
    num_responses: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "prompts group pos"]:
    """Draw every position of every response on its own from softmax(logits / T)."""
    probabilities = rearrange((logits / temperature).softmax(-1), "prompts pos vocab -> (prompts pos) vocab")
    tokens = probabilities.multinomial(num_responses, replacement=True, generator=generator)
    return rearrange(tokens, "(prompts pos) group -> prompts group pos", prompts=len(logits))


@torch.no_grad()
def generate(
    model: SortingModel,
    prompts: Int[Tensor, "prompts prompt_pos"],
    num_responses: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "prompts group pos"]:
    """Sample a group of responses to each prompt."""
    return sample(model(prompts), num_responses, temperature, generator)


def response_logprobs(
    logits: Float[Tensor, "*seed prompts pos vocab"],
    responses: Int[Tensor, "*seed prompts group pos"],
    temperature: float = 1.0,
) -> Float[Tensor, "*seed prompts group pos"]:
    """Log-prob of every token of every response, in nats."""
    group = responses.shape[-2]
    repeated = repeat(logits, "... prompts pos vocab -> ... prompts group pos vocab", group=group)
    return token_logprobs(repeated, responses, temperature)
