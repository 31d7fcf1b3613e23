"""The training phase on one GPU: `python -m benchmarks.gpu`, or on a CPU in seconds: `... --size tiny --device cpu`.

As the trainer has it: bfloat16 autocast over float32 weights and AdamW, or LoRA on a bfloat16 base; random weights in the
shapes of Qwen2.5. First the gradients of every attention are compared with the padded layout's in float32, and the command
fails if one is wrong. Then, for each size: attention alone, whole updates packed and padded, and the longest completions
that fit. It needs torch, transformers, accelerate, peft and einops. Writes benchmarks/results/gpu.json when on CUDA.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen2Config

from benchmarks.attention_variants import VARIANTS, register, why_not
from benchmarks.gpu_sizes import SIZES, TINY, Shape, Size, make_model, make_samples, plan, qwen, sample
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.packing.attention import TOKEN_TREE, ScoreRule
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.training.throughput import cost_of, matmul_peak, update_flops
from grpo_hf.types import PackedBatch

OBJECTIVE = grpo_objective(*LOSSES["dapo"])
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest accepted relative error of a gradient, by what it is computed in."""


def backward(model: Any, batches: list[PackedBatch], device: str, dtype: torch.dtype) -> None:
    """Forward and backward of one update."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens, completions = sum(len(b.targets) for b in batches), sum(len(b.lengths) for b in batches)
    denominators = Denominators(tokens, tokens, completions, tokens, 1, max(int(b.lengths.max()) for b in batches))
    for batch in batches:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logprobs, entropy = batch_logprobs(lm, batch)
        loss, _ = OBJECTIVE(batch.tokens(logprobs, entropy), denominators)
        loss.backward()


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measures, or how it failed: one failure does not end the others."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Wall time, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- What is measured


def check_gradients(device: str) -> dict[str, Any]:
    """Relative error of the gradient from that of padded rows with eager attention in float32, by attention and dtype."""
    tiny = replace(TINY, config=qwen(128, 192, 2, 4, 2, 512, True))
    model = make_model(tiny, device, initializer_range=0.1)
    samples = make_samples(Shape(40, 30, groups=3, group_size=4), 512)
    plans = {layout: plan(layout, samples, 160, device) for layout in LAYOUTS}

    def gradient(layout: str, attention: str, dtype: torch.dtype) -> Tensor:
        model.set_attn_implementation(attention)
        model.zero_grad()
        backward(model, plans[layout], device, dtype)
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    expected = gradient("padded", "eager", torch.float32)
    found: dict[str, Any] = {}
    for dtype, limit in LIMITS.items():
        for layout, attention in [("padded", "sdpa"), *(("packed", name) for name in register())]:
            name = attention.removeprefix("bench_")

            def error(layout: str = layout, attention: str = attention, dtype: torch.dtype = dtype) -> dict[str, Any]:
                return {"error": ((gradient(layout, attention, dtype) - expected).norm() / expected.norm()).item()}

            reason = why_not(name, device, dtype)
            result = attempt(error) if reason is None else {"skipped": reason}
            if reason is None:
                result |= {"limit": limit, "passed": result.get("error", float("inf")) <= limit}
            found[f"{layout}, {name}, {str(dtype).removeprefix('torch.')}"] = result
    return found


def measure_attention(size: Size, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Forward and backward of one layer's attention over one packed micro-batch in bfloat16, by variant."""
    config = Qwen2Config(**size.config)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    batch = plan("packed", make_samples(shape, config.vocab_size), size.tokens_per_microbatch, device)[0]
    tree, length = batch.tree, batch.num_tokens
    assert tree is not None
    rule = ScoreRule(width**-0.5, None, None)
    sizes = [(1, count, length, width) for count in (heads, config.num_key_value_heads, config.num_key_value_heads)]
    states = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in sizes]
    pairs = int((batch.position_ids + 1).sum())

    def measure(variant: str) -> dict[str, Any]:
        def run() -> None:
            VARIANTS[variant](*states, tree, rule).sum().backward()  # type: ignore[call-arg, arg-type]

        for _ in range(2):
            run()
        seconds = statistics.median(seconds_of(run, device) for _ in range(repeats))
        return {"tokens": length, "ms": 1000 * seconds, "tflops": 12 * heads * width * pairs / seconds / 1e12}

    reasons = {variant: why_not(variant, device, torch.bfloat16) for variant in VARIANTS}
    return {v: {"skipped": r} if r else attempt(lambda v=v: measure(v)) for v, r in reasons.items()}  # type: ignore[misc]


