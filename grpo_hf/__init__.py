"""GRPO for Hugging Face causal language models.

    from grpo_hf import GRPOConfig, GRPOTrainer, register_reward

Names are imported when they are first used, so that a package of verifiers does not load torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_hf.rewards import register_reward
    from grpo_hf.training.config import GRPOConfig
    from grpo_hf.training.trainer import GRPOTrainer

__version__ = importlib.metadata.version("grpo_hf")
__all__ = ["GRPOConfig", "GRPOTrainer", "register_reward"]

_HOME = {
    "GRPOConfig": "grpo_hf.training.config",
    "GRPOTrainer": "grpo_hf.training.trainer",
    "register_reward": "grpo_hf.rewards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grpo_hf' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)
