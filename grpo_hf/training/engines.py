"""Which engine samples a run, and how."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.rollout.shared_engine import SharedEngine
from grpo_hf.rollout.transformers_engine import TransformersEngine
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.rollout.vllm_server import VLLMServerEngine
from grpo_hf.training.config import GRPOConfig


def make_engine(
    model: PreTrainedModel | PeftModel,
    args: GRPOConfig,
    *,
    sampling: Sampling,
    max_model_length: int,
    tokenizer: PreTrainedTokenizerBase,
    peers: Peers,
    sharded: bool,
) -> Engine:
    """The engine that the settings ask for, on the model's device, for sequences of so many tokens."""
    if not args.use_vllm:
        assert tokenizer.pad_token_id is not None
        return TransformersEngine(
            model,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
            dtype=args.compute_dtype,
            peers=peers if sharded else None,
        )
    shared: dict[str, Any] = {
        "sampling": sampling,
        "max_model_length": max_model_length,
        "dtype": args.compute_dtype,
        "lora_sync": args.vllm_lora_sync,
    }
    if args.vllm_mode == "server":
        return VLLMServerEngine(
            model,
            base_url=args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}",
            timeout=args.vllm_server_timeout,
            weights_folder=args.vllm_weights_folder,
            group_port=args.vllm_group_port,
            peers=peers,
            **shared,
        )
    parts = args.vllm_tensor_parallel_size
    engine = VLLMEngine(
        model,
        tokenizer=tokenizer,
        num_processes=args.world_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        sleep_mode=args.vllm_enable_sleep_mode,
        tensor_parallel_size=parts,
        **shared,
    )
    return engine if parts == 1 else SharedEngine(engine, peers, parts)


OBSERVATION_TOKENS = 1024
"""Room for what environments say to prompts at their reset, where the model's context has it."""


def longest_sequence(prompts: Iterable[PromptSet], args: GRPOConfig, config: PretrainedConfig, *, observations: bool) -> int:
    """Tokens of the longest prompt, with what an environment may say to it (``observations``), and its completion; or
    vllm_max_model_length, which has to have room for that."""
    longest = max(len(ids) for part in prompts for ids in part.ids)
    needed, wanted = longest + args.max_completion_length, args.vllm_max_model_length
    if wanted is not None and wanted < needed:
        raise ValueError(
            f"vllm_max_model_length={wanted} leaves no room for the longest prompt of {longest} tokens and "
            f"max_completion_length={args.max_completion_length}; leave it out, or set {needed}"
        )
    context = getattr(config, "max_position_embeddings", None)
    room = OBSERVATION_TOKENS if context is None else min(OBSERVATION_TOKENS, max(context - needed, 0))
    return wanted or needed + room * observations


def make_sampling(args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> Sampling:
    """How training samples; completions end at the tokenizer's and the model's own end tokens, and at what is asked for."""
    stops = lm.generation_config.eos_token_id  # type: ignore[union-attr]
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    schema = args.vllm_structured_outputs_json
    return Sampling(
        max_completion_length=args.max_completion_length,
        stop_token_ids=tuple(dict.fromkeys([tokenizer.eos_token_id, *stops, *(args.stop_token_ids or [])])),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop_strings=tuple(args.stop_strings or ()),
        regex=args.vllm_structured_outputs_regex,
        json_schema=json.dumps(schema) if isinstance(schema, dict) else schema,
    )
