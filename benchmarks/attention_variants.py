"""Ways to attend over a token tree, under names that a model can be switched to, and where each of them runs.

`by_path`, `cascade` and `flex` are grpo_hf's own; `varlen` is one call of flash attention over gathered keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from grpo_hf.packing import attention
from grpo_hf.packing.attention import TOKEN_TREE, ScoreRule
from grpo_hf.types import TokenTree

Attend = Callable[[Tensor, Tensor, Tensor, TokenTree, ScoreRule], Tensor]


def varlen(query: Tensor, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Tensor:
    """torch.nn.attention.varlen: each node is a sequence, whose keys are those of the path to it and its own."""
    from torch.nn.attention.varlen import varlen_attn

    if rule.softcap is not None:
        raise ValueError(f"varlen_attn has no softcap, got {rule.softcap}")
    if "varlen" not in tree.block_masks:
        tree.block_masks["varlen"] = _sequences(tree)  # type: ignore[index]
    keys, *sizes = tree.block_masks["varlen"]  # type: ignore[index]
    takes = inspect.signature(varlen_attn).parameters  # they differ between torch 2.11 and 2.13
    options: dict[str, Any] = {"scale": rule.scaling} if "scale" in takes else {}
    if "window_size" in takes:
        options["window_size"] = (-1 if rule.sliding_window is None else rule.sliding_window - 1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in takes:
        options["enable_gqa"] = True
    else:
        key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (rearrange(s.to(dtype), "1 head time dim -> time head dim") for s in (query, key, value))
    out = varlen_attn(query, key[keys], value[keys], *sizes, **options)
    return rearrange(out, "time head dim -> 1 head time dim")


def _sequences(tree: TokenTree) -> tuple[Any, ...]:
    """Where the keys of all nodes' paths lie, one path after another, and where the nodes' queries and keys end."""
    keys: list[list[int]] = []
    for node in tree.nodes:
        keys.append([*(keys[node.parent] if node.parent >= 0 else []), *node.span])
    queries = [node.span for node in tree.nodes]

    def ends(parts: Sequence[Any]) -> Tensor:
        return torch.tensor([0, *map(len, parts)]).cumsum(0).to(tree.reach.device, torch.int32)

    places = torch.tensor([place for part in keys for place in part], device=tree.reach.device)
    return places, ends(queries), ends(keys), max(map(len, queries)), max(map(len, keys))


VARIANTS: dict[str, Attend] = {
    "by_path": attention.by_path,
    "cascade": attention.cascade,
    "flex": lambda *args: attention._flex(*args),
    "varlen": varlen,
}


def why_not(variant: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason why a variant cannot train there; None where it can."""
    if variant == "flex" and device == "cpu":
        return "FlexAttention has no backward pass on the CPU"
    if variant == "cascade" and device != "cpu":
        return "cascade is made of flash attention's parts for the CPU"
    if variant == "varlen" and find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if variant == "varlen" and device == "cpu":
        return "varlen_attn is flash attention, on CUDA only"
    if variant == "varlen" and dtype == torch.float32:
        return "varlen_attn takes float16 and bfloat16 only"
    return None


def register() -> Sequence[str]:
    """Let models select `bench_<variant>`; returns the names, after the attention that training itself uses."""
    for name, attend in VARIANTS.items():
        AttentionInterface.register(f"bench_{name}", _as_interface(attend))
        AttentionMaskInterface.register(f"bench_{name}", sdpa_mask)
    return TOKEN_TREE, *(f"bench_{name}" for name in VARIANTS)


def _as_interface(attend: Attend) -> Callable[..., tuple[Tensor, None]]:
    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        tree: TokenTree,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        rule = ScoreRule(kwargs["scaling"], kwargs.get("sliding_window"), kwargs.get("softcap"))
        out = attend(query, key, value, tree, rule)
        return rearrange(out, "batch head time dim -> batch time head dim").contiguous(), None

    return run
