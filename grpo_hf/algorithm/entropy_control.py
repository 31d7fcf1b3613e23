"""An entropy coefficient that follows the entropy, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EntropyControl:
    """γ goes up by Δ after a step whose mean entropy is at most the target, else down, within its bounds; it is applied
    while the entropy of the step before is at most the target (Skywork-OR1; He et al. 2025, arXiv 2505.22312)."""

    coefficient: float
    """γ."""
    target: float
    """Of the mean entropy, in nats."""
    delta: float
    """Δ."""
    low: float
    """The least γ."""
    high: float
    """The largest γ."""
    entropy: float = math.inf
    """Of the step before; infinite before the first."""

    @property
    def applied(self) -> float:
        """What the entropy term is multiplied by in the next step."""
        return self.coefficient if self.entropy <= self.target else 0.0

    def after(self, entropy: float) -> EntropyControl:
        """The control once a step has had this mean entropy, over all processes."""
        step = self.delta if entropy <= self.target else -self.delta
        return replace(self, coefficient=min(max(self.coefficient + step, self.low), self.high), entropy=entropy)
