"""What a node of a token tree costs on a CPU, in tokens: `python -m benchmarks.nodes`.

One layer of SmolLM2-135M's shape, float32, one thread, process CPU time: attention over a prompt of 60 tokens and 8
completions of 24, forward and backward, where completions branch at the prompt, and where each two of them share their
first tokens, which is a node more a pair; and a token's share of the layer's matrix products. A run is worth a node when it
saves more tokens than that (LEAST_SAVED in grpo_hf/packing/layout.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from grpo_hf.packing.attention import ScoreRule, cascade
from grpo_hf.packing.layout import lay_out
from grpo_hf.packing.tree import token_runs
from grpo_hf.types import TokenTree

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 9, 3, 64, 576, 1536
PROMPT, COMPLETIONS, LENGTH = 60, 8, 24
WEIGHTS = HIDDEN * HEAD_DIM * 2 * (HEADS + KV_HEADS) + 3 * HIDDEN * INTERMEDIATE
"""Of the layer's matrices: q, k, v, o and the MLP's three."""


def tree(shared: int) -> TokenTree:
    """The prompt and its completions, of which each two begin with so many tokens alike."""
    prompt = tuple(range(PROMPT))
    sequences = [
        (*prompt, *(1000 * (n // 2 if place < shared else n + 100) + place for place in range(LENGTH)))
        for n in range(COMPLETIONS)
    ]
    nodes, _ = lay_out(token_runs(sequences))
    unused = torch.empty(nodes[-1].span.stop, dtype=torch.long)  # reach and depth, which the cascade does not read
    return TokenTree(nodes, unused, unused, longest=PROMPT + LENGTH)


def seconds(run: Callable[[], object], repeats: int = 40, rounds: int = 7) -> float:
    """Median over rounds of the CPU seconds of one call."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            run()
        taken.append((time.process_time() - start) / repeats)
    return median(taken)


def attention(layout: TokenTree) -> float:
    """Seconds of forward and backward."""
    shapes = [(1, heads, len(layout.reach), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    rule = ScoreRule(HEAD_DIM**-0.5, None, None)
    return seconds(lambda: cascade(*states, layout, rule).sum().backward())


def products() -> float:
    """Seconds of a token's products with the layer's weights, forward and backward, in a micro-batch of 512."""
    left, right = torch.randn(512, HIDDEN), torch.randn(HIDDEN, INTERMEDIATE)
    return 3 * seconds(lambda: left @ right) / 512 * WEIGHTS / right.numel()


def main() -> None:
    """Measure, show."""
    torch.set_num_threads(1)
    token = products()
    print(f"a token's products in the layer: {1e6 * token:.0f} us")
    for shared in (1, 2, 4, 8):
        flat, branched = tree(0), tree(shared)
        nodes, saved = len(branched.nodes) - len(flat.nodes), len(flat.reach) - len(branched.reach)
        each = (attention(branched) - attention(flat)) / nodes
        cost = f"a node {1e6 * each:.0f} us = {each / token:.1f} tokens"
        print(f"pairs that share {shared}: {nodes} nodes more, {saved} tokens fewer; {cost}")


if __name__ == "__main__":
    main()
