"""The training phase, packed against padded: `python -m benchmarks.packed_vs_padded`.

One random model of about 40 million weights in float32 on this machine's CPU, no gradient checkpointing; forward,
backward and AdamW on 4 groups of 8. The padded side is ours too, with the same fused head on completion tokens only, so
the ratio is what the shared prompt and the missing padding save. First the gradients are compared; then both sides take
turns. Writes benchmarks/results/packed_vs_padded.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.objective import Objective
from grpo_hf.packing.attention import SHARED_PREFIX
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.types import Completion, Group, PackedBatch, Prompt

SHAPES = {
    "192 / 64, equal lengths": (192, 64, False),
    "192 / 64, uneven": (192, 64, True),
}
"""Prompt tokens / completion tokens at most; uneven: uniform between a quarter and the whole."""
VOCABULARY, GROUPS, GROUP_SIZE, TOKENS_PER_MICROBATCH = 32_000, 4, 8, 8192


def make_model() -> Qwen2ForCausalLM:
    """Hidden 512, 8 layers, tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def make_groups(prompt_length: int, completion_length: int, uneven: bool) -> list[Group]:
    """Random tokens and advantages."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    def length() -> int:
        low = completion_length // 4
        return int(torch.randint(low, completion_length + 1, (), generator=generator)) if uneven else completion_length

    return [
        Group(
            Prompt(ids(prompt_length), "", {}, number),
            [Completion(ids(length()), False, advantage=(-1.0) ** n) for n in range(GROUP_SIZE)],
        )
        for number in range(GROUPS)
    ]


def backward(model: Qwen2ForCausalLM, batches: list[PackedBatch], groups: list[Group]) -> None:
    """One update's forward and backward passes."""
    completions = [completion for group in groups for completion in group.completions]
    tokens = sum(len(completion.ids) for completion in completions)
    denominators = Denominators(tokens, len(completions), tokens, 1, max(len(c.ids) for c in completions))
    for batch in batches:
        logprobs, entropy = batch_logprobs(model, batch)
        loss, _ = Objective()(
            logprobs, entropy, batch.advantages, batch.sequence, denominators, old_logprobs=logprobs.detach()
        )
        loss.backward()


def gradient(model: Qwen2ForCausalLM, batches: list[PackedBatch], groups: list[Group]) -> torch.Tensor:
    """The flat gradient, in float64."""
    model.zero_grad()
    backward(model, batches, groups)
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def measure(shape: str, repeats: int) -> dict:
    """Medians over interleaved repeats, and how equal the gradients are."""
    groups = make_groups(*SHAPES[shape])
    model = make_model()
    model.set_attn_implementation(SHARED_PREFIX)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    plans = {name: layout(groups, tokens_per_microbatch=TOKENS_PER_MICROBATCH) for name, layout in LAYOUTS.items()}
    packed, padded = (gradient(model, plans[name], groups) for name in ("packed", "padded"))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, batches in plans.items():
            wall, cpu = time.perf_counter(), time.process_time()
            backward(model, batches, groups)
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    result: dict = {"relative_gradient_error": ((packed - padded).norm() / padded.norm()).item()}
    for name, batches in plans.items():
        walls, cpus = zip(*seconds[name], strict=True)
        result[name] = {
            "wall_s": statistics.median(walls),
            "wall_spread_s": [min(walls), max(walls)],
            "cpu_s": statistics.median(cpus),
            "tokens_forwarded": sum(batch.num_tokens for batch in batches),
            "peak_mib": peak_memory(shape, name),
        }
    for quantity in ("wall_s", "cpu_s", "tokens_forwarded", "peak_mib"):
        result[f"padded_over_packed_{quantity}"] = result["padded"][quantity] / result["packed"][quantity]
    return result


def peak_memory(shape: str, layout: str) -> float:
    """Peak resident MiB of a fresh process that runs two updates in one layout."""
    command = [sys.executable, "-m", "benchmarks.packed_vs_padded", "--shape", shape, "--peak", layout]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(shape: str, layout: str) -> None:
    """What peak_memory reads."""
    groups, model = make_groups(*SHAPES[shape]), make_model()
    model.set_attn_implementation(SHARED_PREFIX)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    for _ in range(2):
        backward(model, LAYOUTS[layout](groups, tokens_per_microbatch=TOKENS_PER_MICROBATCH), groups)
        optimizer.step()
        optimizer.zero_grad()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)  # not ru_maxrss, which starts at the parent's


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, help="this shape only")
    parser.add_argument("--peak", choices=LAYOUTS, help="print the peak memory of one layout and end")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.shape, args.peak)
        return
    results = {}
    print(
        f"{'prompt / completion':<26}{'padded s':>9}{'packed s':>9}{'time':>7}{'cpu':>7}{'memory':>8}{'tokens':>8}  gradient"
    )
    for shape in [args.shape] if args.shape else SHAPES:
        r = results[shape] = measure(shape, args.repeats)
        ratios = [r[f"padded_over_packed_{name}"] for name in ("wall_s", "cpu_s", "peak_mib", "tokens_forwarded")]
        print(
            f"{shape:<26}{r['padded']['wall_s']:>9.2f}{r['packed']['wall_s']:>9.2f}{ratios[0]:>6.2f}x{ratios[1]:>6.2f}x",
            end="",
        )
        print(f"{ratios[2]:>7.2f}x{ratios[3]:>7.2f}x  {r['relative_gradient_error']:.1e}", flush=True)
    weights = sum(p.numel() for p in make_model().parameters())
    setting = {"weights": weights, "torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": args.repeats}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "packed_vs_padded.json").write_text(json.dumps({"setting": setting, "shapes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
