"""A penalty on saying the same again."""

from __future__ import annotations

from itertools import islice

from grpo_hf.rewards.registry import register_reward


@register_reward
def repetition(completion: str, *, n: int = 3, max_penalty: float = -1.0) -> float:
    """max_penalty · (1 - distinct n-grams / all n-grams) of the words, in lower case; 0.0 for fewer than n words.

    The n-gram repetition penalty of Yeo et al. 2025 (arXiv 2502.03373), over the whole completion.

    >>> repetition("one two three four"), repetition("go go go go go go", n=2), repetition("go", n=2)
    (0.0, -0.8, 0.0)

    Raises:
        ValueError: n is below 1, or max_penalty above 0.
    """
    if n < 1:
        raise ValueError(f"n={n} words make no n-gram; give 1 or more")
    if max_penalty > 0:
        raise ValueError(f"max_penalty={max_penalty} would reward repetition; give 0 or less")
    words = completion.lower().split()
    grams = list(zip(*(islice(words, start, None) for start in range(n)), strict=False))
    repeated = len(grams) - len(set(grams))
    return max_penalty * repeated / len(grams) if repeated else 0.0
