"""Sampling and scoring held-out prompts: reward means, and pass@k where a verifier says right or wrong."""

from __future__ import annotations

import math
from typing import Any

import torch

from grpo_hf.algorithm.pass_at_k import pass_at_k
from grpo_hf.metrics import Metrics
from grpo_hf.rewards.faults import Calls, Tally, merged, stop_if_faulty
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.prompts import PromptSet, derived_seed
from grpo_hf.rollout.record import GroupSummary, record_groups, record_outcomes, summarize_all
from grpo_hf.rollout.stream import GroupSampler
from grpo_hf.types import Group


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
) -> dict[str, float]:
    """Metrics over all prompts and processes, under the names of training's log.

    Seeds depend on the row alone, so two evaluations differ by the weights only. ``batch_size`` counts completions.
    """
    rows = range(peers.rank, len(prompts), peers.count)
    share = max(1, batch_size // num_generations)
    groups: list[Group] = []
    tally: Tally = {}
    # Every process samples as often as the one with the most rows: an engine may have to wait for all of them.
    for start in range(0, math.ceil(len(prompts) / peers.count), share):
        part = rows[start : start + share]
        seeds = [derived_seed(seed, "eval", row) for row in part]
        new, calls = sampler.sample(
            [prompts[row] for row in part], seeds, num_generations, sampling, trainer_state=trainer_state
        )
        groups, tally = groups + new, merged([tally, calls])
    stop_if_faulty(merged(peers.gather(tally)), sampler.scorer.settings)
    metrics = Metrics()
    record_outcomes(metrics, tally)
    everyone = summarize_all(groups, peers)
    record_groups(metrics, everyone)
    _record_pass_at_k(metrics, everyone, num_generations)
    measured = metrics.flush(peers.gather, steps=1)
    measured = {k: v for k, v in measured.items() if not (k.startswith("time/") or "/seconds/" in k)}
    return measured | ({"loss": -measured["reward"]} if "reward" in measured else {})


def metric_names(rewards: list[str], num_generations: int) -> list[str]:
    """What `evaluate_prompts` can measure: without a score there is no mean of it, and pass@k where all are 0 or 1."""
    metrics, one = Metrics(), {"length": 1, "truncated": False, "reward": 1.0, "rewards": dict.fromkeys(rewards, 1.0)}
    groups = [[one] * num_generations]
    record_outcomes(metrics, {name: Calls() for name in rewards})
    record_groups(metrics, groups)
    _record_pass_at_k(metrics, groups, num_generations)
    names = metrics.flush(lambda item: [item], steps=1)
    return ["loss", *(name for name in names if not (name.startswith("time/") or "/seconds/" in name))]


def _record_pass_at_k(metrics: Metrics, groups: list[GroupSummary], k: int) -> None:
    for name in groups[0][0]["rewards"] if k > 1 else ():
        scores = torch.tensor([[item["rewards"][name] for item in group] for group in groups])
        scores = scores[~scores.isnan().any(dim=1)]  # prompts that every completion has a score of
        if len(scores) and bool(((scores == 0) | (scores == 1)).all()):
            metrics.mean(f"rewards/{name}/pass@{k}", pass_at_k(scores.bool(), k).item())
