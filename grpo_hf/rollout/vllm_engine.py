"""vLLM in the training process: token ids in and out, weights straight from the trainer's tensors."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_hf.rollout import vllm_support
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.vllm_plugin import divide_logits, keep_experts_packed, refresh_tied_head
from grpo_hf.rollout.weight_sync import EngineWeights, WeightSync, save_adapter
from grpo_hf.types import Completion

ADAPTER = "trainer"
"""What vLLM calls the trainer's adapter."""

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where it takes weights straight from the trainer's tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of the environment, before vLLM is imported; one that is set already stays."""


class VLLMEngine:
    """One vLLM engine in this process, on the trainer's device.

    Under `accelerate launch` every process makes one, all at the same time, and samples its own prompts. Keep it to the
    end of the process: vLLM's default process group goes with it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        sampling: Sampling,
        max_model_length: int,
        dtype: torch.dtype | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora_sync: str = "merge",
        num_processes: int = 1,
        gpu_memory_utilization: float = 0.3,
        sleep_mode: bool = False,
        **options: Any,
    ):
        """``sampling`` is the distribution that rollout_logprobs are wanted of; ``max_model_length``: tokens of a request
        with its answer at most; ``dtype`` is the model's own unless training computes in another; ``tokenizer`` is for
        stop strings and structured outputs; ``options`` go to vllm.LLM."""
        vllm_support.installed_vllm()
        self.max_model_length = max_model_length
        lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        dtype = dtype or lm.dtype
        assert isinstance(dtype, torch.dtype)
        vllm_support.check_context(lm.config, max_model_length)
        vllm_support.check_sampling(sampling)
        self.weights = WeightSync(model, dtype, lora_sync)
        if self.weights.base_stays:
            raise ValueError(
                "vLLM in this process has its weights from the trainer, and a quantized model has none to give; set "
                "vllm_mode='server' and start a server with that model, or set use_vllm=False"
            )
        self.adapter: dict[str, Any] = {}
        self.at_work: VLLMRequests | None = None
        self.filtered, self.sleep_mode = vllm_support.has_filters(sampling), sleep_mode and lm.device.type != "cpu"
        memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": self.sleep_mode}
        if lm.device.type == "cpu":
            with as_it_was():
                vllm_support.check_cpu_attention(lm.config)
            if self.weights.adapter_only:
                vllm_support.check_cpu_adapter(lm)
            weight_bytes = lm.num_parameters() * dtype.itemsize
            cache = vllm_support.kv_cache_bytes(lm.config, dtype, max_model_len=max_model_length, weight_bytes=weight_bytes)
            # The default block of 128 tokens would keep groups from sharing any shorter prompt.
            memory = {"kv_cache_memory_bytes": cache, "block_size": 32, "enforce_eager": True}
            batched = max(vllm_support.BATCHED_TOKENS, max_model_length)
            memory |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batched}
        self.llm = start(
            lm,
            tokenizer if sampling.needs_text else None,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_length,
            logprobs_mode=vllm_support.logprobs_mode(sampling),
            # Every process is an engine of its own inside the processes that train together.
            distributed_executor_backend="external_launcher" if num_processes > 1 else None,
            **(vllm_support.lora_options(model) if self.weights.adapter_only else {}),
            **(memory | options),
        )
        self.llm.apply_model(keep_experts_packed)
        if self.filtered:
            self._divide_logits(sampling.temperature)  # to find out here if this model has no place for it
        self._sleep()

    def sync_weights(self, version: int) -> None:
        """See Engine.sync_weights; does nothing when the engine has them."""
        self.weights.run(version, self._load, self._load_adapter)

    @contextmanager
    def requests(self, sampling: Sampling) -> Iterator[VLLMRequests]:
        """See Engine.requests."""
        vllm_support.check_sampling(sampling)
        self.abort()
        self.at_work = requests = VLLMRequests(self, sampling)
        try:
            self._wake()
            if self.filtered:
                requests.options |= self._divide_logits(sampling.temperature)
            yield requests
        finally:
            if self.at_work is requests:
                self.abort()

    def abort(self) -> None:
        """See Engine.abort."""
        if self.at_work is not None:
            self.llm.llm_engine.abort_request(list(self.at_work.keys))
            self.at_work = None
            self._sleep()

    def _divide_logits(self, temperature: float) -> dict[str, float]:
        """The temperature in the logits, for "raw_logprobs" to see (see logprobs_mode), and what is left of it."""
        self.llm.apply_model(partial(divide_logits, divisor=temperature or 1.0))
        return {"temperature": 0.0 if temperature == 0 else 1.0}

    def _load(self, weights: EngineWeights) -> None:
        self._wake()
        with same_random_state():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self.llm.apply_model(refresh_tied_head)
        self._reset_prefix_cache()

    def _load_adapter(self, weights: dict[str, torch.Tensor]) -> None:
        from vllm.lora.request import LoRARequest

        self._wake()
        with tempfile.TemporaryDirectory() as folder, same_random_state():
            save_adapter(self.weights.model, weights, Path(folder))
            # A request that asked for a load in place itself would read the file again for each token.
            self.llm.llm_engine.add_lora(LoRARequest(ADAPTER, 1, folder, load_inplace=True))
            self.adapter = {"lora_request": LoRARequest(ADAPTER, 1, folder)}
        self._reset_prefix_cache()

    def _reset_prefix_cache(self) -> None:
        """Keys and values of the old weights would be taken for the new ones'."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync; samples may still be in progress")

    def _wake(self) -> None:
        if self.sleep_mode and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def _sleep(self) -> None:
        if self.sleep_mode:  # level 1 keeps the weights, in the CPU's memory
            self.llm.sleep(level=1)


