"""Rewards that shape how long completions get, in tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_hf.rewards.combinators import Score, Verifier, parts_of, verifier_of, with_outcome
from grpo_hf.rewards.registry import RewardSpec, register_combinator, register_reward


@register_reward
def soft_overlong(completion: str, completion_ids: Sequence[int], *, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to a reward of correctness.

        0                                      if |y| <= max_length - cache
        ((max_length - cache) - |y|) / cache   if max_length - cache < |y| <= max_length
        -1                                     if max_length < |y|

    |y| counts the sampled tokens, the end token among them. DAPO's values are 20480 and 4096; max_length is usually the
    run's max_completion_length.

    >>> [soft_overlong("", range(length), max_length=10, cache=4) for length in (6, 7, 10, 11)]
    [0.0, -0.25, -1.0, -1.0]

    Raises:
        ValueError: not 0 < cache <= max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"soft_overlong needs 0 < cache <= max_length; got cache={cache} and max_length={max_length}")
    return min(0.0, max(-1.0, (max_length - cache - len(completion_ids)) / cache))


@register_combinator
def cosine_length(
    correct: RewardSpec,
    *,
    max_length: int,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
    threshold: float = 1.0,
) -> Verifier:
    """The cosine reward of Yeo et al. 2025 (arXiv 2502.03373): right answers better short, wrong ones better long.

        exceeded                                                    if |y| >= max_length
        r_long + ½ (r_short - r_long) (1 + cos(π |y| / max_length))   else

    A combinator: the verifier `correct` says which pair (r_short, r_long) it is, by scoring at least `threshold` or not;
    r_short is what no token at all would earn, r_long what max_length would. |y| counts the sampled tokens, the end token
    among them. The defaults are the paper's.

    >>> verifier = cosine_length(lambda completion: float(completion == "4"), max_length=100)
    >>> [round(verifier(completion="4", completion_ids=range(length)), 3) for length in (0, 50, 99, 100)]
    [2.0, 1.5, 1.0, -10.0]
    >>> [round(verifier(completion="5", completion_ids=range(length)), 3) for length in (0, 50, 99, 100)]
    [-10.0, -5.0, -0.002, -10.0]

    Raises:
        ValueError: max_length is not above 0.
    """
    if max_length <= 0:
        raise ValueError(f"cosine_length needs max_length above 0; got {max_length}")

    def rule(keywords: Mapping[str, Any], correctness: Score) -> Any:
        score = correctness()
        if score is None:
            return None
        length = len(keywords["completion_ids"])
        short, long = (correct_short, correct_long) if score >= threshold else (wrong_short, wrong_long)
        curve = long + 0.5 * (short - long) * (1 + math.cos(math.pi * length / max_length))
        return with_outcome(exceeded if length >= max_length else curve, [score])

    return verifier_of("cosine_length", parts_of("cosine_length", [correct]), rule, built_ins=["completion_ids"])