def measure_updates(model: Any, size: Size, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Whole updates, packed and padded, without and with gradient checkpointing."""
    lm = model.get_base_model() if size.lora else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=device == "cuda")
    samples, peak = make_samples(shape, lm.config.vocab_size), matmul_peak(torch.device(device), torch.bfloat16)

    def measure(layout: str, checkpointing: bool) -> dict[str, Any]:
        lm.set_attn_implementation(TOKEN_TREE if layout == "packed" else "sdpa")
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            lm.gradient_checkpointing_disable()
        batches = plan(layout, samples, size.tokens_per_microbatch, device)
        parts: list[tuple[float, float]] = []
        for number in range(repeats + 2):  # two to warm up
            if number == 2 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            forward_backward = seconds_of(lambda: backward(model, batches, device, torch.bfloat16), device)
            parts.append((forward_backward, seconds_of(optimizer.step, device)))
            optimizer.zero_grad()
        forward_backward, step = (statistics.median(column) for column in zip(*parts[2:], strict=True))
        forwarded, completions = sum(b.num_tokens for b in batches), sum(len(b.targets) for b in batches)
        memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
        tflops = update_flops(cost_of(lm), batches) / forward_backward / 1e12
        return memory | {
            "forward_backward_s": forward_backward,
            "optimizer_s": step,
            "microbatches": len(batches),
            "tokens_forwarded": forwarded,
            "forwarded_tokens_per_s": forwarded / (forward_backward + step),
            "completion_tokens_per_s": completions / (forward_backward + step),
            "tflops": tflops,
            "mfu": tflops * 1e12 / peak,
        }

    found = {}
    for layout in LAYOUTS:
        for checkpointing in (False, True):
            found[f"{layout}{', checkpointing' * checkpointing}"] = attempt(lambda: measure(layout, checkpointing))  # noqa: B023
            optimizer.zero_grad()
    return found


def longest_completion(
    model: Any, size: Size, layout: str, device: str, *, whole_group: bool, longest: int
) -> dict[str, Any]:
    """The longest completions, to about a sixteenth, of a prompt of 512 tokens and a group of 8 that fit, with gradient
    checkpointing; ``whole_group``: all 8 in one micro-batch, else one, which is all that the trainer needs."""
    lm = model.get_base_model() if size.lora else model
    lm.set_attn_implementation(TOKEN_TREE if layout == "packed" else "sdpa")
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=device == "cuda")

    def fits(length: int) -> bool:
        count = 8 if whole_group else 1
        samples = [sample([1] * 512, [2 + number] * length, number) for number in range(count)]

        def update() -> dict[str, Any]:
            backward(model, plan(layout, samples, 2**40, device), device, torch.bfloat16)
            optimizer.step()
            return {}

        found = attempt(update)
        optimizer.zero_grad()
        if found.get("failed", "out of memory") != "out of memory":
            raise RuntimeError(found["failed"])
        return not found

    if not fits(256):
        return {"failed": "256 tokens do not fit"}
    low, high = 256, 512
    while high <= longest and fits(high):
        low, high = high, 2 * high
    if high > longest:
        return {"at_least": low}
    while high - low > max(64, low // 16):
        middle = (low + high) // 2 // 64 * 64
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"tokens": low}


# ---- The command


def show(title: str, results: dict[str, Any]) -> None:
    """A table: one line for each result, every number that it has."""
    print(f"\n{title}")
    for name, values in results.items():
        numbers = (
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v:,}" if isinstance(v, int) else f"{k}: {v}"
            for k, v in values.items()
        )
        print(f"  {name:<34}{' | '.join(numbers)}", flush=True)


def measure_size(name: str, device: str, repeats: int, longest: int) -> dict[str, Any]:
    """Everything about one size."""
    size = SIZES[name]
    result: dict[str, Any] = {"config": size.config, "lora": size.lora, "attention": {}, "updates": {}}
    for shape in size.shapes:
        key = f"prompt {shape.prompt}, completions up to {shape.completion}, {shape.groups} groups of {shape.group_size}"
        result["attention"][key] = attempt(lambda: measure_attention(size, shape, device, repeats))  # noqa: B023
        show(f"{name}, attention alone, bfloat16, {key}", result["attention"][key])
    model = make_model(size, device)
    result["weights"] = sum(p.numel() for p in model.parameters())
    for shape, key in zip(size.shapes, result["attention"], strict=True):
        result["updates"][key] = measure_updates(model, size, shape, device, repeats)
        show(f"{name}, updates, {key}, micro-batches of {size.tokens_per_microbatch:,} tokens", result["updates"][key])
    cases = [("packed", True), ("padded", True), ("packed", False)]
    result["longest_completion"] = {
        f"{layout}, {'8 in a micro-batch' if whole else 'one a micro-batch'}": (
            attempt(lambda: longest_completion(model, size, layout, device, whole_group=whole, longest=longest))  # noqa: B023
            if device == "cuda"
            else {"skipped": "a machine that runs out of memory ends the process: CUDA only"}
        )
        for layout, whole in cases
    }
    show(f"{name}, longest completions of a prompt of 512 tokens, group of 8", result["longest_completion"])
    return result


def failures(results: Any, where: str = "") -> list[str]:
    """Everything that failed for another reason than memory, and every gradient that is wrong."""
    if not isinstance(results, dict):
        return []
    own = results.get("failed")
    found = [f"{where}: {own}"] if own and own != "out of memory" else []
    if results.get("passed") is False and not own:
        found.append(f"{where}: relative error {results['error']:.2g}, more than {results['limit']:g}")
    return found + [text for name, part in results.items() for text in failures(part, f"{where} / {name}".strip(" /"))]


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", choices=SIZES, default=["0.5B", "1.5B", "7B-LoRA"], help="these only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=2**17, help="where to stop looking for the longest completion")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; on a CPU: --device cpu --size tiny")
    device = torch.device(args.device)
    peaks = {str(t).removeprefix("torch."): matmul_peak(device, t) / 1e12 for t in (torch.float32, torch.bfloat16)}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    setting = {"device": name, **versions, "repeats": args.repeats, "matmul_peak_tflops": peaks}
    print(f"{name}, torch {torch.__version__}, matmul peak " + ", ".join(f"{k} {v:.3g} TFLOP/s" for k, v in peaks.items()))
    results: dict[str, Any] = {"setting": setting, "gradients": attempt(lambda: check_gradients(args.device)), "sizes": {}}
    show("gradients, relative error from padded rows with eager attention in float32", results["gradients"])
    for size in [] if failures(results) else args.size:
        results["sizes"][size] = attempt(lambda: measure_size(size, args.device, args.repeats, args.longest))  # noqa: B023
        if args.device == "cuda":
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")
    for text in (bad := failures(results)):
        print(f"FAILED {text}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
