"""How verifiers are run, and what becomes of a call that says nothing about its completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_hf.rewards.loading import nearest
from grpo_hf.rewards.outcomes import FAULTS

POLICIES = ("zero", "drop", "stop")
"""zero: the score is 0; that of a no_answer is what the verifier returned with it, 0 as a rule. drop: the completion is left
out of its group and of the loss. stop: the run ends."""

DEFAULT_POLICY = {"no_answer": "zero", "timeout": "zero", "crash": "zero", "error": "zero", "bad_gold": "drop"}


@dataclass(frozen=True)
class RewardSettings:
    """GRPOConfig's settings of the same names, which start with ``reward_``."""

    timeout: float = 10.0
    """Seconds a sample that one call may take, from its start, in a worker or as an async function."""
    memory_gb: float = 4.0
    """What one call may add to the memory of its worker."""
    workers: int | None = None
    """Worker processes; None: the cores that this process may use."""
    concurrency: int = 64
    """Async calls at a time."""
    policy: Mapping[str, str] = field(default_factory=dict)
    """Outcome -> a name of POLICIES; outcomes that it lacks follow DEFAULT_POLICY."""
    max_fault_share: float = 0.2
    """The run stops when more than this share of a verifier's calls over a rollout are faults."""

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be."""
        rules = {
            "reward_timeout > 0": (self.timeout, self.timeout > 0),
            "reward_memory_gb > 0": (self.memory_gb, self.memory_gb > 0),
            "reward_workers >= 1": (self.workers, self.workers is None or self.workers >= 1),
            "reward_concurrency >= 1": (self.concurrency, self.concurrency >= 1),
            "0 <= reward_max_fault_share <= 1": (self.max_fault_share, 0 <= self.max_fault_share <= 1),
        }
        for rule, (value, holds) in rules.items():
            if not holds:
                name = next(word for word in rule.split() if word.startswith("reward_"))
                raise ValueError(f"{name}={value}, but {rule} is needed")
        if not isinstance(self.policy, Mapping):
            raise ValueError(f"reward_policy={self.policy!r} must map outcomes to what becomes of them: {{timeout: drop}}")
        for outcome, policy in self.policy.items():
            if outcome not in DEFAULT_POLICY:
                known = ", ".join(DEFAULT_POLICY)
                raise ValueError(f"reward_policy has no outcome {outcome!r}, only {known}{nearest(outcome, DEFAULT_POLICY)}")
            if policy not in POLICIES:
                hint = nearest(str(policy), POLICIES)
                raise ValueError(f"reward_policy[{outcome!r}]={policy!r} is not one of {', '.join(POLICIES)}{hint}")

    def policy_of(self, outcome: str) -> str | None:
        """What becomes of a call that ended so; None: its score counts."""
        return (DEFAULT_POLICY | dict(self.policy)).get(outcome)


FOLLOWED = ("no_answer", *FAULTS)
"""Outcomes whose share of the calls is logged."""
