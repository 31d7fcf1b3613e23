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

from grpo_hf.types import TokenTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch head time dim"]
    Part = tuple[slice, slice, bool]

TOKEN_TREE = "token_tree"
"""The name under which a model selects this attention: `model.set_attn_implementation(TOKEN_TREE)`."""

BLOCK = 128
"""Queries and keys of a FlexAttention block."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
        out = attend(query, key, value, rule, attention_mask)  # transformers' sdpa would leave a softcap out
    else:
        out = _implementation(query, value, tree, rule)(query, key, value, tree, rule)
    return rearrange(out, "batch head time dim -> batch time head dim").contiguous(), None


def _implementation(query: Heads, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Callable[..., Heads]:
    """What is fastest of those that can do it."""
    plain = rule.softcap is None and rule.sees_all(tree.longest) and query.shape[-1] == value.shape[-1]
    return _flex if query.is_cuda else cascade if plain else by_path


def by_path(query: Heads, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Heads:
    """One attention call a node, whose keys are those of the path to it, as far as the window reaches; for any rule."""
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    paths: list[list[slice]] = []
    parts = []
    for node in tree.nodes:
        own = slice(node.span.start, node.span.stop)
        paths.append([*(paths[node.parent] if node.parent >= 0 else []), own])
        keys, values = (torch.cat([states[:, :, span] for span in paths[-1]], dim=2) for states in (key, value))
        reach = len(node.span) - 1 + (rule.sliding_window or tree.longest)
        parts.append(attend(query[:, :, own], keys[:, :, -reach:], values[:, :, -reach:], rule))
    return torch.cat(parts, dim=2)


def attend(query: Heads, key: Tensor, value: Tensor, rule: ScoreRule, mask: Tensor | None = None) -> Heads:
    """Attention of the last queries of a causal sequence, under ``mask`` [query key] (True: may look) or causal."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    if mask is None and num_queries == num_keys and rule.softcap is None and rule.sees_all(num_keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling)
    if mask is None:
        positions = torch.arange(num_keys, device=query.device)
        distance = positions[num_keys - num_queries :, None] - positions  # the last query sees the last key
        mask = (distance >= 0) & (distance < (rule.sliding_window or num_keys))
    if rule.softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scaling)
    scores = rule.softcap * torch.tanh(query @ key.transpose(-1, -2) * (rule.scaling / rule.softcap))
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def cascade(query: Heads, key: Tensor, value: Tensor, tree: TokenTree, rule: ScoreRule) -> Heads:
    """On the CPU: each run attends to itself causally; then everything below a run, which lies behind it in one piece,
    attends to it in one call. No key is copied, and no mask is made."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    runs = [slice(node.span.start, node.span.stop) for node in tree.nodes]
    parts = [(own, own, True) for own in runs]
    parts += [
        (slice(own.stop, node.end), own, False) for own, node in zip(runs, tree.nodes, strict=True) if node.end > own.stop
    ]
    return _Cascade.apply(query.to(dtype), key.to(dtype), value.to(dtype), parts, rule.scaling)


class _Cascade(torch.autograd.Function):
    """Attention in parts (queries, keys, whether causal) that are put together (Hydragen, one level: Juravsky et al. 2024,
    arXiv 2402.05099; here of any depth). With a token's keys split into sets s, Z_s = Σ_{k in s} exp(q·k) and o_s the
    attention over s alone:

        log Z = logsumexp_s(log Z_s)        o = Σ_s exp(log Z_s - log Z) o_s

    The gradient of each part is flash attention's own, given the whole's o and log Z in place of the part's (FlashAttention;
    Dao et al. 2022, arXiv 2205.14135: dq, dk and dv need nothing else of the other keys). States are [kv_head, head of it,
    time, dim]; keys and values are shared by the heads of a kv_head without a copy.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scaling: float) -> Tensor:
        q, k, v = _by_kv_head(query, key, value)
        out = torch.empty_like(q.permute(2, 0, 1, 3), memory_format=torch.contiguous_format).permute(1, 2, 0, 3)
        log_z = q.new_empty(q.shape[:3], dtype=torch.float32)
        for queries, keys, causal in parts:
            o, log_z_seen = _forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scaling)
            if causal:  # the own run, which comes first
                out[:, :, queries], log_z[:, :, queries] = o, log_z_seen
                continue
            whole = torch.logaddexp(log_z[:, :, queries], log_z_seen)
            out[:, :, queries] *= (log_z[:, :, queries] - whole).exp_().unsqueeze(-1)
            out[:, :, queries] += o * (log_z_seen - whole).exp_().unsqueeze(-1)
            log_z[:, :, queries] = whole
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.parts, ctx.scaling = parts, scaling
        return rearrange(out, "kv rep time dim -> 1 (kv rep) time dim")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_z = ctx.saved_tensors
        q, k, v = _by_kv_head(query, key, value)
        grads = [torch.empty_like(states) for states in (query, key, value)]
        grad, to_q = (rearrange(x, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1]) for x in (grad, grads[0]))
        to_k, to_v = grads[1][0], grads[2][0]
        for queries, keys, causal in ctx.parts:
            states = (grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries])
            of_q, of_k, of_v = _backward(*states, log_z[:, :, queries], 0.0, causal, scale=ctx.scaling)
            if causal:
                to_q[:, :, queries], to_k[:, keys], to_v[:, keys] = of_q, of_k.sum(1), of_v.sum(1)
            else:
                to_q[:, :, queries] += of_q
                to_k[:, keys] += of_k.sum(1)
                to_v[:, keys] += of_v.sum(1)
        return *grads, None, None


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = rearrange(query, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1])
    k, v = (rearrange(states, "1 kv time dim -> kv 1 time dim").expand(-1, q.shape[1], -1, -1) for states in (key, value))
    return q, k, v


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
        kernel_options={"BACKEND": "TRITON"},  # else fewer than 128 queries go to a kernel for decoding, which fails on them
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
