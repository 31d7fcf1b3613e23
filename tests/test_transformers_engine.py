"""The transformers engine: what it samples, from which distribution, and that it leaves the model as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig

from grpo_hf.rollout.engine import Sampling, sample_groups
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.transformers_engine import SeededSampling, TransformersEngine, cut_at_stop, fitting
from grpo_hf.types import Completion
from tests.conversations import at_once, conversations, one_at_a_time, sampled
from tests.samples import VOCAB
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
STOPS = tuple(range(VOCAB - 20, VOCAB))


def sample(model, prompts, seeds, n: int = 1, **options) -> list[list[Completion]]:
    """The groups, in order."""
    settings = {"max_completion_length": 6, "stop_token_ids": STOPS} | options
    engine = TransformersEngine(model, pad_token_id=VOCAB - 2, tokenizer=tiny_tokenizer())
    engine.sync_weights(0)
    groups = dict(sample_groups(engine, prompts, seeds, n, Sampling(**settings)))
    return [groups[number] for number in range(len(prompts))]


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


@torch.no_grad()
def greedy(model, prompt: list[int], length: int) -> list[int]:
    """One row at a time, no cache, no padding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length and (tokens == prompt or tokens[-1] not in STOPS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_temperature_0_is_the_arg_max(family: str) -> None:
    model = tiny_model(family)
    groups = sample(model, PROMPTS, [0] * 3, temperature=0)
    assert ids(groups) == [[greedy(model, prompt, 6)] for prompt in PROMPTS]


def test_a_sample_depends_on_its_prompt_and_seed_alone() -> None:
    """Whatever rows share its batch; and different seeds give different samples."""
    model = tiny_model()
    together = sample(model, PROMPTS, [1, 4, 7], n=3)
    assert ids(together) == ids(sample(model, PROMPTS, [1, 4, 7], n=3))
    for prompt, seed, group in zip(PROMPTS, [1, 4, 7], ids(together), strict=True):
        for n, completion in enumerate(group):
            assert ids(sample(model, [prompt], [seed + n])) == [[completion]]
    first = ids(together)[0]
    assert len({tuple(completion) for completion in first}) == 3


def kept(probabilities: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """The distribution after each filter, by definition."""
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered  # top-p keeps a token while those before it hold less than p
    keep = (torch.arange(len(ordered)) < (top_k or len(ordered))) & (before < top_p) & (ordered >= min_p * ordered[0])
    return torch.zeros_like(probabilities).scatter(0, tokens, ordered * keep) / (ordered * keep).sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 3.0, "top_k": 5}, {"temperature": 2.0, "top_p": 0.6}, {"min_p": 0.2}],
    ids=["plain", "temperature", "top-k", "top-p", "min-p"],
)
def test_frequencies_follow_the_distribution(options: dict) -> None:
    model, draws = tiny_model(), 4000
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    filters = {name: value for name, value in options.items() if name != "temperature"}
    expected = kept((logits / options.get("temperature", 1.0)).softmax(-1), **filters)
    (group,) = sample(model, [PROMPTS[0]], [0], n=draws, max_completion_length=1, **options)
    counts = torch.tensor([completion.ids[0] for completion in group]).bincount(minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - draws * expected).square() / (draws * expected))[possible].sum()
    degrees = possible.sum() - 1
    assert degrees > 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations


def test_a_draw_for_each_row_and_step() -> None:
    """Inverse transform sampling: the first token whose cumulative probability exceeds the draw."""
    draw = SeededSampling([1, 2], prompt_length=1, max_steps=3)
    draw.draws = torch.tensor([[0.0, 0.1, 0.9], [0.49, 0.5, 0.999]], dtype=torch.float64)
    scores = torch.tensor([[0.0, 0.25, 0.25, 0.5, 0.0]]).log().expand(2, -1)
    for step, tokens in enumerate([[1, 2], [1, 3], [3, 3]]):
        chosen = draw(torch.zeros(2, 1 + step, dtype=torch.long), scores)
        assert chosen.argmax(-1).tolist() == tokens
        assert (chosen.isfinite().sum(-1) == 1).all()
    assert len(SeededSampling([1, 2], prompt_length=1, max_steps=3).draws.unique()) == 6


def test_the_stop_token_is_kept_and_what_follows_is_cut() -> None:
    assert cut_at_stop([1, 2, 9, 1, 9], (8, 9)) == Completion([1, 2, 9], truncated=False)
    assert cut_at_stop([9], (9,)) == Completion([9], truncated=False)
    assert cut_at_stop([1, 2, 3], (8, 9)) == Completion([1, 2, 3], truncated=True)


def test_completions_end_at_stop_tokens_or_the_limit() -> None:
    completions = [item for group in sample(tiny_model(), PROMPTS, [0] * 3, n=20) for item in group]
    assert {item.truncated for item in completions} == {True, False}
    for item in completions:
        assert (item.ids[-1] in STOPS) is not item.truncated
        assert not any(token in STOPS for token in item.ids[:-1])
        assert len(item.ids) == 6 if item.truncated else len(item.ids) <= 6


