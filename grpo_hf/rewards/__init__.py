"""Verifiable rewards: a registry that finds verifiers, and the calls that score samples with them."""

from grpo_hf.rewards.registry import (
    Reward,
    RewardSpec,
    check_columns,
    get_reward,
    get_rewards,
    known_rewards,
    register_reward,
)
from grpo_hf.rewards.scoring import score, score_group_rewards

__all__ = [
    "Reward",
    "RewardSpec",
    "check_columns",
    "get_reward",
    "get_rewards",
    "known_rewards",
    "register_reward",
    "score",
    "score_group_rewards",
]
