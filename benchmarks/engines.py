"""Sampling and weight syncs, transformers against vLLM in process and as a server: `python -m benchmarks.engines`.

Random Qwen2 models of about 4 and 100 million weights in float32 on this machine's CPU; 16 prompts of 48 tokens, 8
completions each of 64 tokens without a stop. The engines take turns on the same weights and seeds, after one unmeasured
round; medians of tokens per second. The last column samples with an adapter of rank 16 on every layer held by vLLM, where
the others have it merged. Then the time of a weight sync as in training, where the engine has been given everything
before: all weights, an adapter merged into its layers, an adapter alone; and the bytes that travel. Writes
benchmarks/results/engines.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_hf.rollout.engine import Engine, Sampling, sample_groups
from grpo_hf.rollout.transformers_engine import TransformersEngine
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.rollout.vllm_server import VLLMServerEngine
from grpo_hf.rollout.vllm_support import installed_vllm
from grpo_hf.rollout.weight_sync import EngineWeights, adapter_weights
from tests.server import Server

MODELS = {
    "4M": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 4096,
    },
    "100M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 24576,
    },
}
PROMPTS, GROUP_SIZE, PROMPT_LENGTH, RANK = 16, 8, 48, 16
SAMPLING = Sampling(max_completion_length=64, stop_token_ids=())
MakeEngine = Callable[..., Any]


def make_model(size: str, *, lora: bool = False) -> Any:
    """Tied embeddings; random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = MODELS[size]
    heads = shape["num_attention_heads"]
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=heads, tie_word_embeddings=True, **special)).eval()
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")) if lora else model


def tokens_per_second(engine: Engine, round: int) -> float:
    """One round of sampling."""
    generator = torch.Generator().manual_seed(round)
    prompts = torch.randint(1, 4096, (PROMPTS, PROMPT_LENGTH), generator=generator).tolist()
    seeds = [1000 * round + GROUP_SIZE * n for n in range(PROMPTS)]
    start = time.perf_counter()
    groups = sample_groups(engine, prompts, seeds, GROUP_SIZE, SAMPLING)
    tokens = sum(len(item.ids) for _, group in groups for item in group)
    return tokens / (time.perf_counter() - start)


def measure_sync(make: MakeEngine, model: nn.Module, lora_sync: str, repeats: int) -> dict[str, float]:
    """Seconds of a sync after the first, which sends everything; and its bytes."""
    seconds: list[float] = []
    engine = make(model, lora_sync=lora_sync)
    for version in range(repeats + 1):
        start = time.perf_counter()
        engine.sync_weights(version)
        seconds.append(time.perf_counter() - start)
    sent = adapter_weights(model).values() if lora_sync == "adapter" else dict(_changed(model)).values()
    return {"seconds": statistics.median(seconds[1:]), "first_s": seconds[0], "bytes": sum(value.nbytes for value in sent)}


def _changed(model: nn.Module) -> EngineWeights:
    return EngineWeights(model, torch.float32, everything=False)


def in_process(engine: VLLMEngine, model: nn.Module, *, lora_sync: str = "merge") -> VLLMEngine:
    """The one engine that a process can have, with the weights of another model."""
    engine.weights = type(engine.weights)(model, torch.float32, lora_sync)
    engine.adapter = {}
    return engine


def measure(size: str, repeats: int) -> dict[str, Any]:
    """All engines on one model, in turns; then the syncs."""
    model, adapted = make_model(size), make_model(size, lora=True)
    length = PROMPT_LENGTH + SAMPLING.max_completion_length
    shared: dict[str, Any] = {"sampling": SAMPLING, "max_model_length": length}
    vllm = VLLMEngine(adapted, lora_sync="adapter", **shared)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        options = ("--enable-lora", "--max-lora-rank", str(RANK))
        server = Server(Path(folder), *options, model=make_model(size), max_model_len=length)
        server.start()
        stack.callback(server.stop)
        server.wait()

        def on_server(model: nn.Module, **more: Any) -> VLLMServerEngine:
            return VLLMServerEngine(model, base_url=server.url, timeout=60, **shared, **more)

        def at_home(model: nn.Module, **more: Any) -> VLLMEngine:
            return in_process(vllm, model, **more)

        result: dict[str, Any] = {"weights": model.num_parameters(), "tokens_per_second": {}, "sync": {}}
        turns: dict[str, Callable[[], Engine]] = {
            "transformers": lambda: TransformersEngine(model, pad_token_id=0),
            "vllm": lambda: at_home(model),
            "server": lambda: on_server(model),
            "vllm, adapter": lambda: at_home(adapted, lora_sync="adapter"),
        }
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for round in range(repeats + 1):
            for name, make in turns.items():
                engine = make()
                engine.sync_weights(0)
                rates[name].append(tokens_per_second(engine, round))
        for name, values in rates.items():
            spread = [min(values[1:]), max(values[1:])]
            result["tokens_per_second"][name] = {"median": statistics.median(values[1:]), "spread": spread}
        for where, make_engine in (("vllm", at_home), ("server", on_server)):
            for form, trained, lora_sync in (
                ("full", model, "merge"),
                ("merged", adapted, "merge"),
                ("adapter", adapted, "adapter"),
            ):
                result["sync"][f"{where}, {form}"] = measure_sync(make_engine, trained, lora_sync, repeats)
    return result


def main() -> None:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", choices=MODELS, help="this size only; the others' results stay")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / "engines.json"
    results = json.loads(path.read_text())["sizes"] if args.size and path.exists() else {}
    threads = torch.get_num_threads()
    for size in [args.size] if args.size else MODELS:
        r = results[size] = measure(size, args.repeats) | {"repeats": args.repeats}
        rates = {name: values["median"] for name, values in r["tokens_per_second"].items()}
        base = rates["transformers"]
        print(f"{size}: " + ", ".join(f"{name} {rate:.0f} tok/s ({rate / base:.2f}x)" for name, rate in rates.items()))
        for name, sync in r["sync"].items():
            print(f"  sync {name:<16}{sync['seconds'] * 1000:>8.0f} ms {sync['bytes'] / 1e6:>8.1f} MB", flush=True)
    setting = {"vllm": installed_vllm(), "torch": torch.__version__, "threads": threads}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
