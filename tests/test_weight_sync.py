"""What an engine is sent: names and values, for all weights and for adapters; and what cannot be sent.

As a script under `accelerate launch` it compares what is sent of a model before and after FSDP2 has cut it up.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from grpo_hf.rollout.weight_sync import (
    EngineWeights,
    StaleEngineError,
    WeightSync,
    adapter_weights,
    check_adapter,
    save_adapter,
)
from tests.tiny_models import MIXTURES, tiny_model

FIRST_EXPERT = {"qwen3_moe": "mlp.experts.0.gate_proj", "mixtral": "block_sparse_moe.experts.0.w1"}


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


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_sent_as_checkpoints_have_them(tmp_path: Path, family: str, loaded: bool) -> None:
    """One by one and under the names that the family has always had, while transformers holds them in one tensor."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path) if loaded else model
    weights, saved = sent(model, everything=True), load_file(tmp_path / "model.safetensors")
    assert weights.keys() == saved.keys() > {f"model.layers.1.{FIRST_EXPERT[family]}.weight"}
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    shapes = EngineWeights(model, torch.float32, everything=True).shapes()
    assert list(shapes.items()) == [(name, tuple(weights[name].shape)) for name in weights]


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


class Sent:
    """How many tensors an engine has been sent, by sync."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def load(self, weights: EngineWeights) -> None:
        self.counts.append(len(list(weights)))


def test_a_sync_takes_place_once_for_each_version() -> None:
    model, to = lora(), Sent()
    weights = WeightSync(model, torch.float32)
    with pytest.raises(StaleEngineError, match="none"):
        weights.check()
    weights.run(0, to.load, pytest.fail)
    weights.run(0, to.load, pytest.fail)
    weights.check()
    everything, changed = (len(sent(model, everything=every)) for every in (True, False))
    assert to.counts == [everything]
    weights.run(1, to.load, pytest.fail)
    weights.check()
    assert weights.held is not None and weights.held[0] == 1
    assert to.counts == [everything, changed] and changed < everything


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_update_is_noticed_without_the_counter(optimizer) -> None:
    """As when one trainer trains twice, each time counting from 0."""
    model, to = tiny_model(), Sent()
    weights = WeightSync(model, torch.float32)
    weights.run(0, to.load, pytest.fail)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleEngineError, match=r"those after update 0\); call sync_weights\(\) first"):
        weights.check()
    weights.run(0, to.load, pytest.fail)
    weights.check()
    assert len(to.counts) == 2


def test_a_sync_that_fails_leaves_no_claim() -> None:
    """The engine may hold half of the weights: everything is sent again."""
    model, to = lora(), Sent()
    weights = WeightSync(model, torch.float32)
    weights.run(0, to.load, pytest.fail)

    def broken(weights: EngineWeights) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        weights.run(1, broken, pytest.fail)
    with pytest.raises(StaleEngineError, match="none"):
        weights.check()
    weights.run(1, to.load, pytest.fail)
    assert to.counts == [len(sent(model, everything=True))] * 2


def test_an_adapter_alone_travels_after_the_base_weights() -> None:
    model, to, adapters = lora(), Sent(), []
    weights = WeightSync(model, torch.float32, "adapter")
    for version in (0, 1, 2):
        weights.run(version, to.load, adapters.append)
    assert len(to.counts) == 1 and len(adapters) == 3
    assert adapters[0].keys() == adapter_weights(model).keys()


def test_a_quantized_base_stays_where_it_is() -> None:
    """Only the adapter travels, from the first sync on; merged it could not."""
    model, adapters = lora(), []
    model.get_base_model().is_quantized = True
    weights = WeightSync(model, torch.float32, "adapter")
    for version in (0, 1):
        weights.run(version, pytest.fail, adapters.append)
    assert len(adapters) == 2
    with pytest.raises(ValueError, match=r"quantized model cannot be sent.* set vllm_lora_sync='adapter' and vllm_"):
        WeightSync(model, torch.float32, "merge")


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "target_modules"),
    "another product": ({"init_lora_weights": "mica"}, "not what MiCALinearVariant computes; use a plain LoraConfig"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_cannot_be_merged_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_adapter(lora(**options))


def test_trained_weights_beside_an_adapter_travel_merged_or_not_at_all() -> None:
    model = lora(target_modules=["q_proj"])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert "model.norm.weight" in sent(model, everything=False)
    with pytest.raises(ValueError, match=r"but 1 weights of the model itself are trained too \(model.norm.weight\); freeze"):
        check_adapter(model, adapter_only=True)


def test_other_adapters_and_tied_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="IA3Config"):
        check_adapter(get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))
    with pytest.raises(ValueError, match="embed_tokens and lm_head out of target_modules"):
        check_adapter(lora("qwen2", target_modules=["q_proj", "embed_tokens"]))
    check_adapter(lora("llama", target_modules=["q_proj", "lm_head"]))
    check_adapter(lora(init_lora_weights="olora"))


def test_an_adapter_is_saved_as_peft_saves_it(tmp_path: Path) -> None:
    """But for its initialization, which is done with; and its tensors are copies."""
    model = lora(init_lora_weights="olora")
    weights = adapter_weights(model)
    assert {value.data_ptr() for value in weights.values()}.isdisjoint(p.data_ptr() for p in model.parameters())
    save_adapter(model, weights, tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.peft_config["default"].init_lora_weights is True
    again = adapter_weights(loaded)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_weights_that_fsdp_has_cut_up_are_sent_whole() -> None:
    launch = ["accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "-m", "tests.test_weight_sync"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same when cut up") == 2


def compare_sharded() -> None:
    """In each of several processes."""
    torch.distributed.init_process_group("gloo")
    model = lora(target_modules=["q_proj", "down_proj"])
    before = (
        sent(model, everything=True),
        adapter_weights(model),
        EngineWeights(model, torch.float32, everything=True).shapes(),
    )
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert WeightSync(model, torch.float32).sharded
    assert sum(isinstance(p, DTensor) for p in model.parameters()) == len(list(model.parameters()))
    after = sent(model, everything=True), adapter_weights(model)
    for whole, cut in zip(before, after, strict=False):
        assert whole.keys() == cut.keys()
        assert all(torch.allclose(whole[name], cut[name], atol=1e-6) for name in whole)
    assert EngineWeights(model, torch.float32, everything=True).shapes() == before[2]
    print("the same when cut up", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    compare_sharded()
