"""Token batches with numbers to work out by hand."""

from collections.abc import Sequence

import torch

from grpo_hf.types import TokenBatch


def token_batch(
    ratios: Sequence[float],
    advantages: Sequence[float] | None = None,
    *,
    completion: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    engine_ratios: Sequence[float] | None = None,
    ref_ratios: Sequence[float] | None = None,
) -> TokenBatch:
    """Tokens with log π_θ = -1 and entropy 1, by π_θ / π_old, π_old / μ and π_ref / π_θ; each its own completion unless
    said, and completions as long as they are here. ``log_ratio`` is the token's, as at the token level."""

    def constants(numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    logprobs = torch.full((len(ratios),), -1.0, dtype=torch.float64, requires_grad=True)
    old_logprobs = -1.0 - constants(ratios).log()
    of = torch.arange(len(ratios)) if completion is None else torch.tensor(completion, dtype=torch.long)
    return TokenBatch(
        logprobs=logprobs,
        entropy=torch.ones_like(logprobs, requires_grad=True),
        advantages=constants(advantages or [1.0] * len(ratios)),
        old_logprobs=old_logprobs,
        completion=of,
        lengths=of.bincount() if lengths is None else torch.tensor(lengths),
        rollout_logprobs=None if engine_ratios is None else old_logprobs - constants(engine_ratios).log(),
        ref_logprobs=None if ref_ratios is None else -1.0 + constants(ref_ratios).log(),
        log_ratio=logprobs - old_logprobs,
    )
