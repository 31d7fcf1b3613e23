"""Loading what a run needs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_config(model: str | PreTrainedModel | PeftModel, **options: Any) -> PretrainedConfig:
    """The text model's config, without loading any weights."""
    config: Any = AutoConfig.from_pretrained(model, **options) if isinstance(model, str) else model.config
    return config.get_text_config()


def load_tokenizer(model: str | PreTrainedModel | PeftModel, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model."""
    config: Any = None if isinstance(model, str) else model.config
    return AutoTokenizer.from_pretrained(model if isinstance(model, str) else config._name_or_path, **options)


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """A causal LM in float32 unless `dtype` says otherwise: optimizer updates of 1e-6 vanish in bfloat16 weights."""
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **options})


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def is_sharded(accelerator: Any) -> bool:
    """Whether forward passes gather weights, so that all processes have to run as many."""
    state = accelerator.state
    zero3 = state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP or zero3
