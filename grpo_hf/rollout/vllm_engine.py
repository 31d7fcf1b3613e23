"""vLLM in the training process: token ids in and out, weights straight from the trainer's tensors."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.vllm_process import as_it_was, same_random_state
from grpo_hf.rollout.vllm_support import (
    check_context,
    check_cpu_attention,
    check_sampling,
    has_filters,
    installed_vllm,
    kv_cache_bytes,
    logprobs_mode,
)
from grpo_hf.rollout.weight_sync import NamedTensors, WeightSync
from grpo_hf.types import Completion


class VLLMEngine:
    """One vLLM engine in this process, on the trainer's device.

    Under `accelerate launch` every process makes one, all at the same time, and samples its own prompts. Keep it to the
    end of the process: vLLM's default process group goes with it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        version: Callable[[], int],
        sampling: Sampling,
        max_prompt_length: int,
        dtype: torch.dtype | None = None,
        num_processes: int = 1,
        gpu_memory_utilization: float = 0.3,
        sleep_mode: bool = False,
        **options: Any,
    ):
        """``version`` counts the trainer's finished updates; ``sampling`` is the distribution that rollout_logprobs are
        wanted of; ``dtype`` is the model's own unless training computes in another; ``options`` go to vllm.LLM."""
        installed_vllm()
        self.max_model_len = max_prompt_length + sampling.max_completion_length
        lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        dtype = dtype or lm.dtype
        assert isinstance(dtype, torch.dtype)
        check_context(lm.config, self.max_model_len)
        check_sampling(sampling)
        self.weights = WeightSync(model, dtype, version)
        self.filtered, self.sleep_mode = has_filters(sampling), sleep_mode and lm.device.type != "cpu"
        memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": self.sleep_mode}
        if lm.device.type == "cpu":
            with as_it_was():
                check_cpu_attention(lm.config)
            weight_bytes = lm.num_parameters() * dtype.itemsize
            cache = kv_cache_bytes(lm.config, dtype, max_model_len=self.max_model_len, weight_bytes=weight_bytes)
            # The default block of 128 tokens would keep groups from sharing any shorter prompt.
            memory = {"kv_cache_memory_bytes": cache, "block_size": 32, "enforce_eager": True}
        self.llm = start(
            lm,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
            logprobs_mode=logprobs_mode(sampling),
            # Every process is an engine of its own inside the processes that train together.
            distributed_executor_backend="external_launcher" if num_processes > 1 else None,
            **(memory | options),
        )
        self.logit_scale = self._logit_scale() if self.filtered else 1.0
        self._sleep()

    def sync_weights(self) -> None:
        """Bring the engine to the trainer's current weights; does nothing when it has them."""
        self.weights.run(self._load)

    def sample(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See Engine.sample; a group is handed on as soon as its last completion ends. Raises StaleEngineError when the
        trainer's weights have changed since sync_weights."""
        self.weights.check()
        check_sampling(sampling)
        needed = max(map(len, prompts)) + sampling.max_completion_length
        if needed > self.max_model_len:
            raise ValueError(
                f"the longest prompt and max_completion_length make {needed} tokens, but vLLM was started for "
                f"{self.max_model_len}, the most that the trainer's own data sets need; shorten the prompts, or give them "
                f"to the trainer as its train_dataset or eval_dataset"
            )
        return self._sample(prompts, seeds, sampling)

    def _sample(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        engine = self.llm.llm_engine
        self._wake()
        options = self._sampling_options(sampling)
        open_requests: dict[str, tuple[int, int]] = {}
        groups: list[dict[int, Completion]] = [{} for _ in prompts]
        try:
            for number, (ids, group) in enumerate(zip(prompts, seeds, strict=True)):
                for place, seed in enumerate(group):
                    name = f"{number}/{place}"
                    engine.add_request(name, {"prompt_token_ids": ids}, sampling_params(seed=seed, **options))
                    open_requests[name] = (number, place)
            while open_requests:
                with same_random_state():
                    outputs = engine.step()
                for output in outputs:
                    number, place = open_requests.pop(output.request_id)
                    groups[number][place] = self._completion(output.outputs[0], sampling)
                    if len(groups[number]) == len(seeds[number]):
                        yield number, [groups[number][place] for place in range(len(seeds[number]))]
        finally:
            if open_requests:  # whoever draws groups has stopped
                engine.abort_request(list(open_requests))
            self._sleep()

    def _sampling_options(self, sampling: Sampling) -> dict[str, Any]:
        temperature = sampling.temperature
        if self.filtered:  # see logprobs_mode
            divisor = temperature or 1.0
            self.llm.apply_model(partial(_set_logit_scale, scale=self.logit_scale / divisor))
            temperature = 0.0 if temperature == 0 else 1.0
        return {
            "temperature": temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(sampling.stop_token_ids),
            "max_tokens": sampling.max_completion_length,
        }

    def _completion(self, output: Any, sampling: Sampling) -> Completion:
        # An engine for filtered samples gives log-probs before the filters, any other after them, when there must be none.
        comparable = self.filtered or not has_filters(sampling)
        return Completion(
            ids=list(output.token_ids),
            truncated=output.finish_reason == "length",
            rollout_logprobs=list(output.logprobs.logprobs) if comparable else None,
        )

    def _load(self, weights: NamedTensors) -> None:
        self._wake()
        with same_random_state():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(_refresh_tied_head)
        # Keys and values of the old weights would be taken for the new ones'.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync; samples may still be in progress")

    def _logit_scale(self) -> float:
        (scale,) = self.llm.apply_model(lambda model: getattr(getattr(model, "logits_processor", None), "scale", None))
        if scale is None:
            raise ValueError(
                "top_p, top_k, min_p and repetition_penalty need log-probs before them, and vLLM's form of this model gives "
                "no access to its logits; leave them unset, or set use_vllm=False"
            )
        return scale

    def _wake(self) -> None:
        if self.sleep_mode and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def _sleep(self) -> None:
        if self.sleep_mode:  # level 1 keeps the weights, in the CPU's memory
            self.llm.sleep(level=1)


def start(lm: PreTrainedModel, **options: Any) -> Any:
    """A vllm.LLM of the model's shape; its weights are random until the first sync."""
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    with tempfile.TemporaryDirectory() as folder, as_it_was():
        from vllm import LLM

        config.save_pretrained(folder)
        return LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",  # not the model's own defaults
            disable_log_stats=True,
            **options,
        )


def sampling_params(**options: Any) -> Any:
    """vllm.SamplingParams of one request: ids and the log-prob of each, once, when it has ended."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **options,
        ignore_eos=True,  # stop_token_ids say all
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _refresh_tied_head(model: nn.Module) -> None:
    """On the CPU a head that shares the embeddings' weight multiplies with a packed copy, which a reload leaves stale."""
    head: Any = getattr(model, "lm_head", None)
    head = getattr(head, "base_layer", head)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def _set_logit_scale(model: Any, scale: float) -> None:
    model.logits_processor.scale = scale
