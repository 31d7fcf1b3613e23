"""Exact match of the whole completion."""

from __future__ import annotations

from grpo_hf.rewards.registry import register_reward


@register_reward
def exact_match(completion: str, answer: str | int, *, strip: bool = True, ignore_case: bool = False) -> float:
    """1.0 if the completion is the answer, else 0.0; an integer answer is compared as its text.

    >>> exact_match(" Paris\\n", "Paris"), exact_match("paris", "Paris")
    (1.0, 0.0)
    >>> exact_match("paris", "Paris", ignore_case=True), exact_match(" 42", 42, strip=False)
    (1.0, 0.0)

    Raises:
        ValueError: the answer is neither text nor an integer.
    """
    if not isinstance(answer, str | int):
        raise ValueError(f"exact_match compares with text or an integer; the answer is {answer!r}")
    texts = [completion, str(answer)]
    if strip:
        texts = [text.strip() for text in texts]
    if ignore_case:
        texts = [text.casefold() for text in texts]
    return float(texts[0] == texts[1])
