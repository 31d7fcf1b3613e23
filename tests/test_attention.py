"""Shared-prefix attention against a dense mask written down from its definition."""

import pytest
import torch
from einops import repeat
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import AutoModelForCausalLM

from grpo_hf.packing import attention
from grpo_hf.packing.attention import (
    BLOCK,
    TOKEN_TREE,
    ScoreRule,
    block_mask,
    by_span,
    cascade,
    shared_prefix_attention,
)
from grpo_hf.packing.layout import packed_batch, padded_batch
from grpo_hf.types import Group, PrefixLayout
from tests.tiny import UNEVEN, random_groups, tiny_model

RULES = {
    "plain": ScoreRule(scaling=0.5, sliding_window=None, softcap=None),
    "window": ScoreRule(scaling=0.5, sliding_window=3, softcap=None),
    "window of one": ScoreRule(scaling=0.5, sliding_window=1, softcap=None),
    "softcap": ScoreRule(scaling=0.5, sliding_window=None, softcap=0.7),
    "window and softcap": ScoreRule(scaling=0.5, sliding_window=4, softcap=0.7),
}
SHAPES = {
    "uneven": UNEVEN,
    "one group of one": [(5, [4])],
    "prompt of one token": [(1, [3, 2])],
    "no completion inputs": [(4, [1, 1]), (2, [1])],
}


def dense_mask(groups: list[Group], window: int | None) -> torch.Tensor:
    """The definition: a token sees its own sequence (prompt, then its completion) up to itself, ``window`` tokens back."""
    sequences, end = [], 0
    for group in groups:
        prompt = range(end, end + len(group.prompt.ids))
        sequences.append([*prompt])
        end = prompt.stop
        for completion in group.completions:
            own = range(end, end + len(completion.ids) - 1)
            sequences.append([*prompt, *own])
            end = own.stop
    mask = torch.zeros(end, end, dtype=torch.bool)
    for sequence in sequences:
        for place, token in enumerate(sequence):
            seen = sequence[: place + 1]
            mask[token, seen if window is None else seen[-window:]] = True
    return mask


def layout_of(groups: list[Group]) -> PrefixLayout:
    layout = packed_batch(groups).prefix_layout
    assert layout is not None
    return layout


def random_heads(length: int, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4 query heads on fewer key and value heads, large enough for sharp attention, and laid out as models have them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, heads, 8).transpose(1, 2) for heads in (4, kv_heads, kv_heads))
    return query * 2, key, value


def dense_attention(query, key, value, mask, rule: ScoreRule) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "batch head time dim -> batch (head group) time dim", group=group) for x in (key, value))
    scores = query @ key.mT * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def assert_dense_attention(function, groups: list[Group], rule: ScoreRule, **options) -> None:
    """In its values, and in the gradients of a random mixture of them."""
    mask = dense_mask(groups, rule.sliding_window)
    found, expected = [], []
    for results, attend in (
        (found, lambda *heads: function(*heads, layout_of(groups), rule)),
        (expected, lambda *heads: dense_attention(*heads, mask, rule)),
    ):
        heads = [states.requires_grad_() for states in random_heads(len(mask), **options)]
        out = attend(*heads)
        mixture = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results += [out, *torch.autograd.grad((mixture * out).sum(), heads)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_by_span_is_dense_attention_under_the_mask(shapes: list, rule: ScoreRule) -> None:
    assert_dense_attention(by_span, random_groups(shapes), rule)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_cascade_is_dense_attention_under_the_mask(shapes: list, kv_heads: int) -> None:
    assert_dense_attention(cascade, random_groups(shapes), RULES["plain"], kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("window", "softcap", "chosen"), [(None, None, cascade), (20, None, cascade), (19, None, by_span), (None, 5.0, by_span)]
)
def test_what_cascade_cannot_do_is_done_by_span(window: int | None, softcap: float | None, chosen) -> None:
    layout = layout_of(random_groups([(12, [9, 3]), (15, [2])]))
    assert layout.longest == 12 + 8  # the last token of a completion is no input
    query, _, value = random_heads(len(layout.prompt_of))
    assert attention._implementation(query, value, layout, ScoreRule(0.5, window, softcap)) is chosen


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_flex_mask_is_the_layout_by_definition(shapes: list, window: int | None) -> None:
    expected = dense_mask(random_groups(shapes), window)
    mask = block_mask(layout_of(random_groups(shapes)), window)
    dense = create_mask(mask.mask_mod, None, None, len(expected), len(expected), device="cpu")
    assert torch.equal(dense[0, 0], expected)


@pytest.mark.parametrize("window", [None, 300])
def test_the_flex_blocks_are_those_of_the_whole_mask(window: int | None) -> None:
    """Kept full, kept in part and left out, as torch makes them from the [time time] mask; the last block is not whole."""
    layout = layout_of(random_groups([(400, [150, 300]), (20, [7, 9]), (130, [260])]))
    length = len(layout.prompt_of)
    mask = block_mask(layout, window)
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    assert length % BLOCK and mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        count, listed = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        assert torch.equal(count, getattr(expected, f"{name}_num_blocks"))
        assert count.any() and torch.equal(listed, getattr(expected, f"{name}_indices"))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_flex_attention_is_by_span(rule: ScoreRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, since its compiled form is for GPUs: mask, scaling, cap and shared heads are handed over right."""
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    layout = layout_of(random_groups())
    heads = random_heads(len(layout.prompt_of))
    torch.testing.assert_close(attention._flex(*heads, layout, rule), by_span(*heads, layout, rule))
    assert list(layout.block_masks) == [rule.sliding_window]  # kept for the next layer


def test_dropout_is_refused() -> None:
    groups = random_groups()
    layout = layout_of(groups)
    heads = random_heads(len(layout.prompt_of))
    with pytest.raises(ValueError, match=r"takes no dropout, got 0.1: set disable_dropout=True"):
        shared_prefix_attention(torch.nn.Module(), *heads, None, prefix_layout=layout, dropout=0.1)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
@torch.no_grad()
def test_without_a_layout_it_is_sdpa(family: str) -> None:
    model, batch = tiny_model(family), padded_batch(random_groups())
    logits = {}
    for name in ("sdpa", TOKEN_TREE):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(logits["sdpa"], logits[TOKEN_TREE])


@torch.no_grad()
def test_without_a_layout_a_softcap_is_kept() -> None:
    """transformers' own sdpa leaves it out."""
    model, batch = tiny_model("gemma2"), padded_batch(random_groups())
    logits = {}
    for name in ("eager", "sdpa", TOKEN_TREE):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    real = batch.attention_mask.flatten().bool()  # type: ignore[union-attr]
    torch.testing.assert_close(logits[TOKEN_TREE][real], logits["eager"][real])
    assert (logits["sdpa"] - logits["eager"])[real].abs().max() > 0.1


def test_a_checkpoint_does_not_need_this_package(tmp_path) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(TOKEN_TREE)
    model.save_pretrained(tmp_path)
    assert TOKEN_TREE not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
