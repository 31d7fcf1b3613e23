"""The benchmarks on tiny shapes: the one for a GPU, also without most of what training needs, and sides that take turns."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu
from benchmarks.attention_variants import VARIANTS, _sequences, why_not
from benchmarks.cases import Case, groups_of, make_data, text_of
from benchmarks.side_by_side import measure
from grpo_hf.packing.attention import ScoreRule, attend, by_span
from grpo_hf.packing.layout import num_tokens, packed_batch, pad
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
    assert {"datasets", "pyarrow", "matplotlib", "psutil", "math_verify"} <= hidden
    out = tmp_path / "gpu.json"
    script = WITHOUT.format(hidden=hidden, arguments=[*TINY, "--out", str(out)])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = re.findall(r"(\S+, \S+, float32) +error (\S+) .* passed 1", done.stdout)
    assert [name for name, _ in errors] == [
        "padded, sdpa, float32",
        "packed, shared_prefix, float32",
        "packed, by_span, float32",
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

    def looks_away(query, key, value, layout, rule):
        return by_span(query, key, value, layout, ScoreRule(1.001 * rule.scaling, 1, None))

    def raises(*args):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(VARIANTS, "by_span", looks_away)
    monkeypatch.setitem(VARIANTS, "another", raises)
    assert gpu.main(TINY) == 1
    shown = capsys.readouterr()
    assert re.search(r"FAILED gradients / packed, by_span, float32: relative error \S+, more than 0.0001", shown.err)
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


def test_varlen_sequences_are_the_layout() -> None:
    """Attention over each sequence's gathered keys is by_span."""
    layout = packed_batch(random_groups()).prefix_layout
    assert layout is not None
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, len(layout.prompt_of), 8) for _ in range(3))
    rule = ScoreRule(0.5, None, None)
    keys, cu_queries, cu_keys, max_queries, max_keys = _sequences(layout)
    parts = []
    for number in range(len(cu_queries) - 1):
        q, k = slice(*cu_queries[number : number + 2]), keys[cu_keys[number] : cu_keys[number + 1]]
        assert q.stop - q.start <= max_queries and len(k) <= max_keys
        parts.append(attend(query[:, :, q], key[:, :, k], value[:, :, k], rule))
    torch.testing.assert_close(torch.cat(parts, dim=2), by_span(query, key, value, layout, rule))


def test_a_variant_runs_or_says_why_not() -> None:
    assert {name for name in VARIANTS if why_not(name, "cuda", torch.bfloat16) is None} == set(VARIANTS) - {"cascade"}
    assert why_not("varlen", "cuda", torch.float32) == "varlen_attn takes float16 and bfloat16 only"
    assert why_not("by_span", "cpu", torch.float32) is None


def test_sides_take_the_same_step_on_the_completions_that_they_are_given() -> None:
    """The packed side forwards every prompt with signal once; the padded one fills rows up, without signal too."""
    case = Case(12, 8, groups=2, group_size=4, rows=4, flat=1, vocabulary=300, hidden=64, layers=1)
    result = measure(case, ("padded", "grpo_hf"), repeats=1)
    assert result["padded"]["cosine"] == pytest.approx(1, abs=1e-6)
    groups = groups_of(make_data(case))
    (informative,) = [group for group in groups if text_of(group.prompt.ids) not in make_data(case).flat]
    assert result["grpo_hf"]["tokens_forwarded"] == num_tokens(informative)
    padded = pad(groups, tokens_per_microbatch=4 * 20)
    assert result["padded"]["tokens_forwarded"] == sum(batch.num_tokens for batch in padded)
    for side in ("padded", "grpo_hf"):
        assert result[side]["wall_s"] > 0
        assert result[side]["peak_mib"] > 100
