"""vLLM in this process: what it samples, from which weights and distribution, and what it leaves alone."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_hf.rollout.engine import sample_groups
from grpo_hf.rollout.transformers_engine import cut_at_text
from grpo_hf.rollout.vllm_engine import VLLMEngine, as_it_was, same_random_state
from grpo_hf.rollout.vllm_support import BATCHED_TOKENS
from grpo_hf.rollout.weight_sync import StaleEngineError
from tests.conversations import at_once, conversations, one_at_a_time, sampled
from tests.tiny_models import tiny_tokenizer
from tests.tiny_vllm import (
    JSON_WORDS,
    PROMPTS,
    SAMPLING,
    SEEDS,
    STOP_STRINGS,
    STOPS,
    difference,
    ids,
    sample,
    serve,
    update,
    vllm_model,
    with_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def engine(engines: dict[str, VLLMEngine]) -> VLLMEngine:
    """With the weights of a new model."""
    serve(engines["untied"], vllm_model())
    engines["untied"].sync_weights(0)
    return engines["untied"]


def test_a_sample_depends_on_its_prompt_and_seed_alone(engine: VLLMEngine) -> None:
    """Whatever shares its batch; and different seeds give different samples."""
    together = ids(sample(engine))
    assert together == ids(sample(engine))
    for prompt, seed, group in zip(PROMPTS, SEEDS, together, strict=True):
        for n, completion in enumerate(group):
            assert ids(sample(engine, prompts=[prompt], seeds=[seed + n], n=1)) == [[completion]]
    assert len({tuple(completion) for completion in together[0]}) == 4


def test_completions_end_at_a_stop_token_or_are_truncated(engine: VLLMEngine) -> None:
    completions = [item for group in sample(engine, seeds=[0] * 3, n=16) for item in group]
    for item in completions:
        assert not set(item.ids[:-1]) & set(STOPS)
        assert item.truncated == (item.ids[-1] not in STOPS)
        assert item.truncated is False or len(item.ids) == 20
        assert item.rollout_logprobs is not None and len(item.rollout_logprobs) == len(item.ids)
    assert {item.truncated for item in completions} == {True, False}


@torch.no_grad()
def test_temperature_0_is_the_arg_max(engine: VLLMEngine) -> None:
    lm = engine.weights.model
    for prompt, (completion,) in zip(
        PROMPTS, ids(sample(engine, replace(SAMPLING, temperature=0), seeds=[0] * 3, n=1)), strict=True
    ):
        logits = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion


def test_groups_are_handed_on_as_they_finish(engine: VLLMEngine) -> None:
    seen = []
    for number, completions in sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING):
        seen.append((number, len(completions), engine.llm.llm_engine.has_unfinished_requests()))
    assert sorted(number for number, _, _ in seen) == [0, 1, 2]
    assert [(size, going_on) for _, size, going_on in seen] == [(4, True), (4, True), (4, False)]


def test_an_abandoned_sample_leaves_nothing_behind(engine: VLLMEngine) -> None:
    expected = ids(sample(engine))
    groups = sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING)
    next(groups)
    groups.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert ids(sample(engine)) == expected


def test_a_stale_engine_is_not_sampled_from(engine: VLLMEngine) -> None:
    weights = engine.weights
    weights.run(0, lambda tensors: pytest.fail("sent the same weights again"), pytest.fail)
    update(weights.model, 1)
    with pytest.raises(StaleEngineError, match=r"those after update 0.*call sync_weights"):
        sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING)
    engine.sync_weights(1)
    sample(engine)
    with torch.no_grad():  # the number of updates is the same
        next(weights.model.parameters()).mul_(2)
    with pytest.raises(StaleEngineError, match="those after update 1"):
        sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING)
    with pytest.raises(KeyError):
        weights.run(1, lambda tensors: {}["no such engine"], pytest.fail)
    with pytest.raises(StaleEngineError, match="none"):
        sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING)


def test_weights_that_change_between_turns_are_noticed(engine: VLLMEngine) -> None:
    """And what is open when that stops its caller is given up."""
    with pytest.raises(StaleEngineError, match="those after update 0"), engine.requests(SAMPLING) as requests:
        requests.add("first", [5], 1)
        update(engine.weights.model, 1)
        requests.add("second", [6], 1)
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_what_was_sampled_before_an_update_is_not_taken_from_the_cache(engine: VLLMEngine) -> None:
    sample(engine)
    update(engine.weights.model, 1)
    engine.sync_weights(1)
    after = sample(engine)
    engine.llm.reset_prefix_cache()
    assert ids(after) == ids(sample(engine))


def test_more_prompts_than_one_step_takes(engine: VLLMEngine) -> None:
    """A prompt that was cut between two steps would end vLLM's CPU engine: seeded generators cannot be wound back there."""
    prompts = [[*range(1, 40), number % 80 + 1] for number in range(2 * BATCHED_TOKENS // 40)]
    groups = sample(engine, replace(SAMPLING, max_completion_length=1), prompts=prompts, seeds=[*range(len(prompts))], n=1)
    assert len(groups) == len(prompts) and all(len(item.ids) == 1 for group in groups for item in group)


def test_turns_of_conversations_are_those_asked_for_one_at_a_time(engine: VLLMEngine) -> None:
    """And nobody waits for another's turn."""
    together, alone = conversations(), conversations()
    ended = at_once(engine, SAMPLING, together)
    assert ended != sorted(ended) and len(ended) == 24
    one_at_a_time(engine, SAMPLING, alone)
    assert sampled(together) == sampled(alone)


def test_finished_takes_one_step_where_it_may_take_no_time(engine: VLLMEngine) -> None:
    with engine.requests(replace(SAMPLING, stop_token_ids=())) as requests:
        requests.add("long", [5], 1, count=2)
        requests.add("short", [6], 1, max_tokens=3)
        steps = [requests.finished(timeout=0) for _ in range(25)]
    keys = [[key for key, _ in found] for found in steps if found]
    assert keys == [["short"], ["long"]] and steps[0] == []


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(engine: VLLMEngine) -> None:
    with pytest.raises(ValueError, match="make 61 tokens, but vLLM was started for 60"):
        sample_groups(engine, [[1] * 41], [0], 1, SAMPLING)


def random_state() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.fixture(scope="module")
def filtered_engine() -> VLLMEngine:
    """Started by a process that must not notice."""
    sampling = replace(SAMPLING, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = random_state(), torch.get_num_threads(), torch.set_num_threads, os.environ.get("LD_PRELOAD")
    model = vllm_model(seed=3)
    model.config.max_position_embeddings = 512
    engine = VLLMEngine(model, sampling=sampling, max_model_length=512)
    torch.manual_seed(5)  # vllm_model has used it
    assert before == (random_state(), torch.get_num_threads(), torch.set_num_threads, os.environ.get("LD_PRELOAD"))
    engine.sync_weights(0)
    return engine


def test_the_trainers_random_state_is_untouched(engine: VLLMEngine, filtered_engine: VLLMEngine) -> None:
    before = random_state()
    serve(engine, engine.weights.model)
    engine.sync_weights(7)
    for _ in sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING):
        assert random_state() == before
    assert random_state() == before
    with same_random_state(), as_it_was():
        torch.rand(3), random.random(), np.random.rand()
        os.environ["LOCAL_WORLD_SIZE"] = "7"
    assert random_state() == before
    assert os.environ.get("LOCAL_WORLD_SIZE") is None


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_with_filters_logprobs_are_those_before_them(filtered_engine: VLLMEngine, temperature: float) -> None:
    """And the samples keep to the filters: top_k=5 of the temperature's own distribution, without a penalty."""
    engine, model = filtered_engine, filtered_engine.weights.model
    sampling = replace(SAMPLING, temperature=temperature, top_k=5)
    groups = sample(engine, sampling)
    assert difference(model, PROMPTS, groups, temperature) < 1e-3
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for item in group:
            logits = model(torch.tensor([prompt + item.ids])).logits[0, len(prompt) - 1 : -1]
            assert all(token in best for token, best in zip(item.ids, logits.topk(5).indices.tolist(), strict=True))


@torch.no_grad()
def test_filtered_samples_have_the_filtered_distribution(filtered_engine: VLLMEngine) -> None:
    """One token, many seeds: frequencies against top-p of softmax(logits / T)."""
    engine, model, temperature = filtered_engine, filtered_engine.weights.model, 0.7
    sampling = replace(SAMPLING, max_completion_length=1, temperature=temperature, top_p=0.6)
    (group,) = sample(engine, sampling, prompts=[PROMPTS[1]], seeds=[0], n=4000)
    counts = torch.bincount(torch.tensor([item.ids[0] for item in group]), minlength=model.config.vocab_size)
    best, order = (model(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature).softmax(-1).sort(descending=True)
    kept = torch.zeros_like(best).scatter_(0, order, torch.where(best.cumsum(0) - best < 0.6, best, 0.0))
    expected = kept / kept.sum()
    assert counts[expected == 0].sum() == 0
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_many_long_turns_wait_for_each_other(filtered_engine: VLLMEngine) -> None:
    """64 conversations of 400 tokens and more, where a step takes 8,192."""
    together, alone = conversations(64, 400), conversations(64, 400)[::20]
    at_once(filtered_engine, SAMPLING, together, turns=2)
    one_at_a_time(filtered_engine, SAMPLING, alone, turns=2)
    assert sampled(together)[::20] == sampled(alone)
    assert all(len(turns) == 2 for turns in sampled(together))


def test_what_was_sampled_is_in_the_prefix_cache_of_the_next_turn(
    filtered_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 32 tokens: 70 = 40 + 30, of which the last one was never an input, have filled two."""
    engine, outputs = filtered_engine.llm.llm_engine, []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: outputs.extend(made := step()) or made)
    filtered_engine.llm.reset_prefix_cache()
    with filtered_engine.requests(replace(SAMPLING, stop_token_ids=())) as requests:
        requests.add(0, [*range(40)], 1, max_tokens=30)
        ((_, (first,)),) = requests.finished()
        requests.add(1, [*range(40), *first.ids, 1, 2], 2)
        requests.finished()
    assert [made.num_cached_tokens for made in outputs] == [0, 64]


def test_an_engine_without_filters_gives_no_logprobs_of_filtered_samples(engine: VLLMEngine) -> None:
    """They would be those after the filters."""
    (group,) = sample(engine, replace(SAMPLING, top_k=2), prompts=[[8]], seeds=[1], n=1)
    assert group[0].rollout_logprobs is None


def test_stop_strings_end_a_completion_as_transformers_ends_it(text_engine: VLLMEngine) -> None:
    text_engine.sync_weights(0)
    free = sample(text_engine)
    stopped = sample(text_engine, replace(SAMPLING, stop_strings=STOP_STRINGS))
    tokenizer = tiny_tokenizer(JSON_WORDS)
    expected = [[cut_at_text(item, STOP_STRINGS, tokenizer) for item in group] for group in free]
    assert ids(stopped) == ids(expected) != ids(free)
    assert [[item.truncated for item in group] for group in stopped] == [[c.truncated for c in group] for group in expected]


def test_a_json_schema_is_kept_to(text_engine: VLLMEngine) -> None:
    """And there are no log-probs: they would be those under the grammar."""
    text_engine.sync_weights(0)
    tokenizer = tiny_tokenizer(JSON_WORDS)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    sampling = replace(SAMPLING, stop_token_ids=(tokenizer.eos_token_id,), json_schema=json.dumps(schema))
    (group,) = sample(text_engine, sampling, prompts=[[5]], seeds=[1], n=16)
    objects = [json.loads(tokenizer.decode(item.ids, skip_special_tokens=True)) for item in group]
    assert {value["a"] for value in objects} == {1, 2}
    assert all(item.rollout_logprobs is None for item in group)


def test_what_the_cpu_kernels_cannot_do_is_refused() -> None:
    model = vllm_model()
    model.config.head_dim = 8
    with pytest.raises(ValueError, match="no attention for heads of size 8, only for 32"):
        VLLMEngine(model, sampling=SAMPLING, max_model_length=60)


ADAPTERS = {
    "experts": ("qwen3_moe", ["q_proj"], "'adapter': vLLM on the CPU holds no adapter beside a mixture of experts.*'merge'"),
    "a head that vLLM's model keeps to itself": ("qwen2", ["q_proj", "lm_head"], "use vllm_lora_sync='merge': .*lm_head"),
}


@pytest.mark.parametrize(("family", "layers", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_vllm_cannot_hold_are_refused(family: str, layers: list[str], message: str) -> None:
    model = with_lora(vllm_model(family), target_modules=layers)
    with pytest.raises(ValueError, match=message):
        VLLMEngine(model, sampling=SAMPLING, max_model_length=60, lora_sync="adapter").sync_weights(0)
