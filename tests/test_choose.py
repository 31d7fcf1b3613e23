"""The layout is chosen by trying it: packed where it can be, padded with a reason, an error where neither is right."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo_hf.packing import choose
from grpo_hf.packing.attention import TOKEN_TREE
from grpo_hf.packing.choose import choose_layout, disable_dropout
from grpo_hf.toy.hf_model import SortingConfig, SortingForCausalLM
from tests.tiny_models import FAMILIES, MIXTURES, SIZES, tiny_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
TOY_PROMPTS = [[1, 0, 2], [3, 2, 4]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger(choose.__name__), "warning_once", lines.append, raising=False)
    return lines


def with_token_shift() -> PreTrainedModel:
    """Looks at the neighbour outside of attention, as convolutions and state-space layers do."""
    model = tiny_model()
    model.get_decoder().norm.register_forward_hook(lambda module, args, out: out + pad(out, (0, 0, 1, -1)))  # type: ignore
    return model


def with_doubled_logits() -> PreTrainedModel:
    """Does something to its logits that nobody was told of."""
    model = tiny_model()

    def double(module, args, output):
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(double)
    return model


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_packed_for_the_families(family: str, log: list[str]) -> None:
    model = tiny_model(family)
    assert choose_layout(model, PROMPTS) == "packed"
    assert model.config._attn_implementation == TOKEN_TREE
    assert log == ["Token layout: packed"]


def test_packed_in_half_precision() -> None:
    assert choose_layout(tiny_model().to(torch.bfloat16), PROMPTS) == "packed"


def test_padded_for_the_toy(log: list[str]) -> None:
    assert choose_layout(SortingForCausalLM(SortingConfig()), TOY_PROMPTS) == "padded"
    (line,) = log
    assert line.startswith("Token layout: padded (not packed, since its attention does not go through transformers'")


def test_padded_where_tokens_meet_outside_of_attention(log: list[str]) -> None:
    model = with_token_shift()
    own = model.config._attn_implementation
    assert choose_layout(model, PROMPTS) == "padded"
    assert model.config._attn_implementation == own
    assert "not packed, since its log-probs differ by up to" in log[0]


def nemotron() -> PreTrainedModel:
    """Its own code makes a mask of the wrong kind for torch out of the layout's."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron", **SIZES)).eval()


def test_a_trial_that_crashes_is_a_reason_and_not_a_crash(log: list[str]) -> None:
    model = nemotron()
    assert choose_layout(model, PROMPTS) == "padded"
    assert model.config._attn_implementation == "sdpa"
    assert "not packed, since its forward ends in RuntimeError: Expected attn_mask dtype" in log[0]
    with pytest.raises(ValueError, match=r"NemotronForCausalLM cannot be trained.*not packed, since its forward ends in"):
        choose_layout(nemotron(), PROMPTS, "packed")


def test_a_crash_of_every_layout_is_an_error_with_both_reasons() -> None:
    model = tiny_model()
    forward = model.get_decoder().forward

    def only_whole_rows(*args, position_ids=None, **kwargs):
        if position_ids is not None:
            raise NotImplementedError("no position ids,\nplease")
        return forward(*args, **kwargs)

    model.get_decoder().forward = only_whole_rows  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not packed, since its forward ends in NotImplementedError: no position ids,; not"):
        choose_layout(model, PROMPTS)


def test_padded_when_asked() -> None:
    model = tiny_model()
    assert choose_layout(model, PROMPTS, "padded") == "padded"
    assert model.config._attn_implementation == "sdpa"


def test_a_requested_layout_that_is_wrong_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"within 0.001 nats; not packed, since its log-probs differ by up to \d") as error:
        choose_layout(with_token_shift(), PROMPTS, "packed")
    assert "Qwen2ForCausalLM cannot be trained" in str(error.value)
    with pytest.raises(ValueError, match="its attention does not go through"):
        choose_layout(SortingForCausalLM(SortingConfig()), TOY_PROMPTS, "packed")


def test_a_head_that_no_layout_follows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"not packed, .* not padded, .* add that to LOGIT_TRANSFORMS"):
        choose_layout(with_doubled_logits(), PROMPTS)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept(training: bool) -> None:
    model = tiny_model().train(training)
    choose_layout(model, PROMPTS)
    assert model.training is training


def test_attention_dropout_must_be_off_for_packed(log: list[str]) -> None:
    model = tiny_model("gpt2")
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.1  # type: ignore[union-attr]
    assert choose_layout(model, PROMPTS) == "padded"
    assert "its attention has dropout (disable_dropout=True switches that off)" in log[0]
    disable_dropout(model)
    assert choose_layout(model, PROMPTS) == "packed"


def with_attention_dropout() -> nn.Module:
    model = tiny_model("llama")
    for layer in model.get_decoder().layers:  # type: ignore[union-attr]
        layer.self_attn.attention_dropout = 0.5
    return model


def opt() -> nn.Module:
    """Its dropout is a number, drawn with by a function."""
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **SIZES | sizes))


def with_adapter(config: PeftConfig) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), config)


NOISY = {
    "attention": with_attention_dropout,
    "a number": opt,
    "a router's jitter": lambda: tiny_model("mixtral", router_jitter_noise=0.9),
    "LoRA": lambda: with_adapter(LoraConfig(lora_dropout=0.5, init_lora_weights=False)),
    "LoHa, a number for each adapter": lambda: with_adapter(
        LoHaConfig(target_modules=["q_proj"], module_dropout=0.5, init_weights=False)
    ),
}


@pytest.mark.parametrize("make", NOISY.values(), ids=NOISY)
def test_disable_dropout_makes_training_deterministic(make: Callable[[], Any]) -> None:
    model = make().train()
    ids = torch.tensor([PROMPTS[1]])
    assert len({model(ids).logits.sum().item() for _ in range(8)}) > 1
    disable_dropout(model)
    assert len({model(ids).logits.sum().item() for _ in range(8)}) == 1


def test_noise_that_cannot_be_switched_off_is_an_error() -> None:
    model = tiny_model()
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out + torch.randn_like(out) if module.training else out
    )
    assert choose_layout(model, PROMPTS) == "packed"
    with pytest.raises(ValueError, match=r"not packed, since .* nats in training alone, where its forward is random"):
        choose_layout(model, PROMPTS, training=True)


def test_padded_takes_the_attention_that_keeps_soft_caps(log: list[str]) -> None:
    model = tiny_model("gemma2")
    assert model.config._attn_implementation == "sdpa"
    assert choose_layout(model, PROMPTS, "padded") == "padded"
    assert model.config._attn_implementation == "eager"
    assert log[0].startswith("Token layout: padded with eager attention (not padded, since its log-probs differ by up to")
