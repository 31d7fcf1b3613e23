"""The GRPO objective: the one place where loss, ratio level, aggregation, factors, KL and entropy come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators, local_token_mean, update_mean
from grpo_hf.algorithm.correction import chosen_by
from grpo_hf.algorithm.kl import KL_ESTIMATORS, kl_to_reference, kl_to_teacher
from grpo_hf.algorithm.losses import LEVELS, token_log_ratio
from grpo_hf.algorithm.selection import mean_of_top_entropy, selections_of, top_entropy
from grpo_hf.algorithm.trial import TRIAL_SCALES, gradient_of, one_token_each, trial_batch
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    from grpo_hf.algorithm.aggregation import Aggregation
    from grpo_hf.algorithm.correction import Factor
    from grpo_hf.algorithm.losses import Loss
    from grpo_hf.algorithm.selection import Selection

    Tokens = Float[Tensor, " token"]
    Metrics = dict[str, Tokens]


@dataclass(frozen=True)
class Term:
    """c Σ_t w_t f_t v_t: one summand of an objective, with a global denominator of its own."""

    name: str
    """policy, kl, entropy or teacher, or another."""
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
    selections: dict[str, Selection] = field(default_factory=dict)
    """What has to see all of an update's tokens before any term does; see `TokenBatch.selected`."""

    def __call__(self, batch: TokenBatch, denominators: Denominators) -> tuple[Float[Tensor, ""], Metrics]:
        """The micro-batch's part of the loss, and the values [token] that are logged, by metric name."""
        parts, metrics = self.parts(batch, denominators)
        return sum(parts.values(), start=batch.logprobs.new_zeros(())), metrics

    def parts(self, batch: TokenBatch, denominators: Denominators) -> tuple[dict[str, Float[Tensor, ""]], Metrics]:
        """The same by term."""
        batch = self.prepared(batch)
        parts, metrics = {}, {"entropy": batch.entropy}
        for term in self.terms:
            parts[term.name], more = term(batch, denominators)
            metrics |= more
        return parts, metrics

    def prepared(self, batch: TokenBatch) -> TokenBatch:
        """As its terms see it; a batch for which nothing is selected yet is taken for the whole update."""
        return replace(
            batch,
            log_ratio=self.level(batch),
            ratio_of_completions=self.level is not token_log_ratio,
            selected=batch.selected or self.select(batch),
        )

    def select(self, update: TokenBatch) -> dict[str, Tokens]:
        """What the selections say of the tokens of a whole update."""
        return {name: selection(update) for name, selection in self.selections.items()}

    def with_coefficient(self, name: str, coefficient: float) -> Objective:
        """The same with another coefficient of that term."""
        return replace(
            self, terms=tuple(replace(term, coefficient=coefficient) if term.name == name else term for term in self.terms)
        )

    @property
    def needs_every_token(self) -> bool:
        """Whether tokens with advantage 0 matter too: they have a gradient, as with a KL or entropy term, which is found by
        trying, or a selection compares with them."""
        if self.selections:
            return True
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
    teacher_coef: float = 0.0,
    selections: dict[str, Selection] | None = None,
    top_entropy_quantile: float = 1.0,
) -> Objective:
    """L = Σ_t w_t (f_t L_t + β KL_t) - γ mean_t H_t + τ mean_t KL_t(π_θ || π_teacher), with w by name of AGGREGATIONS, f the
    factors, γ ``entropy_coef``, τ ``teacher_coef``.

    ``grpo_objective(*LOSSES["dapo"])`` is the plainest. KL is aggregated as the loss is; the entropy bonus and the teacher's
    KL are means over the update's tokens, whatever the aggregation. ``top_entropy_quantile`` ρ < 1 keeps that share of
    tokens in L_t and H_t. ``selections`` None are the loss's own.
    """
    weights = AGGREGATIONS[aggregation]
    selections = dict(selections_of(loss) if selections is None else selections)
    of_entropy: tuple[Factor, ...] = ()
    if top_entropy_quantile < 1:
        for name, selection in {"top_entropy": top_entropy, "mean_of_top_entropy": mean_of_top_entropy}.items():
            selections[name] = partial(selection, top_entropy_quantile=top_entropy_quantile)
        factors, of_entropy = (*factors, partial(chosen_by, "top_entropy")), (partial(chosen_by, "mean_of_top_entropy"),)
    terms = [Term("policy", loss, 1.0, weights, factors)]
    if beta:
        kl = partial(kl_to_reference, estimator=KL_ESTIMATORS[kl_estimator], bias_correction=kl_bias_correction)
        terms.append(Term("kl", kl, beta, weights))
    if entropy_coef:
        terms.append(Term("entropy", _entropy, -entropy_coef, update_mean, of_entropy))
    if teacher_coef:
        terms.append(Term("teacher", kl_to_teacher, teacher_coef, update_mean))
    return Objective(tuple(terms), LEVELS[level], selections)


def _entropy(batch: TokenBatch) -> tuple[Tokens, Metrics]:
    return batch.entropy, {}