ADAPTERS = {
    "no adapter": None,
    "lora": LoraConfig(r=2, target_modules=["q_proj"]),
    "lora, causal LM": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_the_models_own_generation_defaults_stay_out_of_it_and_are_kept(adapter: LoraConfig | None) -> None:
    """A checkpoint's defaults would sample from another distribution than the one that is trained."""
    lm = tiny_model().train()
    expected = ids(sample(lm, PROMPTS, [1] * 3, n=2))
    lm.generation_config = own = GenerationConfig(repetition_penalty=5.0, top_k=2, temperature=9.0, do_sample=True)
    model = lm if adapter is None else get_peft_model(lm, adapter)  # type: ignore[arg-type]
    assert ids(sample(model, PROMPTS, [1] * 3, n=2)) == expected
    assert lm.generation_config is own
    assert model.generation_config is own
    assert model.training and lm.training


def test_repetition_penalty() -> None:
    """All but forbids what the prompt or the completion already holds."""
    (group,) = sample(tiny_model(), [PROMPTS[0]], [0], temperature=0, repetition_penalty=1e6, stop_token_ids=())
    assert len(set(group[0].ids) | set(PROMPTS[0])) == 6 + 3


def test_stop_strings_end_a_completion_with_the_token_that_completes_them() -> None:
    """The tokenizer's words are "w0", "w1", ...: "w4" ends w4 and all of w40 to w49."""
    free = [item for group in sample(tiny_model(), PROMPTS, [0] * 3, n=20) for item in group]
    ended = [item for group in sample(tiny_model(), PROMPTS, [0] * 3, n=20, stop_strings=("w4", "w7")) for item in group]
    stops = {token for token in range(VOCAB) if str(token)[0] in "47"}
    for before, after in zip(free, ended, strict=True):
        first = next((place for place, token in enumerate(before.ids) if token in stops), None)
        assert after.ids == before.ids[: None if first is None else first + 1]
        assert after.truncated is (before.truncated and first is None)
    assert any(before.truncated and not after.truncated for before, after in zip(free, ended, strict=True))


def test_structured_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="need vLLM"):
        sample(tiny_model(), PROMPTS, [0] * 3, regex="w1+")


SAMPLING = Sampling(max_completion_length=10, stop_token_ids=STOPS)


def engine_of(model: torch.nn.Module, peers: Peers | None = None) -> TransformersEngine:
    return TransformersEngine(model, pad_token_id=VOCAB - 2, peers=peers)


def test_turns_of_conversations_are_those_asked_for_one_at_a_time() -> None:
    together, alone = conversations(), conversations()
    engine = engine_of(tiny_model())
    assert len(at_once(engine, SAMPLING, together)) == 24
    one_at_a_time(engine, SAMPLING, alone)
    assert sampled(together) == sampled(alone)
    assert len({len(turn) for turns in sampled(alone) for turn in turns}) > 5


def test_long_requests_beside_short_ones_with_much_to_come() -> None:
    """GPT-2 has no position after its 64th, which the long one would come to if both were padded to one length."""
    engine, asked = engine_of(tiny_model("gpt2")), {"long": ([5] * 60, 4), "short": ([6] * 4, 60)}
    sampling, made = Sampling(max_completion_length=10, stop_token_ids=()), []
    for keys in (["long", "short"], ["long"], ["short"]):
        with engine.requests(sampling) as requests:
            for key in keys:
                requests.add(key, asked[key][0], 1, max_tokens=asked[key][1])
            made.append(dict(found for _ in keys for found in requests.finished()))
            assert requests.finished() == []
            with pytest.raises(ValueError, match="1 ids and max_tokens=0; each must be 1 or more"):
                requests.add("none", [5], 1, max_tokens=0)
    assert made[0] == made[1] | made[2]
    assert [len(item.ids) for (item,) in made[0].values()] == [4, 60]


def test_what_is_padded_together_fits_the_models_context() -> None:
    config = tiny_model().config  # of 64 positions
    assert fitting([(70, 5), (1, 1)], config) == [True, False], "the first goes, whatever it is"
    assert fitting([(50, 10), (10, 54), (10, 14), (60, 4), (54, 2)], config) == [True, False, True, False, False]
    assert fitting([], config) == []


def test_processes_whose_forward_passes_take_all_of_them(tmp_path: Path) -> None:
    """FSDP2 over two processes, one with five conversations and the other with three shorter ones; then one with none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", __name__]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = conversations()
    one_at_a_time(engine_of(tiny_model()), SAMPLING, alone)
    expected = sampled(alone)
    assert first == [expected[:5], expected[:2]]
    assert second == [[turns[:2] for turns in expected[5:]], []]


def sharded(folder: Path) -> None:
    """One process's part of the above."""
    torch.distributed.init_process_group("gloo")
    rank, model = torch.distributed.get_rank(), tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    def gather(item: object) -> list[object]:
        everyone: list[object] = [None, None]
        torch.distributed.all_gather_object(everyone, item)
        return everyone

    engine, made = engine_of(model, Peers(rank, 2, gather)), []
    for parts, turns in (((slice(5), slice(5, 8)), (3, 2)), ((slice(2), slice(0)), (3, 3))):
        own = conversations()[parts[rank]]
        at_once(engine, SAMPLING, own, turns=turns[rank])
        made.append(sampled(own))
    (folder / f"{rank}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sharded(Path(sys.argv[1]))