class VLLMRequests:
    """See Requests."""

    patience = 0.0

    def __init__(self, engine: VLLMEngine, sampling: Sampling):
        self.engine, self.sampling = engine, sampling
        self.options = vllm_support.request_options(sampling)
        self.comparable = vllm_support.comparable_logprobs(sampling, filtered=engine.filtered)
        self.keys: dict[str, Hashable] = {}
        """Of the requests that are open, by the name that vLLM has for each."""
        self.names = map(str, count())

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """See Requests.add."""
        engine, options = self.engine, self.options | ({} if max_tokens is None else {"max_tokens": max_tokens})
        engine.weights.check()
        vllm_support.check_request(ids, options["max_tokens"], engine.max_model_length)
        parameters = sampling_params(n=count, seed=seed, detokenize=self.sampling.needs_text, **options)
        name = next(self.names)
        engine.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, parameters, **engine.adapter)
        self.keys[name] = key

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """See Requests.finished; a request is handed on as soon as its last completion ends."""
        end = None if timeout is None else monotonic() + timeout
        while self.keys:
            with same_random_state():
                outputs = self.engine.llm.llm_engine.step()
            if outputs or (end is not None and monotonic() >= end):
                return [(self.keys.pop(made.request_id), list(map(self._completion, made.outputs))) for made in outputs]
        return []

    def _completion(self, output: Any) -> Completion:
        return Completion(
            ids=list(output.token_ids),
            truncated=output.finish_reason == "length",
            rollout_logprobs=list(output.logprobs.logprobs) if self.comparable else None,
        )


def start(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Any:
    """A vllm.LLM of the model's shape; its weights are random until the first sync."""
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    with tempfile.TemporaryDirectory() as folder, as_it_was():
        from vllm import LLM

        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return LLM(
            model=folder,
            skip_tokenizer_init=tokenizer is None,
            load_format="dummy",
            generation_config="vllm",  # not the model's own defaults
            disable_log_stats=True,
            **options,
        )


def sampling_params(**options: Any) -> Any:
    """vllm.SamplingParams of one group: ids and the log-prob of each, once, when all have ended."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if "structured_outputs" in options:
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    return SamplingParams(**options, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


# ---- What vLLM does to the process that it lives in, undone


@contextmanager
def as_it_was() -> Iterator[None]:
    """Give the process back its environment, number of threads and random state, which starting vLLM changes.

    torch.set_num_threads becomes a no-op, LOCAL_WORLD_SIZE and LD_PRELOAD (which child processes would inherit) are
    overwritten, and every generator is seeded. vLLM's own variables stay: it reads them later on.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    try:
        with same_random_state():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name in {*os.environ, *environment}:
            if name in environment:
                os.environ[name] = environment[name]
            elif not name.startswith("VLLM_"):
                del os.environ[name]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give the trainer back its random state: vLLM draws from the global generators even for requests with a seed."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
