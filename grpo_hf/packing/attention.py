"""Attention over a token tree, registered with transformers so that no model code is patched.

`model(..., tree=tree)` reaches `tree_attention` as a keyword; without that keyword the function is transformers' own `sdpa`,
so generation and padded batches go on as before under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_hf.packing.cascade import tree_cascade
from grpo_hf.types import TokenTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch head time dim"]

TOKEN_TREE = "token_tree"
"""The name under which a model selects this attention: `model.set_attn_implementation(TOKEN_TREE)`."""

BLOCK = 128
"""Queries and keys of a FlexAttention block."""


@dataclass(frozen=True)
class ScoreRule:
    """What a model asks of its attention scores beyond the tree."""

    scaling: float
    """Factor on q k^T."""
    sliding_window: int | None
    """How many keys back a query may look, itself included; None: all."""
    softcap: float | None
    """c of c tanh(score / c) (Gemma 2, arXiv 2408.00118); None: no cap."""

    def sees_all(self, num_keys: int) -> bool:
        """Whether the window is no limit for this many keys."""
        return self.sliding_window is None or self.sliding_window >= num_keys


def tree_attention(
    module: nn.Module,
    query: Heads,
    key: Float[Tensor, "batch kv_head time dim"],
    value: Float[Tensor, "batch kv_head time dim"],
    attention_mask: Tensor | None,
    *,
    tree: TokenTree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch time head dim"], None]:
    """softmax(q k^T * scaling) v over the tokens that each token follows on in the tree, and itself.

    Everything but ``tree`` is transformers' attention interface. Raises ValueError for attention dropout, which
    would make π_θ another distribution at every forward.
    """
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if tree is None and softcap is None:
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if dropout:
        raise ValueError(f"this attention takes no dropout, got {dropout}: set disable_dropout=True")
    if tree is None:
        out = _one_sequence(query, key, value, attention_mask, rule)
    else:
        out = _implementation(query, value, tree, rule)(query, key, value, tree, rule)
    return rearrange(out, "batch head time dim -> batch time head dim").contiguous(), None


def _implementation(query: Heads, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Callable[..., Heads]:
    """What is fastest of those that can do it."""
    if query.is_cuda:
        return _flex
    plain = rule.softcap is None and rule.sees_all(tree.longest) and query.shape[-1] == value.shape[-1]
    return cascade if plain else by_path


def by_path(query: Heads, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Heads:
    """One attention call a node, whose keys are those of the path to it, as far as the window reaches; for any rule."""
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    paths: list[list[slice]] = []
    parts = []
    for node in tree.nodes:
        own = slice(node.span.start, node.span.stop)
        paths.append([*(paths[node.parent] if node.parent >= 0 else []), own])
        keys, values = (torch.cat([states[:, :, span] for span in paths[-1]], dim=2) for states in (key, value))
        reach = len(node.span) - 1 + (rule.sliding_window or tree.longest)
        parts.append(attend(query[:, :, own], keys[:, :, -reach:], values[:, :, -reach:], rule))
    return torch.cat(parts, dim=2)


def cascade(query: Heads, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Heads:
    """No key is copied and no mask is made, on the CPU; see cascade.py."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return tree_cascade(query.to(dtype), key.to(dtype), value.to(dtype), tree.nodes, rule.scaling)


def attend(query: Heads, key: Heads, value: Heads, rule: ScoreRule, mask: Tensor | None = None) -> Heads:
    """Attention of the last queries of a causal sequence, under ``mask`` [query key] (True: may look) or causal."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None and num_queries == num_keys and rule.softcap is None and rule.sees_all(num_keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling)
    if mask is None:
        mask = causal_mask(num_queries, num_keys, rule.sliding_window, query.device)
    if rule.softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scaling)
    scores = rule.softcap * torch.tanh(query @ key.transpose(-1, -2) * (rule.scaling / rule.softcap))
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def causal_mask(
    num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device
) -> Bool[Tensor, "query key"]:
    """True where a query may look; the last query sees the last key (lower-right alignment)."""
    positions = torch.arange(num_keys, device=device)
    distance = positions[num_keys - num_queries :, None] - positions
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


def _one_sequence(query: Heads, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule) -> Heads:
    """Rows that are no tree, for models with a softcap, which transformers' sdpa would leave out."""
    repeats = query.shape[1] // key.shape[1]
    return attend(query, repeat_kv(key, repeats), repeat_kv(value, repeats), rule, mask)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Heads, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Heads:
    """One FlexAttention call (Dong et al. 2024, arXiv 2412.05496): no key is copied, no score matrix is held."""
    if rule.sliding_window not in tree.block_masks:
        tree.block_masks[rule.sliding_window] = block_mask(tree, rule.sliding_window)

    softcap = rule.softcap or 0.0

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if rule.softcap is None else cap,
        block_mask=tree.block_masks[rule.sliding_window],
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def block_mask(tree: TokenTree, sliding_window: int | None) -> BlockMask:
    """FlexAttention's form of the tree, shared by all layers with the same window; made a row of blocks at a time, so that
    no [time time] mask is held."""

    reach, depth = tree.reach, tree.depth

    def may_look(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k <= q) & (q < reach[k])
        return allowed if sliding_window is None else allowed & (depth[q] - depth[k] < sliding_window)

    length = len(reach)
    places, zero = torch.arange(length, device=reach.device), reach.new_zeros(())
    rows = (may_look(zero, zero, queries[:, None], places) for queries in places.split(BLOCK))
    pairs = torch.stack([pad(row, (0, -length % BLOCK)).unflatten(1, (-1, BLOCK)).sum((0, 2)) for row in rows])
    full = pairs == BLOCK**2
    return BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_look,
        seq_lengths=(length, length),
    )


def _listed(blocks: Bool[Tensor, "row column"]) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their columns, first; as FlexAttention wants them."""
    columns = blocks.argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], columns.int()[None, None]


AttentionInterface.register(TOKEN_TREE, tree_attention)
AttentionMaskInterface.register(TOKEN_TREE, sdpa_mask)
