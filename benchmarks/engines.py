"""Sampling and weight syncs, transformers against vLLM in process: `python -m benchmarks.engines`.

Random Qwen2 models of about 4 and 100 million weights in float32 on this machine's CPU; 16 prompts of 48 tokens, 8
completions each of 64 tokens without a stop. Both engines take turns on the same weights and seeds, after one unmeasured
round; medians of tokens per second. Then the time of a weight sync, all weights and adapters merged, and the bytes that
it hands over. Writes benchmarks/results/engines.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.transformers_engine import TransformersEngine
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.rollout.vllm_support import installed_vllm
from grpo_hf.rollout.weight_sync import WeightSync, EngineWeights

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
PROMPTS, GROUP_SIZE, PROMPT_LENGTH = 16, 8, 48
SAMPLING = Sampling(max_completion_length=64, stop_token_ids=())


def make_model(size: str) -> Qwen2ForCausalLM:
    """Tied embeddings; random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = MODELS[size]
    heads = shape["num_attention_heads"]
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=heads, tie_word_embeddings=True, **special)).eval()


def tokens_per_second(engine: Engine, round: int) -> tuple[float, float]:
    """One round of sampling; by the clock, and by the process's CPU seconds, which other processes disturb less."""
    generator = torch.Generator().manual_seed(round)
    prompts = torch.randint(1, 4096, (PROMPTS, PROMPT_LENGTH), generator=generator).tolist()
    seeds = [[1000 * round + GROUP_SIZE * n + place for place in range(GROUP_SIZE)] for n in range(PROMPTS)]
    start, start_cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(item.ids) for _, group in engine.sample(prompts, seeds, SAMPLING) for item in group)
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - start_cpu)


def measure_sync(engine: VLLMEngine, model: nn.Module, repeats: int) -> dict[str, float]:
    """Seconds of a sync as in training, where the engine has been given everything before; and its bytes."""
    seconds: list[float] = []
    engine.weights = WeightSync(model, torch.float32, lambda: len(seconds))
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.sync_weights()
        seconds.append(time.perf_counter() - start)
    sent = [value for _, value in EngineWeights(model, torch.float32, everything=False)]
    return {
        "first_s": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "bytes": sum(value.numel() * value.element_size() for value in sent),
    }


def measure(size: str, repeats: int) -> dict[str, Any]:
    """Both engines on one model, in turns; then the syncs."""
    model = make_model(size)
    vllm = VLLMEngine(model, version=lambda: 0, sampling=SAMPLING, max_prompt_length=PROMPT_LENGTH)
    vllm.sync_weights()
    engines: dict[str, Engine] = {"transformers": TransformersEngine(model, pad_token_id=0), "vllm": vllm}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for round in range(repeats + 1):
        for name, engine in engines.items():
            rate = tokens_per_second(engine, round)
            if round:
                rates[name].append(rate)
    result: dict[str, Any] = {"weights": model.num_parameters()}
    for name, values in rates.items():
        wall, cpu = zip(*values, strict=True)
        result[name] = {
            "tokens_per_second": statistics.median(wall),
            "spread": [min(wall), max(wall)],
            "tokens_per_cpu_second": statistics.median(cpu),
        }
    result["sync_full"] = measure_sync(vllm, model, repeats)
    for name, targets in (("all-linear", "all-linear"), ("q, v", ["q_proj", "v_proj"])):
        adapted = get_peft_model(make_model(size), LoraConfig(r=16, target_modules=targets))
        result[f"sync_lora {name}"] = measure_sync(vllm, adapted, repeats)
    return result


def main() -> None:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", choices=MODELS, help="this size only")
    args = parser.parse_args()
    threads, results = torch.get_num_threads(), {}
    print(f"{'weights':<9}{'transformers':>14}{'vLLM':>14}{'ratio':>8}   sync: seconds (MB)")
    for size in [args.size] if args.size else MODELS:
        r = results[size] = measure(size, args.repeats)
        rates = [r[name]["tokens_per_second"] for name in ("transformers", "vllm")]
        print(f"{size:<9}{rates[0]:>8.0f} tok/s{rates[1]:>8.0f} tok/s{rates[1] / rates[0]:>7.2f}x   ", end="")
        syncs = {name.removeprefix("sync_"): part for name, part in r.items() if name.startswith("sync_")}
        print(
            ", ".join(f"{name} {part['seconds']:.3f} ({part['bytes'] / 1e6:.0f})" for name, part in syncs.items()),
            flush=True,
        )
    setting = {"vllm": installed_vllm(), "torch": torch.__version__, "threads": threads, "repeats": args.repeats}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "engines.json").write_text(json.dumps({"setting": setting, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
