"""Sampling and scoring held-out prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grpo_hf.evaluation.estimates import Question, estimates_of, question_of
from grpo_hf.evaluation.intervals import Estimate
from grpo_hf.metrics import Metrics
from grpo_hf.rewards.faults import Calls, Tally, merged, stop_if_faulty
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.prompts import PromptSet, derived_seed
from grpo_hf.rollout.record import record_groups, record_outcomes, summarize_all
from grpo_hf.rollout.stream import GroupSampler
from grpo_hf.types import Group


@dataclass(frozen=True)
class Evaluation:
    """What a model's samples of held-out prompts have come to."""

    metrics: dict[str, float]
    """Of all prompts and processes, under the names of training's log."""
    estimates: dict[str, Estimate]
    """The same of avg@k, pass@k and maj@k, with their intervals."""
    groups: list[Group]
    """This process's samples."""


def evaluate_prompts(
    prompts: PromptSet,
    sampler: GroupSampler,
    sampling: Sampling,
    *,
    num_generations: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    peers: Peers = ALONE,
    trainer_state: Any = None,
) -> Evaluation:
    """Sample and score all prompts, each process its share.

    Seeds depend on the row alone, so two evaluations differ by the weights only. ``batch_size`` counts completions.
    """
    rows = range(peers.rank, len(prompts), peers.count)
    share = max(1, batch_size // num_generations)
    groups: list[Group] = []
    tally: Tally = {}
    # Every process samples as often as the one with the most rows: an engine may have to wait for all of them.
    for start in range(0, math.ceil(len(prompts) / peers.count), share):
        part = rows[start : start + share]
        seeds = [seed_of(seed, row) for row in part]
        new, calls = sampler.sample(
            [prompts[row] for row in part], seeds, num_generations, sampling, trainer_state=trainer_state
        )
        groups, tally = groups + new, merged([tally, calls])
    stop_if_faulty(merged(peers.gather(tally)), sampler.scorer.settings)
    metrics = Metrics()
    record_outcomes(metrics, tally)
    record_groups(metrics, summarize_all(groups, peers))
    measured = metrics.flush(peers.gather, steps=1)
    asked = [question_of(group, seed_of(seed, group.prompt.index)) for group in groups]
    questions = sorted((item for part in peers.gather(asked) for item in part), key=lambda item: item.row)
    estimates = estimates_of(questions)
    return Evaluation(_named(measured, estimates), estimates, groups)


def seed_of(seed: int, row: int) -> int:
    """The seed of a row's samples, in an evaluation with this one."""
    return derived_seed(seed, "eval", row)


def metric_names(rewards: list[str], num_generations: int) -> list[str]:
    """What `evaluate_prompts` can measure: without a score there is no mean of it, and pass@k where all are 0 or 1."""
    metrics, one = Metrics(), {"length": 1, "truncated": False, "reward": 1.0, "rewards": dict.fromkeys(rewards, 1.0)}
    record_outcomes(metrics, {name: Calls() for name in rewards})
    record_groups(metrics, [[one] * num_generations])
    ones = [1.0] * num_generations
    question = Question(0, 0, "", dict.fromkeys(rewards, ones), ones, [""] * num_generations)
    return [*_named(metrics.flush(lambda item: [item], steps=1), estimates_of([question]))]


def _named(measured: dict[str, float], estimates: dict[str, Estimate]) -> dict[str, float]:
    """What is logged: training's metrics, the loss, and estimates, of which means have their interval beside them."""
    logged = {k: v for k, v in measured.items() if not (k.startswith("time/") or "/seconds/" in k)}
    for name, estimate in estimates.items():
        logged[name] = estimate.value
        if "@" not in name:
            logged |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return ({"loss": -logged["reward"]} if "reward" in logged else {}) | logged
