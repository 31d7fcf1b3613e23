"""The benchmarks on tiny shapes: the one for a GPU, also without most of what training needs, and sides that take turns."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu, nodes, tokens, training_step
from benchmarks.attention_variants import VARIANTS, _sequences, why_not
from benchmarks.cases import Case, make_data, make_model
from benchmarks.side_by_side import compare_gradients, measure
from benchmarks.sides import NEEDS, gradient_file, is_installed, liger, plain, trl_async_tree
from grpo_hf.packing.attention import ScoreRule, attend, by_path
from grpo_hf.packing.layout import packed_batch
from grpo_hf.rollout.planning import numbered_samples
from tests.tiny import random_groups

ROOT = Path(__file__).parents[1]
TINY = ["--size", "tiny", "tiny-LoRA", "--device", "cpu", "--repeats", "1"]

# What the benchmark needs, with what transformers and accelerate need of ours.
NEEDED = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "einops",
    "numpy",
    "packaging",
    "psutil",
    "pyyaml",
    "httpx",
}

WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv[1:] = {arguments}
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def test_it_runs_without_what_only_training_needs(tmp_path: Path) -> None:
    """On a machine that has not installed this project: neither its data and verifier libraries, nor vLLM or TRL."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {Requirement(text).name for text in project["dependencies"]} - NEEDED
    hidden = {name.replace("-", "_") for name in ours} | {"vllm", "trl", "pandas"}
    assert {"datasets", "pyarrow", "matplotlib", "math_verify"} <= hidden
    out = tmp_path / "gpu.json"
    script = WITHOUT.format(hidden=hidden, arguments=[*TINY, "--out", str(out)])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = re.findall(r"(\S+, \S+, float32) +error (\S+) .* passed 1", done.stdout)
    assert [name for name, _ in errors] == [
        "padded, sdpa, float32",
        "packed, token_tree, float32",
        "packed, by_path, float32",
        "packed, cascade, float32",
    ]
    assert all(0 < float(error) < 1e-5 for _, error in errors)
    for reason in ("FlexAttention has no backward pass on the CPU", "varlen_attn is flash attention, on CUDA only"):
        assert f"skipped: {reason}" in done.stdout
    for row in ("packed", "packed, checkpointing", "padded", "padded, checkpointing"):
        found = re.findall(rf"^  {row} +forward_backward_s .* mfu ", done.stdout, re.MULTILINE)
        assert len(found) == 2, "all weights, and LoRA"
    assert "failed" not in done.stdout
    assert not out.exists(), "results are of GPUs"


def test_a_wrong_attention_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is measured then."""

    def looks_away(query, key, value, tree, rule):
        return by_path(query, key, value, tree, ScoreRule(1.001 * rule.scaling, 1, None))

    def raises(*args):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(VARIANTS, "by_path", looks_away)
    monkeypatch.setitem(VARIANTS, "another", raises)
    assert gpu.main(TINY) == 1
    shown = capsys.readouterr()
    assert re.search(r"FAILED gradients / packed, by_path, float32: relative error \S+, more than 0.0001", shown.err)
    assert "FAILED gradients / packed, another, float32: RuntimeError: no kernel\n" in shown.err
    assert "updates" not in shown.out


@pytest.mark.parametrize(("layout", "whole_group"), [("packed", True), ("packed", False), ("padded", True)])
def test_the_longest_completion_is_looked_for_up_to_a_limit(layout: str, whole_group: bool) -> None:
    """A machine without a GPU has no end that could be met safely."""
    size = gpu.SIZES["tiny-LoRA"]
    model = gpu.make_model(size, "cpu")
    assert gpu.longest_completion(model, size, layout, "cpu", whole_group=whole_group, longest=512) == {"at_least": 512}


def test_cuda_is_needed_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA GPU; on a CPU: --device cpu --size tiny" in capsys.readouterr().err


def test_varlen_sequences_are_the_tree() -> None:
    """Attention over each node's gathered keys is by_path."""
    tree = packed_batch([sample for (sample,) in numbered_samples(random_groups(), version=0)]).tree
    assert tree is not None
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, len(tree.reach), 8) for _ in range(3))
    rule = ScoreRule(0.5, None, None)
    keys, cu_queries, cu_keys, max_queries, max_keys = _sequences(tree)
    parts = []
    for number in range(len(cu_queries) - 1):
        q, k = slice(*cu_queries[number : number + 2]), keys[cu_keys[number] : cu_keys[number + 1]]
        assert q.stop - q.start <= max_queries and len(k) <= max_keys
        parts.append(attend(query[:, :, q], key[:, :, k], value[:, :, k], rule))
    torch.testing.assert_close(torch.cat(parts, dim=2), by_path(query, key, value, tree, rule))


