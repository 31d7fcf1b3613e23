"""The GRPO objective: the one place where loss, ratio level, aggregation, factors, KL and entropy come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators, local_token_mean, update_mean
from grpo_hf.algorithm.kl import KL_ESTIMATORS, kl_to_reference
from grpo_hf.algorithm.losses import LEVELS, token_log_ratio
from grpo_hf.algorithm.trial import TRIAL_SCALES, gradient_of, one_token_each, trial_batch
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    from grpo_hf.algorithm.aggregation import Aggregation
    from grpo_hf.algorithm.correction import Factor
    from grpo_hf.algorithm.losses import Loss

    Tokens = Float[Tensor, " token"]
    Metrics = dict[str, Tokens]


@dataclass(frozen=True)
class Term:
    """c Σ_t w_t f_t v_t: one summand of an objective, with a global denominator of its own."""

    name: str
    """policy, kl or entropy, or another."""
    value: Callable[[TokenBatch], tuple[Tokens, Metrics]]
    """v [token], which carries the gradient, and metrics."""
    coefficient: float
    """c."""
    aggregation: Aggregation
    """w [token], a value of AGGREGATIONS."""
    factors: tuple[Factor, ...] = ()
    """f [token] is their product; constants."""

    def __call__(self, batch: TokenBatch, denominators: Denominators) -> tuple[Float[Tensor, ""], Metrics]:
        """The batch's part of the term, and the metrics of its value and factors."""
        values, metrics = self.value(batch)
        weights = self.coefficient * self.aggregation(batch, denominators)
        for factor in self.factors:
            by_token, more = factor(batch)
            weights, metrics = weights * by_token.detach(), metrics | more
        return (weights * values).sum(), metrics


@dataclass(frozen=True)
class Objective:
    """L = the sum of its terms."""

    terms: tuple[Term, ...]
    """What is summed."""
    level: Callable[[TokenBatch], Tokens] = token_log_ratio
    """log(π_θ / π_old) [token] for all of them, a value of LEVELS."""

    def __call__(self, batch: TokenBatch, denominators: Denominators) -> tuple[Float[Tensor, ""], Metrics]:
        """The micro-batch's part of the loss, and the values [token] that are logged, by metric name."""
        batch = replace(batch, log_ratio=self.level(batch))
        loss, metrics = batch.logprobs.new_zeros(()), {"entropy": batch.entropy}
        for term in self.terms:
            part, more = term(batch, denominators)
            loss, metrics = loss + part, metrics | more
        return loss, metrics

    @property
    def needs_every_token(self) -> bool:
        """Whether tokens with advantage 0 have a gradient too, as with a KL or entropy term; found by trying."""
        batches = (trial_batch(scale) for scale in TRIAL_SCALES)
        return any((gradient_of(self, replace(batch, advantages=0 * batch.advantages)) != 0).any() for batch in batches)

    @property
    def needs_whole_completions(self) -> bool:
        """Whether a token's gradient depends on its completion's other tokens, as with a ratio or an engine correction by
        sequence, so that they have to stay together; found by trying."""
        batches = (trial_batch(scale) for scale in TRIAL_SCALES)
        return not all(
            gradient_of(self, batch).allclose(gradient_of(self, one_token_each(batch)), equal_nan=True) for batch in batches
        )

    @property
    def needs_own_completions(self) -> bool:
        """Whether a process has to train on the completions that it has sampled, as with a mean over its own tokens."""
        return any(term.aggregation is local_token_mean for term in self.terms)


def grpo_objective(
    loss: Loss,
    aggregation: str,
    *,
    level: str = "token",
    factors: tuple[Factor, ...] = (),
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = True,
    entropy_coef: float = 0.0,
) -> Objective:
    """L = Σ_t w_t (f_t L_t + β KL_t) - γ mean_t H_t, with w by name of AGGREGATIONS, f the factors, γ ``entropy_coef``.

    ``grpo_objective(*LOSSES["dapo"])`` is the plainest. KL is aggregated as the loss is; the entropy bonus is a mean over
    the update's tokens, whatever the aggregation.
    """
    weights = AGGREGATIONS[aggregation]
    terms = [Term("policy", loss, 1.0, weights, factors)]
    if beta:
        kl = partial(kl_to_reference, estimator=KL_ESTIMATORS[kl_estimator], bias_correction=kl_bias_correction)
        terms.append(Term("kl", kl, beta, weights))
    if entropy_coef:
        terms.append(Term("entropy", _entropy, -entropy_coef, update_mean))
    return Objective(tuple(terms), LEVELS[level])


def _entropy(batch: TokenBatch) -> tuple[Tokens, Metrics]:
    return batch.entropy, {}
