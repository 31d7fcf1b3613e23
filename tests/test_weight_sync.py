"""What an engine is sent: names and values, for all weights and for adapters; and what cannot be sent."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor

from grpo_hf.rollout.weight_sync import StaleEngineError, WeightSync, check_adapter, EngineWeights
from tests.tiny import tiny_model


def sent(model, *, everything: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = list(EngineWeights(model, dtype, everything=everything))
    assert len(dict(tensors)) == len(tensors)
    return dict(tensors)


def lora(family: str = "llama", **options):
    torch.manual_seed(0)
    config = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"} | options
    return get_peft_model(tiny_model(family), LoraConfig(**config))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_all_weights_are_sent_by_their_names_and_by_reference(family: str) -> None:
    model = tiny_model(family)
    weights = sent(model, everything=True)
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 8, "lora_alpha": 3}], ids=str)
def test_adapters_are_merged_as_peft_merges_them_and_stay_out_of_the_base(family: str, options: dict) -> None:
    model = lora(family, **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = sent(model, everything=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    expected = dict(model.merge_and_unload().named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)


def test_later_only_what_training_changes_is_sent_with_the_layers_that_are_fused_with_it() -> None:
    names = sent(lora(target_modules=["q_proj"], layers_to_transform=[1]), everything=False).keys()
    assert names == {f"model.layers.1.self_attn.{layer}_proj.weight" for layer in "qkvo"}
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    names = sent(model, everything=False).keys()
    assert names == {f"model.layers.0.mlp.{layer}_proj.weight" for layer in ("gate", "up", "down")}


def test_weights_have_the_engines_dtype() -> None:
    weights = sent(lora(), everything=True, dtype=torch.bfloat16)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_a_sync_takes_place_once_for_each_version() -> None:
    model, version, syncs = lora(), 0, []
    weights = WeightSync(model, torch.float32, lambda: version)
    with pytest.raises(StaleEngineError, match="none"):
        weights.check()
    assert weights.run(lambda tensors: syncs.append(len(list(tensors))), pytest.fail)
    assert not weights.run(lambda tensors: syncs.append(0), pytest.fail)
    weights.check()
    version = 1
    with pytest.raises(StaleEngineError, match=r"after update 0.*update 1"):
        weights.check()
    assert weights.run(lambda tensors: syncs.append(len(list(tensors))), pytest.fail)
    assert syncs == [len(sent(model, everything=True)), len(sent(model, everything=False))]
    assert syncs[1] < syncs[0]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_update_is_noticed_without_the_counter(optimizer) -> None:
    """As when one trainer trains twice, each time counting from 0."""
    model = tiny_model()
    weights = WeightSync(model, torch.float32, lambda: 0)
    weights.run(lambda tensors: None, pytest.fail)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleEngineError):
        weights.check()


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "target_modules"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_cannot_be_merged_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_adapter(lora(**options))


def test_other_adapters_and_tied_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="IA3Config"):
        check_adapter(get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))
    with pytest.raises(ValueError, match="embed_tokens and lm_head out of target_modules"):
        check_adapter(lora("qwen2", target_modules=["q_proj", "embed_tokens"]))
    check_adapter(lora("llama", target_modules=["q_proj", "lm_head"]))
    check_adapter(lora(init_lora_weights="olora"))