def test_a_variant_runs_or_says_why_not() -> None:
    assert {name for name in VARIANTS if why_not(name, "cuda", torch.bfloat16) is None} == set(VARIANTS) - {"cascade"}
    assert why_not("varlen", "cuda", torch.float32) == "varlen_attn takes float16 and bfloat16 only"
    assert why_not("by_path", "cpu", torch.float32) is None


TINY_CASE = Case(12, 8, groups=2, group_size=4, rows=4, flat=1, vocabulary=300, hidden=64, layers=1)


def test_sides_take_the_same_step_on_the_completions_that_they_are_given(tmp_path: Path) -> None:
    """The packed side forwards every prompt with signal once; the padded one fills rows up, without signal too."""
    result = measure(TINY_CASE, ("padded", "grpo_hf"), repeats=1)
    assert result["padded"]["cosine"] == pytest.approx(1, abs=1e-6)
    data = make_data(TINY_CASE)
    signal = [made.ids for made in data.completions[1]]
    assert result["grpo_hf"]["tokens_forwarded"] == tokens.needed(TINY_CASE) == 12 + sum(len(ids) - 1 for ids in signal)
    lengths = sorted(12 + len(made.ids) - 1 for group in data.completions for made in group)
    assert result["padded"]["tokens_forwarded"] == 4 * lengths[-1] + 4 * lengths[3]
    for side in ("padded", "grpo_hf"):
        assert result[side]["wall_s"] > 0
        assert result[side]["peak_mib"] > 100
    assert training_step.fastest_rival(result) is None, "both are ours"
    as_rival = result | {"trl": result["padded"], "trl_over_grpo_hf": result["padded_over_grpo_hf"]}
    assert "trl (fastest rival)" in training_step.table("tiny", as_rival)
    training_step.plot({"tiny": as_rival}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


RIVAL_CASES = {
    "tools, shared system prompt, LoRA": replace(TINY_CASE, turns=3, tool=4, system=20, budget=200, lora=True),
    "KL, two updates": replace(TINY_CASE, flat=0, beta=0.5, updates=2),
}


@pytest.mark.parametrize("name", RIVAL_CASES)
def test_rivals_take_our_step(name: str) -> None:
    """Each that is installed; their gradients are compared by measure itself, their tokens with the count."""
    rivals = [side for side in training_step.SIDES if side in NEEDS and is_installed(side)]
    if not rivals:
        pytest.skip("pip install grpo_hf[benchmarks]")
    result, counted = measure(RIVAL_CASES[name], (*rivals, "grpo_hf"), repeats=0), tokens.count(RIVAL_CASES[name])
    assert min(result[side]["cosine"] for side in rivals) > 0.9999
    if RIVAL_CASES[name].updates == 1:
        assert {side: result[side]["tokens_forwarded"] for side in rivals if side in counted} == {
            side: count for side, count in counted.items() if side in rivals
        }


def test_a_side_that_takes_another_step_is_named(tmp_path: Path) -> None:
    gradients = {"trl": [1.0, 2.0], "liger": [1.0, 2.1], "grpo_hf": [2.0, 4.0]}
    for side, gradient in gradients.items():
        torch.save(torch.tensor(gradient), gradient_file(tmp_path, side))
    assert compare_gradients(tmp_path, ("trl", "grpo_hf")) == {"trl": pytest.approx(1), "grpo_hf": pytest.approx(1)}
    with pytest.raises(SystemExit, match=r"^liger: not the step of grpo_hf; cosines of the gradients are {'liger': 0\.9998"):
        compare_gradients(tmp_path, tuple(gradients))


def test_the_plain_loop_has_the_loss_of_whole_rows() -> None:
    """Its head goes piece by piece, and one hidden state can predict several targets; here with old and reference log-probs
    that matter, and with a tool's answer that nobody trains on."""
    case = replace(TINY_CASE, flat=0, turns=2, tool=3, groups=1, rows=3)
    model = make_model(case)
    (samples,) = plain.samples_of(case, make_data(case))
    batches = list(liger.lay_out(case, samples))
    assert [batch.inputs["input_ids"].shape[0] for batch in batches] == [3, 1]
    torch.manual_seed(0)
    expected = torch.zeros(())
    for batch in batches:
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.scored_at]
        logprobs = logits.log_softmax(-1)[torch.arange(len(batch.labels)), batch.labels]
        old, ref = (logprobs.detach() + 0.3 * torch.randn(len(logprobs)) for _ in range(2))
        ratio, behind = (logprobs - old).exp(), ref - logprobs
        clipped = torch.where(batch.advantages > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
        expected = expected + (0.5 * ratio * (behind.exp() - behind - 1) - clipped * batch.advantages).sum() / 7
        batch.old_logprobs, batch.ref_logprobs = old, ref
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert sum(len(batch.terms) for batch in batches) == sum(sum(sample.completion.is_sampled) for sample in samples)
    model.zero_grad()
    plain.POSITIONS, pieces = 5, plain.POSITIONS
    try:
        for batch in batches:
            shared = torch.randperm(len(batch.terms))
            for name in ("terms", "advantages", "old_logprobs", "ref_logprobs"):
                setattr(batch, name, getattr(batch, name)[shared])
            plain.forward_backward(model, batch, plain.plain_head, 0.5, 7)
    finally:
        plain.POSITIONS = pieces
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_both_attentions_over_a_trie_are_attention_over_each_path() -> None:
    """A root of 3 tokens, under it 2 and 1, and 2 under that 1; laid out as TRL does."""
    paths = [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 5, 6, 7]]
    own = [3, 2, 1, 2]
    packed = {
        "tree_kv_index": torch.tensor([place for path in paths for place in path]),
        "tree_cu_seqlens_q": torch.tensor([0, *own]).cumsum(0),
        "tree_cu_seqlens_k": torch.tensor([0, *map(len, paths)]).cumsum(0),
    }
    torch.manual_seed(0)
    query = torch.randn(1, 4, 8, 16)
    key, value = torch.randn(2, 1, 1, 8, 16)
    expected = torch.empty_like(query)
    for path, tokens_of_it in zip(paths, own, strict=True):
        scores = query[:, :, path] @ key[:, :, path].mT * 0.3
        scores = scores.masked_fill(~torch.ones(len(path), len(path), dtype=torch.bool).tril(), -torch.inf)
        expected[:, :, path[-tokens_of_it:]] = (scores.softmax(-1) @ value[:, :, path])[:, :, -tokens_of_it:]
    for own_way in trl_async_tree.ATTENTIONS.values():
        torch.testing.assert_close(own_way(query, key, value, trl_async_tree.paths_of(packed), 0.3), expected)


def test_needed_tokens_are_distinct_beginnings() -> None:
    """A system prompt once, a prompt once, and of a completion all but the last token, what tools answered too."""
    case = Case(2, 4, equal=True, system=3, turns=2, tool=1, groups=2, group_size=2)
    assert tokens.needed(case) == 3 + 2 * 2 + 4 * (4 + 1 + 4 - 1)
    assert tokens.needed(replace(case, flat=1)) == 3 + 2 + 2 * (4 + 1 + 4 - 1)


@pytest.mark.parametrize("name", training_step.CASES)
def test_no_rival_forwards_fewer_tokens_than_ours(name: str) -> None:
    counted = tokens.count(training_step.CASES[name])
    assert counted["needed"] <= counted["grpo_hf"]
    assert counted["grpo_hf"] == min(counted[side] for side in tokens.COUNTED if side in counted), counted


def test_pairs_that_share_their_first_tokens_are_a_node_more_each() -> None:
    flat, branched = nodes.tree(0), nodes.tree(2)
    assert [len(layout.nodes) for layout in (flat, branched)] == [9, 13]
    assert len(flat.reach) - len(branched.reach) == 4 * 2
