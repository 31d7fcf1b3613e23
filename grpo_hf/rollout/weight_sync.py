"""The one place where weights go from the trainer to an engine: which tensors, under which names, and of which version.

An engine holds a plain causal LM. Under LoRA it gets W + s B A for each adapted layer, made out of place, one tensor at a
time: the trainer's own W never changes, so nothing drifts however often weights are sent. Or it gets W once, or brings it
itself where it is quantized, and then the adapter alone. Weights that FSDP2 or ZeRO-3 have cut up are put together one
tensor at a time, by all processes at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

Stamp = tuple[int, int]
"""Finished updates, and how often torch has seen the trained tensors written to, which also tells two runs of one trainer
apart, whose updates are both counted from 0, and weights that were loaded by hand."""

LORA_SYNCS = ("merge", "adapter")
"""What travels under LoRA: the touched weights, merged, or the adapter."""


class StaleEngineError(RuntimeError):
    """An engine was asked to sample from weights that are not the trainer's current ones."""


@dataclass
class WeightSync:
    """Brings one engine to the trainer's current weights, and says whether it is there."""

    model: nn.Module
    """The trainer's causal LM, or the PEFT model around it."""
    dtype: torch.dtype
    """What the engine computes in."""
    lora_sync: str = "merge"
    """One of LORA_SYNCS; without an adapter it means nothing."""
    held: Stamp | None = None
    """The weights that the engine holds; None before the first sync."""

    def __post_init__(self) -> None:
        self.adapter_only = self.lora_sync == "adapter" and isinstance(self.model, PeftModel)
        self.base_stays = is_quantized(self.model)
        check_adapter(self.model, adapter_only=self.adapter_only)

    @property
    def sharded(self) -> bool:
        """Whether the weights are cut up, which is done when training begins."""
        return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.model.parameters())

    def stamp(self, version: int) -> Stamp:
        """Of the trainer's weights as they are now, after ``version`` updates."""
        return version, sum(parameter._version for parameter in self.model.parameters() if parameter.requires_grad)

    def run(
        self, version: int, load: Callable[[EngineWeights], None], load_adapter: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Give the engine what it lacks of the weights after ``version`` updates, through ``load`` and ``load_adapter``."""
        stamp = self.stamp(version)
        if self.held == stamp:
            return
        everything, self.held = self.held is None, None  # None while a sync may be half done
        if (everything and not self.base_stays) or not self.adapter_only:
            load(EngineWeights(self.model, self.dtype, everything=everything, merged=not self.adapter_only))
        if self.adapter_only:
            try:
                load_adapter(adapter_weights(self.model))
            except ValueError as error:
                hint = "" if self.base_stays else ", use vllm_lora_sync='merge'"
                raise ValueError(f"vLLM does not take this adapter{hint}: {error}") from error
        self.held = stamp

    def forget(self) -> None:
        """The engine has lost its weights."""
        self.held = None

    def check(self) -> None:
        """Raise StaleEngineError unless the engine holds the trainer's weights."""
        if self.held is None or self.held != self.stamp(self.held[0]):
            holds = "none" if self.held is None else f"those after update {self.held[0]}"
            raise StaleEngineError(f"the engine holds other weights than the trainer ({holds}); call sync_weights() first")


class EngineWeights:
    """(name, tensor) of the causal LM as a checkpoint has it, adapters merged: everything, or what training can change.

    A tensor is made when iteration comes to it. An engine fuses layers, q, k and v say, and loads a fused layer whole or
    not at all. So with one trained tensor its neighbours under the same parent module travel too. Where transformers
    itself holds weights in another form than checkpoints do, such as all experts in one tensor, each such parent's are
    made together.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, everything: bool, merged: bool = True):
        lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        pieces = list(_pieces(model))
        changed = {_fused_with(piece.name) for piece in pieces if piece.trained}
        wanted = [piece for piece in pieces if everything or _fused_with(piece.name) in changed]
        self.dtype, self._merged = dtype, merged
        self._as_saved: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
        self._groups = [[piece] for piece in wanted]
        if get_model_conversion_mapping(lm, add_legacy=False):
            self._as_saved = partial(revert_weight_conversion, lm)
            self._groups = [list(group) for _, group in groupby(wanted, lambda piece: _fused_with(piece.name))]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._groups:
            yield from self._as_saved({piece.name: piece.value(self.dtype, merged=self._merged) for piece in group}).items()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors, by name."""
        empty = [{piece.name: torch.empty(piece.shape, device="meta") for piece in group} for group in self._groups]
        return {name: tuple(tensor.shape) for group in empty for name, tensor in self._as_saved(group).items()}


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The active adapter's tensors under PEFT's names, copied: an engine may scale in place what it is handed."""
    with _whole(parameter for parameter in model.parameters() if parameter.requires_grad):
        weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        return {name: _full(value).clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter as PEFT does, but for how it was initialized, which engines refuse to hear of."""
    config = copy.copy(model.peft_config[model.active_adapter])
    config.init_lora_weights = True
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")


@dataclass
class _Piece:
    name: str
    parameter: nn.Parameter
    adapter: Any

    @property
    def trained(self) -> bool:
        return self.adapter is not None or self.parameter.requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    @torch.no_grad()
    def value(self, dtype: torch.dtype, *, merged: bool) -> Tensor:
        if self.adapter is None or not merged or not self.adapter.active_adapters:
            with _whole([self.parameter]):
                return _full(self.parameter).to(dtype, copy=hasattr(self.parameter, "ds_id"))
        with _whole(self.adapter.parameters()):
            delta = _full(self.adapter.get_delta_weight(self.adapter.active_adapters[0]))
            return (_full(self.parameter).float() + delta.float()).to(dtype)


def _pieces(model: nn.Module) -> Iterator[_Piece]:
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in lm.named_parameters():
        owner, _, inside = name.partition(".base_layer.")
        if inside:
            yield _Piece(f"{owner}.{inside}", parameter, adapters[owner] if inside == "weight" else None)
        elif not any(path in adapters for path in accumulate(name.split("."), "{}.{}".format)):  # nothing around it is one
            yield _Piece(name, parameter, None)


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has cut up."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def _whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put parameters that ZeRO-3 has cut up together for a while."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut):
        yield


