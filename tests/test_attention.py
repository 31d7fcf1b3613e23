"""Attention over token trees against a dense mask, which is written down twice: from what `reach` means, and from the
sequences that a tree was made of."""

import pytest
import torch
from einops import repeat
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import AutoModelForCausalLM

from grpo_hf.packing import attention, layout
from grpo_hf.packing.attention import (
    BLOCK,
    TOKEN_TREE,
    ScoreRule,
    block_mask,
    by_path,
    cascade,
    tree_attention,
)
from grpo_hf.packing.layout import inputs_of, lay_out, packed_batch, padded_batch
from grpo_hf.packing.tree import token_runs
from grpo_hf.types import TokenTree, TrainingSample
from tests.samples import UNEVEN, random_samples, sample, samples_that_share
from tests.tiny_models import tiny_model

RULES = {
    "plain": ScoreRule(scaling=0.5, sliding_window=None, softcap=None),
    "window": ScoreRule(scaling=0.5, sliding_window=3, softcap=None),
    "window of one": ScoreRule(scaling=0.5, sliding_window=1, softcap=None),
    "softcap": ScoreRule(scaling=0.5, sliding_window=None, softcap=0.7),
    "window and softcap": ScoreRule(scaling=0.5, sliding_window=4, softcap=0.7),
}


def whole(*ids: int) -> TrainingSample:
    return sample(ids, [len(ids) - 1])


TREES = {
    "uneven groups": random_samples(UNEVEN),
    "one group of one": random_samples([(5, [4])]),
    "prompt of one token": random_samples([(1, [3, 2])]),
    "no completion inputs": random_samples([(4, [1, 1]), (2, [1])]),
    "one token": [whole(1, 2)],
    "four levels": [
        whole(1, 2, 3, 4, 5, 6, 7),
        whole(1, 2, 3, 4, 5, 9, 9),
        whole(1, 2, 3, 8, 8),
        whole(1, 6, 6),
        whole(7, 7),
    ],
    "a run that ends in a fork": [whole(1, 2, 3, 0), whole(1, 2, 3, 4, 0), whole(1, 2, 3, 5, 6, 0)],
    **{f"random {seed}": samples_that_share(seed, count=40) for seed in range(4)},
}


