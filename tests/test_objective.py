"""The objective as a sum of terms, against numbers worked out by hand, and what it finds out about itself by trying."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators
from grpo_hf.algorithm.correction import CORRECTION_MODES, corrected, measured, off_policy_masked
from grpo_hf.algorithm.losses import LOSSES, cispo, reinforce, unclipped
from grpo_hf.algorithm.objective import Objective, Term, grpo_objective
from grpo_hf.algorithm.sequences import sequence_mean
from grpo_hf.types import TokenBatch
from tests.batches import token_batch

# A rollout of two updates with 10 tokens, 6 of them in this one.
COUNTS = Denominators(tokens=5, sequences=2, local_tokens=6, num_processes=1, max_completion_length=4, update_tokens=6)


def batch() -> TokenBatch:
    """Completion 0 has tokens 0 and 1, completion 1 has token 2; entropies 1."""
    return token_batch(
        [1.5, 0.5, 1.0], [1.0, 1.0, -2.0], completion=[0, 0, 1], engine_ratios=[2.0, 0.5, 1.0], ref_ratios=[1.0, 2.0, 4.0]
    )


def value(objective: Objective) -> float:
    return objective(batch(), COUNTS)[0].item()


def test_the_policy_term_is_aggregated() -> None:
    # -A r: -1.5, -0.5, 2.
    assert value(grpo_objective(unclipped, "token_mean")) == pytest.approx(0.0 / 5)
    assert value(grpo_objective(unclipped, "sequence_mean")) == pytest.approx((-2.0 / 2 + 2.0) / 2)


def test_factors_multiply_the_policy_term_alone() -> None:
    by_token = partial(corrected, mode="token_truncate", high=None)
    # -1.5 x 2, -0.5 x 0.5, 2 x 1
    plain = value(grpo_objective(unclipped, "token_mean", factors=(by_token,)))
    assert plain == pytest.approx((-3.0 - 0.25 + 2.0) / 5)
    twice = value(grpo_objective(unclipped, "token_mean", factors=(by_token, by_token)))
    assert twice == pytest.approx((-6.0 - 0.125 + 2.0) / 5)
    with_kl = value(grpo_objective(unclipped, "token_mean", factors=(by_token,), beta=0.1, kl_estimator="k2"))
    without = value(grpo_objective(unclipped, "token_mean", beta=0.1, kl_estimator="k2"))
    assert with_kl - without == pytest.approx(plain)


def test_kl_is_aggregated_as_the_loss_is() -> None:
    # k2 of d = 0, ln 2, ln 4: (ln 2)² / 2 and 2 (ln 2)²; times the ratios 1.5, 0.5, 1.
    ln2_squared = math.log(2) ** 2
    options: dict[str, Any] = {"beta": 0.1, "kl_estimator": "k2"}
    plain = value(grpo_objective(unclipped, "sequence_mean", kl_bias_correction=False, **options))
    assert plain - 0.5 == pytest.approx(0.1 * (ln2_squared / 4 + 2 * ln2_squared) / 2)
    bias_corrected = value(grpo_objective(unclipped, "sequence_mean", **options))
    assert bias_corrected - 0.5 == pytest.approx(0.1 * (ln2_squared / 8 + 2 * ln2_squared) / 2)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_entropy_bonus_is_a_mean_over_the_updates_own_tokens(aggregation: str) -> None:
    without = value(grpo_objective(unclipped, aggregation))
    # 3 of the update's 6 tokens are here.
    assert value(grpo_objective(unclipped, aggregation, entropy_coef=0.2)) - without == pytest.approx(-0.2 * 3 / 6)


def test_metrics_of_all_parts() -> None:
    objective = grpo_objective(*LOSSES["dapo"], factors=(measured,), beta=0.1, entropy_coef=0.1)
    _, metrics = objective(batch(), COUNTS)
    assert metrics.keys() == {
        "entropy",
        "kl",
        "clip_ratio/low",
        "clip_ratio/high",
        "clip_ratio/region",
        "sampling/sampling_logp_difference",
        "sampling/kl",
        "sampling/frac_without_logprobs",
    }
    assert metrics["entropy"].tolist() == [1.0, 1.0, 1.0]
    assert metrics["clip_ratio/high"].tolist() == [1.0, 0.0, 0.0]
    # k3 of d times the ratio: exp(d) - d - 1 of 0, ln 2, ln 4.
    assert metrics["kl"].tolist() == pytest.approx([0.0, 0.5 * (1 - math.log(2)), 3 - math.log(4)])


def test_the_level_is_every_terms() -> None:
    # Mean log-ratio of completion 0: ln(1.5 x 0.5) / 2, so r = √0.75 there and 1 for completion 1.
    of_sequence = grpo_objective(unclipped, "token_mean", level="sequence")
    assert value(of_sequence) == pytest.approx((-2 * math.sqrt(0.75) + 2) / 5)


def test_clip_ratios_of_sequences_count_completions() -> None:
    """Of completion 0, of 3 tokens, the ratio is clipped, of the other two, of one, it is not: 1/3, and 3/5 by token."""
    tokens = token_batch([1.5] * 3 + [1.0] * 2, completion=[0, 0, 0, 1, 2])

    def share(level: str) -> float:
        _, metrics = grpo_objective(*LOSSES["grpo"], level=level)(tokens, COUNTS)
        return metrics["clip_ratio/high"].nanmean().item()

    assert (share("sequence"), share("token")) == (pytest.approx(1 / 3), pytest.approx(3 / 5))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_add_up(loss_type: str, level: str) -> None:
    loss, aggregation = LOSSES[loss_type]
    loss = partial(loss, epsilon_high=5.0) if loss is cispo else loss
    factor = partial(corrected, mode="sequence_truncate")
    objective = grpo_objective(loss, aggregation, level=level, factors=(factor,), beta=0.1, entropy_coef=0.1)
    whole, parts = batch(), 0.0
    for tokens, number in ((slice(0, 2), 0), (slice(2, 3), 1)):
        names = ("logprobs", "entropy", "advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs")
        cut = {name: getattr(whole, name)[tokens] for name in names}
        completion, lengths = whole.completion[tokens] - number, whole.lengths[number : number + 1]
        parts += objective(replace(whole, completion=completion, lengths=lengths, **cut), COUNTS)[0].item()
    assert parts == pytest.approx(objective(whole, COUNTS)[0].item())


# ---- What it finds out about itself


def imitation(batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return -batch.logprobs, {}


def compared_within_completions(batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    surprise = sequence_mean(batch.entropy.detach(), batch)[batch.completion]
    return -batch.advantages * surprise * batch.logprobs, {}


@pytest.mark.parametrize(
    ("objective", "every_token"),
    [
        (grpo_objective(*LOSSES["dapo"], factors=(corrected,)), False),
        (grpo_objective(*LOSSES["sapo"], level="sequence"), False),
        (grpo_objective(*LOSSES["dapo"], beta=1e-3), True),
        (grpo_objective(*LOSSES["dapo"], beta=1e-3, kl_estimator="k1", kl_bias_correction=False), True),
        (grpo_objective(*LOSSES["dapo"], entropy_coef=1e-3), True),
        (grpo_objective(imitation, "token_mean"), True),
        (grpo_objective(compared_within_completions, "token_mean"), False),
    ],
)
def test_which_objectives_have_a_gradient_without_advantage(objective: Objective, every_token: bool) -> None:
    assert objective.needs_every_token is every_token


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_needs_whole_completions_where_its_ratio_is_of_the_sequence(loss_type: str) -> None:
    loss, aggregation = LOSSES[loss_type]
    loss = partial(loss, epsilon_high=5.0) if loss is cispo else loss
    # VESPO's and GMPO's ratio is of the sequence whatever the level is; REINFORCE takes none, DPPO looks at tokens alone.
    always = loss_type in ("vespo", "gmpo")
    assert grpo_objective(loss, aggregation).needs_whole_completions is always
    of_sequence = grpo_objective(loss, aggregation, level="sequence").needs_whole_completions
    assert of_sequence is (always or loss is not reinforce)


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 2.0), (None, None), (0.999, 1.001), (None, 1.0)])
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_a_correction_needs_whole_completions_where_it_is_of_the_sequence(mode: str, bounds: tuple) -> None:
    factor = partial(corrected, mode=mode, low=bounds[0], high=bounds[1])
    objective = grpo_objective(*LOSSES["dapo"], factors=(factor,))
    assert objective.needs_whole_completions is not mode.startswith("token")


def test_which_others_need_whole_completions() -> None:
    mask = partial(off_policy_masked, threshold=0.5)
    assert grpo_objective(*LOSSES["dapo"], factors=(mask,)).needs_whole_completions
    assert grpo_objective(compared_within_completions, "token_mean").needs_whole_completions
    assert not grpo_objective(*LOSSES["grpo"], factors=(measured,), beta=0.1, entropy_coef=0.1).needs_whole_completions
    assert grpo_objective(*LOSSES["reinforce"], level="sequence", beta=0.1).needs_whole_completions, "the KL's own ratio"


def test_a_mean_over_a_process_needs_its_own_completions() -> None:
    assert [name for name, pair in LOSSES.items() if grpo_objective(*pair).needs_own_completions] == ["bnpo"]


def test_terms_have_denominators_of_their_own() -> None:
    ones = Term("ones", lambda batch: (torch.ones_like(batch.logprobs), {}), 10.0, AGGREGATIONS["update_mean"])
    twos = Term("twos", lambda batch: (2 * torch.ones_like(batch.logprobs), {}), 1.0, AGGREGATIONS["sequence_sum"])
    assert value(Objective((ones, twos))) == pytest.approx(10 * 3 / 6 + 2 * 3 / 2)
