"""The sorting model under transformers: the toy's logits, tied weights, a round trip and generate."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_hf.toy.hf_model import SortingConfig, SortingForCausalLM
from grpo_hf.toy.model import SortingModel
from grpo_hf.toy.train import LECTURE_PROMPTS

PROMPTS = torch.tensor(LECTURE_PROMPTS)


def new_model(seed: int = 0, response_length: int = 3) -> SortingModel:
    return SortingModel(
        vocab_size=5,
        embedding_dim=10,
        prompt_length=3,
        response_length=response_length,
        generator=torch.Generator().manual_seed(seed),
    )


def hf_model_of(model: SortingModel) -> SortingForCausalLM:
    """The same weights under transformers."""
    hf_model = SortingForCausalLM(SortingConfig(response_length=model.decode_weights.shape[0]))
    hf_model.model.load_state_dict(model.state_dict())
    return hf_model


@pytest.mark.parametrize("response_length", [2, 3])
def test_logits_are_the_toys(response_length: int) -> None:
    model = new_model(response_length=response_length)
    ids = torch.cat([PROMPTS, torch.zeros(3, response_length + 2, dtype=torch.long)], dim=1)  # two of padding
    logits = hf_model_of(model)(ids, attention_mask=(ids >= 0).long(), use_cache=True).logits
    assert logits.shape == (3, 3 + response_length + 2, 5)
    torch.testing.assert_close(logits[:, 2 : 2 + response_length], model(PROMPTS))
    assert (logits[:, :2] == 0).all()
    assert (logits[:, 2 + response_length :] == 0).all()


def test_parts_give_the_logits() -> None:
    hf_model = hf_model_of(new_model())
    ids = torch.cat([PROMPTS, PROMPTS], dim=1)
    logits = hf_model(ids).logits
    assert hf_model.get_decoder() is hf_model.base_model is hf_model.model
    hidden = hf_model.get_decoder()(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
    assert hidden.shape == (3, 6, 10)
    torch.testing.assert_close(hf_model.get_output_embeddings()(hidden), logits)
    torch.testing.assert_close(hf_model(ids, logits_to_keep=4).logits, logits[:, -4:])
    torch.testing.assert_close(hf_model(ids, logits_to_keep=torch.tensor([2, 4])).logits, logits[:, [2, 4]])
    assert hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight


def test_model_is_causal() -> None:
    hf_model = hf_model_of(new_model())
    ids = torch.cat([PROMPTS, PROMPTS], dim=1)
    for length in (3, 4, 5):
        torch.testing.assert_close(hf_model(ids[:, :length]).logits, hf_model(ids).logits[:, :length])


def test_model_refuses_a_short_prompt() -> None:
    with pytest.raises(ValueError, match="got 2 tokens: every prompt of this model has exactly 3"):
        hf_model_of(new_model())(PROMPTS[:, :2])


def test_round_trip(tmp_path) -> None:
    hf_model = hf_model_of(new_model())
    hf_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SortingForCausalLM)
    assert torch.equal(loaded(PROMPTS).logits, hf_model(PROMPTS).logits)
    assert loaded.lm_head.weight is loaded.model.embedding.weight
    assert loaded.config.max_position_embeddings == 6


def test_model_starts_as_the_lectures_where_a_checkpoint_has_nothing() -> None:
    config = SortingConfig(vocab_size=400, hidden_size=100, prompt_length=4, response_length=4)
    embedding = torch.randn(400, 100)
    loaded = SortingForCausalLM.from_pretrained(None, config=config, state_dict={"model.embedding.weight": embedding})
    assert torch.equal(loaded.lm_head.weight, embedding)
    for model in (SortingForCausalLM(config), loaded):
        assert model.lm_head.weight.std().item() == pytest.approx(1.0, rel=0.02)
        assert model.model.encode_weights.std().item() == pytest.approx(0.1, rel=0.02)
        assert model.model.decode_weights.std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(use_cache: bool) -> None:
    hf_model = hf_model_of(new_model())
    greedy = hf_model.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), do_sample=False, max_new_tokens=3, use_cache=use_cache
    )
    assert torch.equal(greedy, torch.cat([PROMPTS, new_model()(PROMPTS).argmax(-1)], dim=1))


def test_generate_samples_at_a_temperature() -> None:
    torch.manual_seed(0)
    prompts = PROMPTS[:1].expand(4000, 3)
    sampled = hf_model_of(new_model()).generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=10.0, max_new_tokens=3
    )[:, 3:]
    frequencies = torch.nn.functional.one_hot(sampled, 5).float().mean(0)
    torch.testing.assert_close(frequencies, (new_model()(PROMPTS)[0] / 10).softmax(-1), atol=0.03, rtol=0)
