"""`grpo-hf serve MODEL [vLLM's own options]`: a vLLM server that a trainer can give weights to."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import torch
from transformers import AutoConfig

from grpo_hf.rollout.vllm_client import KEY
from grpo_hf.rollout.vllm_plugin import FILE_BACKEND, KeyOnEveryRoute, WorkerExtension
from grpo_hf.rollout.vllm_support import BATCHED_TOKENS, check_context, check_cpu_attention, installed_vllm, kv_cache_bytes

USAGE = f"""usage: grpo-hf serve MODEL [--port 8000] [--host 127.0.0.1] [any option of `vllm serve`]

Starts vLLM with what a trainer with use_vllm=True, vllm_mode="server" needs. Useful options of vLLM:
  --dtype float32|bfloat16     what the trainer computes in
  --max-model-len N            the longest prompt and completion together
  --logprobs-mode raw_logprobs for a trainer with top_p, top_k, min_p or repetition_penalty
  --enable-lora --max-lora-rank R   for vllm_lora_sync="adapter"
  --tensor-parallel-size N, --data-parallel-size N, --gpu-memory-utilization F

Any route but /health asks for the key that the environment variable {KEY} holds, here and where the trainer
runs. A host that others can reach takes no weights without one."""

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that take weights
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Become the server: signals reach it as they reach any vLLM server, and nothing is left between."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    installed_vllm()
    model, (key, given) = arguments[0], without_key(arguments[1:])
    host = option(given, "host") or "127.0.0.1"
    check_key(host, key)
    check_port(host, int(option(given, "port") or 8000))
    secrets = {KEY: key} if key else {}  # not among the arguments, which every user of the machine can list
    if key:
        given += ["--middleware", f"{KeyOnEveryRoute.__module__}.{KeyOnEveryRoute.__qualname__}"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *given]
    for name, value in defaults(model, given).items():
        if option(given, name) is None:
            command += [f"--{name}", *([] if value is True else [str(value)])]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | ENVIRONMENT | secrets)


def defaults(model: str, given: Sequence[str]) -> dict[str, Any]:
    """vLLM's options for training, which those that were given replace."""
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else FILE_BACKEND
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "weight-transfer-config": f'{{"backend": "{backend}"}}',
        "worker-extension-cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",  # not the model's own defaults
        "disable-log-stats": True,
        "disable-uvicorn-access-log": True,
    }
    return options if on_gpu else options | cpu_defaults(model, given)


def cpu_defaults(model: str, given: Sequence[str]) -> dict[str, Any]:
    """What vLLM on the CPU needs to be told; ValueError for a model that it cannot run."""
    config = AutoConfig.from_pretrained(model, trust_remote_code="--trust-remote-code" in given)
    dtype = getattr(torch, option(given, "dtype") or "float32")
    length = int(option(given, "max-model-len") or config.get_text_config().max_position_embeddings)
    check_context(config, length)
    check_cpu_attention(config)
    # A block of 128 tokens, the default, would keep groups from sharing shorter prompts.
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "block-size": 32,
        "enforce-eager": True,
        "no-enable-chunked-prefill": True,
        "max-num-batched-tokens": max(BATCHED_TOKENS, length),
        "kv-cache-memory-bytes": kv_cache_bytes(config, dtype, max_model_len=length, weight_bytes=0),
    }


def option(given: Sequence[str], name: str) -> str | None:
    """The value of --name among the arguments, "" for one without; None when it is not there."""
    for place, argument in enumerate(given):
        key, equals, value = argument.removeprefix("--").replace("_", "-").partition("=")
        if argument.startswith("--") and key == name:
            follows = given[place + 1] if place + 1 < len(given) else "--"
            return value if equals else "" if follows.startswith("--") else follows
    return None


def without_key(given: Sequence[str]) -> tuple[str | None, list[str]]:
    """The key, of --api-key or the environment, and the other arguments; ValueError for more than one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key", "--api_key", nargs="*", action="extend")
    known, rest = parser.parse_known_args(given)
    keys = known.api_key
    if keys is not None and (len(keys) != 1 or not keys[0]):
        raise ValueError(f"--api-key has {len(keys)} keys; give one, or set the environment variable {KEY}")
    return keys[0] if keys else os.environ.get(KEY), rest


def check_key(host: str, key: str | None) -> None:
    """Raise ValueError for a server that whoever reaches it could give weights to."""
    try:
        reachable = not all(ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host, None))
    except OSError:
        return  # check_port says what is wrong with it
    if reachable and not key:
        raise ValueError(
            f"--host {host} can be reached from other machines, and whoever reaches it could give the server weights: set "
            f"the environment variable {KEY} to a key of your choice, here and where the trainer runs, or leave --host out"
        )


def check_port(host: str, port: int) -> None:
    """Raise ValueError when something listens there already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error