@pytest.fixture(autouse=True)
def every_run_is_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short."""
    monkeypatch.setattr(layout, "LEAST_SAVED", 0)


def tree_of(samples: list[TrainingSample]) -> TokenTree:
    tree = packed_batch(samples).tree
    assert tree is not None
    return tree


def dense_mask(samples: list[TrainingSample], window: int | None) -> torch.Tensor:
    """From the sequences: a token sees those before it in its own, and itself, ``window`` tokens back."""
    sequences = [inputs_of(item) for item in samples]
    nodes, places = lay_out(token_runs(sequences))
    mask = torch.zeros(nodes[-1].span.stop, nodes[-1].span.stop, dtype=torch.bool)
    for number, sequence in enumerate(sequences):
        at = places[number][: len(sequence)]
        assert packed_batch(samples).input_ids[0, at].tolist() == list(sequence)
        for place, token in enumerate(at):
            seen = at[: place + 1]
            mask[token, seen if window is None else seen[-window:]] = True
    return mask


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("samples", TREES.values(), ids=TREES)
def test_reach_says_who_sees_whom(samples: list[TrainingSample], window: int | None) -> None:
    """k <= q < reach[k], and with a window depth[q] - depth[k] < window: the mask of the sequences."""
    tree = tree_of(samples)
    q, k = torch.meshgrid(*[torch.arange(len(tree.reach))] * 2, indexing="ij")
    by_definition = (k <= q) & (q < tree.reach[k])
    if window is not None:
        by_definition &= tree.depth[q] - tree.depth[k] < window
    assert torch.equal(by_definition, dense_mask(samples, window))


def test_the_trees_have_several_levels() -> None:
    def levels(tree: TokenTree) -> int:
        depth: list[int] = []
        for node in tree.nodes:
            depth.append(1 + (depth[node.parent] if node.parent >= 0 else 0))
        return max(depth)

    assert levels(tree_of(TREES["four levels"])) == 4
    assert max(levels(tree_of(samples)) for name, samples in TREES.items() if name.startswith("random")) >= 4


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


def assert_dense_attention(function, samples: list[TrainingSample], rule: ScoreRule, **options) -> None:
    """In its values, and in the gradients of a random mixture of them, up to the rounding of float32."""
    mask = dense_mask(samples, rule.sliding_window)

    def results(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        heads = [states.to(dtype).requires_grad_() for states in random_heads(len(mask), **options)]
        out = attend(*heads)
        mixture = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out, *torch.autograd.grad((mixture * out).sum(), heads)]

    found = results(lambda *heads: function(*heads, tree_of(samples), rule), torch.float32)
    expected = results(lambda *heads: dense_attention(*heads, mask, rule), torch.float64)
    scale = max(item.norm() for item in expected)  # a single key leaves queries a gradient of 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-6 * scale


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("samples", TREES.values(), ids=TREES)
def test_by_path_is_dense_attention_under_the_mask(samples: list[TrainingSample], rule: ScoreRule) -> None:
    assert_dense_attention(by_path, samples, rule)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("samples", TREES.values(), ids=TREES)
def test_cascade_is_dense_attention_under_the_mask(samples: list[TrainingSample], kv_heads: int) -> None:
    assert_dense_attention(cascade, samples, RULES["plain"], kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("window", "softcap", "chosen"), [(None, None, cascade), (20, None, cascade), (19, None, by_path), (None, 5.0, by_path)]
)
def test_what_cascade_cannot_do_is_done_by_path(window: int | None, softcap: float | None, chosen) -> None:
    tree = tree_of(random_samples([(12, [9, 3]), (15, [2])]))
    assert tree.longest == 12 + 8  # the last token of a completion is no input
    query, _, value = random_heads(len(tree.reach))
    assert attention._implementation(query, value, tree, ScoreRule(0.5, window, softcap)) is chosen
    assert attention._implementation(query, value[..., :4], tree, RULES["plain"]) is by_path, "values of another size"


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("samples", TREES.values(), ids=TREES)
def test_the_flex_mask_is_the_tree_by_definition(samples: list[TrainingSample], window: int | None) -> None:
    expected = dense_mask(samples, window)
    mask = block_mask(tree_of(samples), window)
    dense = create_mask(mask.mask_mod, None, None, len(expected), len(expected), device="cpu")
    assert torch.equal(dense[0, 0], expected)


@pytest.mark.parametrize("window", [None, 300])
def test_the_flex_blocks_are_those_of_the_whole_mask(window: int | None) -> None:
    """Kept full, kept in part and left out, as torch makes them from the [time time] mask; the last block is not whole."""
    system, question = torch.arange(900).split(500)
    long = [whole(*system.tolist(), *question.tolist(), *[number] * length) for number, length in ((1, 150), (2, 300))]
    tree = tree_of([*long, whole(*system.tolist(), *[3] * 40), *random_samples([(20, [7, 9]), (130, [260])])])
    length = len(tree.reach)
    mask = block_mask(tree, window)
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    assert length % BLOCK and mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        count, listed = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        assert torch.equal(count, getattr(expected, f"{name}_num_blocks"))
        assert count.any() and torch.equal(listed, getattr(expected, f"{name}_indices"))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("samples", [TREES["uneven groups"], TREES["four levels"]], ids=["uneven groups", "four levels"])
@torch.no_grad()
def test_flex_attention_is_by_path(samples: list[TrainingSample], rule: ScoreRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, since its compiled form is for GPUs: mask, scaling, cap and shared heads are handed over right."""
    given: list[dict[str, object]] = []
    monkeypatch.setattr(
        attention, "_compiled_flex_attention", lambda: lambda *a, **k: given.append(k) or flex_attention(*a, **k)
    )
    tree = tree_of(samples)
    heads = random_heads(len(tree.reach))
    torch.testing.assert_close(attention._flex(*heads, tree, rule), by_path(*heads, tree, rule))
    assert list(tree.block_masks) == [rule.sliding_window]  # kept for the next layer
    assert given[0]["kernel_options"] == {"BACKEND": "TRITON"}, (
        "a GPU has no decoding kernel for a tree of less than 128 tokens"
    )


def test_dropout_is_refused() -> None:
    tree = tree_of(TREES["uneven groups"])
    heads = random_heads(len(tree.reach))
    with pytest.raises(ValueError, match=r"takes no dropout, got 0.1: set disable_dropout=True"):
        tree_attention(torch.nn.Module(), *heads, None, tree=tree, dropout=0.1)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
@torch.no_grad()
def test_without_a_tree_it_is_sdpa(family: str) -> None:
    model, batch = tiny_model(family), padded_batch(random_samples())
    logits = {}
    for name in ("sdpa", TOKEN_TREE):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(logits["sdpa"], logits[TOKEN_TREE])


@torch.no_grad()
def test_without_a_tree_a_softcap_is_kept() -> None:
    """transformers' own sdpa leaves it out."""
    model, batch = tiny_model("gemma2"), padded_batch(random_samples())
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
