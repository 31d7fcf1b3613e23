"""Loading what a run needs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import find_adapter_config_file, logging

logger = logging.get_logger(__name__)


NOT_CAUSAL = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice")
"""How the architectures end that predict no next token."""


def checked_model(model: Any) -> Any:
    """The model, or its name; ValueError for what is no causal LM, or names none, before anything is loaded."""
    if isinstance(model, str | Path):
        model = str(model)
        folder = Path(model).expanduser()
        looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
        if looks_local and not folder.is_dir():
            raise ValueError(f"model={model!r}: there is no such folder; give one with a config.json, or a hub name")
        if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise ValueError(
                f"model={model!r} holds no model: it has no config.json and no adapter_config.json, but {found}"
            )
        if (folder / "config.json").is_file():
            _check_causal(json.loads((folder / "config.json").read_text()), model)
    elif not isinstance(model, PreTrainedModel | PeftModel):
        raise ValueError(
            f"model={model!r:.100} is a {type(model).__name__}; give a causal LM, a PeftModel, a folder or a hub name"
        )
    else:
        _check_causal(model.config.to_dict(), type(causal_lm(model)).__name__)
    return model


def _check_causal(config: dict[str, Any], name: str) -> None:
    kinds = config.get("architectures") or []
    if config.get("is_encoder_decoder") or any(kind.endswith(NOT_CAUSAL) for kind in kinds):
        raise ValueError(
            f"{name} is no causal LM but {', '.join(kinds) or 'an encoder with a decoder'}; give one that "
            "AutoModelForCausalLM loads, which predicts each token from those before it"
        )


def load_config(model: str | PreTrainedModel | PeftModel, **options: Any) -> PretrainedConfig:
    """The text model's config, without loading any weights."""
    if isinstance(model, str):
        model, options = _base_of(model, options)
    config: Any = AutoConfig.from_pretrained(model, **options) if isinstance(model, str) else model.config
    return config.get_text_config()


def load_tokenizer(model: str | PreTrainedModel | PeftModel, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; an adapter's own, if it has one."""
    if not isinstance(model, str):
        model = str(model.config._name_or_path)  # type: ignore[union-attr]
    elif not get_tokenizer_config(model, **options):
        model, options = _base_of(model, options)
    if get_tokenizer_config(model, **options).get("tokenizer_class") == "TokenizersBackend":
        # tokenizer.json as it is: AutoTokenizer would replace how it splits text by what the model's family has
        return PreTrainedTokenizerFast.from_pretrained(model, **options)
    return AutoTokenizer.from_pretrained(model, **options)


def load_model(name: str, **options: Any) -> PreTrainedModel | PeftModel:
    """A causal LM in float32 unless `dtype` says otherwise: optimizer updates of 1e-6 vanish in bfloat16 weights.

    Of an adapter, its base model with the adapter, to go on training it.
    """
    if (dtype := options.pop("torch_dtype", None)) is not None:  # what `dtype` was called
        options.setdefault("dtype", dtype)
    base, of_base = _base_of(name, options)
    model = AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **of_base})
    return model if base == name else PeftModel.from_pretrained(model, name, is_trainable=True, **_place(options))


def load_adapter_config(name: str, **options: Any) -> PeftConfig | None:
    """Of an adapter's folder or repository; None of a model's."""
    path = find_adapter_config_file(name, **_place(options))
    return None if path is None else PeftConfig.from_pretrained(str(Path(path).parent))


def _base_of(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model that an adapter belongs to, and the options to load that; of a model itself what is given."""
    adapter = load_adapter_config(name, **options)
    if adapter is None:
        return name, options
    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"{name} is an adapter, and its adapter_config.json names no base_model_name_or_path; write it there, or give "
            f"the model itself: PeftModel.from_pretrained(base, {name!r}, is_trainable=True)"
        )
    return adapter.base_model_name_or_path, options | {"revision": adapter.revision or "main"}


def _place(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}


def make_savable(lm: PreTrainedModel) -> None:
    """Mend generation defaults that transformers loads but will not save, such as a temperature without do_sample."""
    own = lm.generation_config
    if own is None or _is_savable(own):
        return
    sampled = copy.deepcopy(own)
    sampled.do_sample = True
    ends = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    lm.generation_config = sampled if _is_savable(sampled) else ends
    change = "do_sample=True" if lm.generation_config is sampled else "its token ids alone"
    logger.warning(f"The model's generation_config could not be saved with a checkpoint; it is saved with {change}")


def _is_savable(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def keep_gradients(model: nn.Module) -> None:
    """bitsandbytes packs 4-bit weights in place, at a CPU's first pass without a gradient, for a kernel that has none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_router(config: PretrainedConfig, coefficient: float | None) -> None:
    """Raise ValueError for a coefficient of the load-balancing loss where there are no experts."""
    if coefficient and not hasattr(config, "output_router_logits"):
        raise ValueError(
            f"router_aux_loss_coef={coefficient}, but {config.model_type} is no mixture of experts that returns its "
            "router's logits; leave it out"
        )


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def is_sharded(accelerator: Any) -> bool:
    """Whether forward passes gather weights, so that all processes have to run as many."""
    state = accelerator.state
    zero3 = state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP or zero3
