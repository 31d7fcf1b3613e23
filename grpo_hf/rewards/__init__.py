"""Verifiable rewards: a registry that finds verifiers, and the calls that score samples with them."""

from grpo_hf.rewards.combinators import clip, gate, weighted_sum
from grpo_hf.rewards.faults import RewardFaultError
from grpo_hf.rewards.gold import BadGold, check_gold
from grpo_hf.rewards.outcomes import FAULTS, NO_ANSWER, OUTCOMES, BadGoldError, parses_gold
from grpo_hf.rewards.registry import (
    Reward,
    RewardSpec,
    check_columns,
    get_reward,
    get_rewards,
    known_rewards,
    register_reward,
)
from grpo_hf.rewards.scorer import Scorer, score_samples
from grpo_hf.rewards.settings import RewardSettings
from grpo_hf.rewards.verdict import Verdict

__all__ = [
    "FAULTS",
    "NO_ANSWER",
    "OUTCOMES",
    "BadGold",
    "BadGoldError",
    "Reward",
    "RewardFaultError",
    "RewardSettings",
    "RewardSpec",
    "Scorer",
    "Verdict",
    "check_columns",
    "check_gold",
    "clip",
    "gate",
    "get_reward",
    "get_rewards",
    "known_rewards",
    "parses_gold",
    "register_reward",
    "score_samples",
    "weighted_sum",
]
