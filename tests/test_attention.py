"""Shared-prefix attention against a dense mask written down from its definition."""

import pytest
import torch
from einops import repeat
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AutoModelForCausalLM

from grpo_hf.packing import attention
from grpo_hf.packing.attention import SHARED_PREFIX, ScoreRule, block_mask, by_block, shared_prefix_attention
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


def random_heads(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4 query heads on 2 key and value heads, large enough for sharp attention."""
    torch.manual_seed(0)
    return torch.randn(1, 4, length, 8) * 2, torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)


def dense_attention(query, key, value, mask, rule: ScoreRule) -> torch.Tensor:
    key, value = (repeat(x, "batch head time dim -> batch (head group) time dim", group=2) for x in (key, value))
    scores = query @ key.mT * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_by_block_is_dense_attention_under_the_mask(shapes: list, rule: ScoreRule) -> None:
    groups = random_groups(shapes)
    mask = dense_mask(groups, rule.sliding_window)
    heads = random_heads(len(mask))
    torch.testing.assert_close(by_block(*heads, layout_of(groups), rule), dense_attention(*heads, mask, rule))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_flex_mask_is_the_layout_by_definition(shapes: list, window: int | None) -> None:
    expected = dense_mask(random_groups(shapes), window)
    mask = block_mask(layout_of(random_groups(shapes)), window)
    dense = create_mask(mask.mask_mod, None, None, len(expected), len(expected), device="cpu")
    assert torch.equal(dense[0, 0], expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_flex_attention_is_by_block(rule: ScoreRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, since its compiled form is for GPUs: mask, scaling, cap and shared heads are handed over right."""
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    layout = layout_of(random_groups())
    heads = random_heads(len(layout.order))
    torch.testing.assert_close(attention._flex(*heads, layout, rule), by_block(*heads, layout, rule))
    assert list(layout.block_masks) == [rule.sliding_window]  # kept for the next layer


def test_dropout_is_refused() -> None:
    groups = random_groups()
    layout = layout_of(groups)
    heads = random_heads(len(layout.order))
    with pytest.raises(ValueError, match=r"takes no dropout, got 0.1: set disable_dropout=True"):
        shared_prefix_attention(torch.nn.Module(), *heads, None, prefix_layout=layout, dropout=0.1)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
@torch.no_grad()
def test_without_a_layout_it_is_sdpa(family: str) -> None:
    model, batch = tiny_model(family), padded_batch(random_groups())
    logits = {}
    for name in ("sdpa", SHARED_PREFIX):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(logits["sdpa"], logits[SHARED_PREFIX])


@torch.no_grad()
def test_without_a_layout_a_softcap_is_kept() -> None:
    """transformers' own sdpa leaves it out."""
    model, batch = tiny_model("gemma2"), padded_batch(random_groups())
    logits = {}
    for name in ("eager", "sdpa", SHARED_PREFIX):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    real = batch.attention_mask.flatten().bool()  # type: ignore[union-attr]
    torch.testing.assert_close(logits[SHARED_PREFIX][real], logits["eager"][real])
    assert (logits["sdpa"] - logits["eager"])[real].abs().max() > 0.1


def test_a_checkpoint_does_not_need_this_package(tmp_path) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(SHARED_PREFIX)
    model.save_pretrained(tmp_path)
    assert SHARED_PREFIX not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