def _fused_with(name: str) -> str:
    """The module that holds the layer: what an engine fuses is always inside one; experts are fused with each other."""
    return name.partition(".experts.")[0] if ".experts." in name else ".".join(name.split(".")[:-2])


NOT_MERGED = {
    "use_dora": "its magnitude is no sum of W and B A; set use_dora=False",
    "modules_to_save": "only adapters are merged; put those layers into target_modules",
    "target_parameters": "only adapters of whole layers are merged; use target_modules",
    "trainable_token_indices": "only adapters are merged; put the embeddings into target_modules",
    "lora_bias": "biases are not merged; set lora_bias=False",
}
"""Settings of LoraConfig that an engine cannot be given by merging, and why."""


def is_quantized(model: nn.Module) -> bool:
    """Whether the causal LM's weights are held in a form that no engine can be sent: it has to bring them itself."""
    return bool(getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False))


def check_adapter(model: nn.Module, *, adapter_only: bool = False) -> None:
    """Raise ValueError for an adapter, or a base model, whose weights could not be sent."""
    if is_quantized(model) and not adapter_only:
        raise ValueError(
            "weights of a quantized model cannot be sent to vLLM. A LoRA adapter can, to a server that was started with the "
            "same base model: set vllm_lora_sync='adapter' and vllm_mode='server'. Or load it unquantized, or set "
            "use_vllm=False"
        )
    if not isinstance(model, PeftModel):
        return
    config = model.peft_config[model.active_adapter]
    if not isinstance(config, LoraConfig) or len(model.active_adapters) != 1:
        kind = f"{type(config).__name__}, {len(model.active_adapters)} adapters active"
        raise ValueError(f"vLLM gets the weights of one LoRA adapter, not of {kind}; use one LoraConfig, or use_vllm=False")
    for name, why in NOT_MERGED.items():
        if getattr(config, name, None):
            raise ValueError(
                f"vLLM cannot sample with LoraConfig({name}={getattr(config, name)!r}): {why}, or use_vllm=False"
            )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if variants := {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()}:
        raise ValueError(
            f"vLLM gets W + s B A of a LoRA, or B and A, which is not what {', '.join(sorted(variants))} computes; use a "
            "plain LoraConfig, or set use_vllm=False"
        )
    if config.bias != "none":
        raise ValueError(f"vLLM cannot sample with LoraConfig(bias={config.bias!r}): set bias='none', or use_vllm=False")
    if adapter_only and (moving := [piece.name for piece in _pieces(model) if piece.parameter.requires_grad]):
        raise ValueError(
            f"vllm_lora_sync='adapter' sends the adapter alone, but {len(moving)} weights of the model itself are trained "
            f"too ({', '.join(moving[:3])}); freeze them, or set vllm_lora_sync='merge'"
        )
    _check_tied(model.get_base_model())


def _check_tied(lm: Any) -> None:
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if lm.config.get_text_config().tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        raise ValueError(
            "the adapter is on the embeddings or the head, which this model ties together and vLLM keeps as one; leave "
            "embed_tokens and lm_head out of target_modules, or set use_vllm=False"
        )
