"""Models that bring an adapter, a router or odd defaults: references, checkpoints, loading, and which are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_hf import GRPOConfig, GRPOTrainer
from grpo_hf.rollout.weight_sync import EngineWeights, adapter_weights
from tests.runs import StopAfter, same, values, weights
from tests.tiny import PROMPTS, VOCAB, even_words, tiny_model, tiny_tokenizer, tiny_trainer

LAYERS = ["q_proj", "v_proj", "down_proj"]


def base() -> PreTrainedModel:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(VOCAB - 20, VOCAB))
    return model


def trained(config: peft.PeftConfig | None = None) -> PeftModel:
    """A model whose adapter is no longer what it began as."""
    model = get_peft_model(base(), config or LoraConfig(target_modules=LAYERS, r=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: LoraConfig(target_modules=LAYERS),
    "dropout": lambda: LoraConfig(target_modules=LAYERS, lora_dropout=0.5),
    "DoRA": lambda: LoraConfig(target_modules=LAYERS, use_dora=True),
    "PiSSA": lambda: LoraConfig(target_modules=LAYERS, init_lora_weights="pissa"),
    "a whole layer": lambda: LoraConfig(target_modules=LAYERS, modules_to_save=["norm"]),
    "tokens": lambda: LoraConfig(target_modules=LAYERS, trainable_token_indices=[1, 2]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_the_reference_is_the_adapter_as_it_came(tmp_path: Path, config: Callable[[], peft.PeftConfig]) -> None:
    """KL is 0 at first, where it was that to the bare base; nothing but the adapter moves, or is optimized or saved."""
    model = trained(config())
    before = weights(model)
    saving = {"save_strategy": "steps", "save_steps": 3}
    run = tiny_trainer(tmp_path, model=model, beta=0.1, max_steps=3, learning_rate=1e-2, **saving)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if name not in before} == {n for n in frozen if ".reference" in n} != set()
    run.train()
    first, *later = values(run, "kl")
    assert first == 0 and all(value > 0 for value in later)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    optimized = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert optimized == sum(p.requires_grad for p in model.parameters()) == len(before.keys() & set(trained_names(model)))
    assert not list(tmp_path.rglob("reference"))
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert same(saved, adapter_weights(model))


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_new_adapter_needs_no_second_one(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, beta=0.1, max_steps=2, peft_config=LoraConfig(target_modules=LAYERS))
    run.train()
    assert values(run, "kl")[0] == 0 < values(run, "kl")[1]
    assert list(run.model.peft_config) == ["default"]


def test_a_run_with_a_reference_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    options = {"beta": 0.1, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = tiny_trainer(tmp_path / "whole", model=trained(), **options)
    whole.train()
    tiny_trainer(tmp_path / "cut", model=trained(), callbacks=[StopAfter(2)], **options).train()
    resumed = tiny_trainer(tmp_path / "cut", model=trained(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    assert values(resumed, "kl")[-1] == values(whole, "kl")[-1] > 0
    with pytest.raises(ValueError, match=r"is of another run: frozen weights '\w+' -> '\w+'\. Set these as they were"):
        tiny_trainer(tmp_path / "cut", model=resumed.model, **options).train(resume_from_checkpoint=True)


def test_a_copy_is_saved_as_itself(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, model=trained(), beta=0.1)
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).zero_()
    model.save_pretrained(tmp_path / "copy")
    assert same(load_file(tmp_path / "copy" / "adapter_model.safetensors"), adapter_weights(model))
    assert [path.name for path in (tmp_path / "copy").iterdir() if path.is_dir()] == []


def test_another_run_of_the_same_model_begins_anew(tmp_path: Path) -> None:
    model = trained()
    for folder in "ab":
        run = tiny_trainer(tmp_path / folder, model=model, beta=0.1, max_steps=2, learning_rate=1e-2)
        run.train()
        assert values(run, "kl")[0] == 0 < values(run, "kl")[1]


def test_an_engine_sees_nothing_of_the_reference(tmp_path: Path) -> None:
    alone, beside = trained(), trained()
    tiny_trainer(tmp_path, model=beside, beta=0.1)
    for read in (lambda model: dict(EngineWeights(model, torch.float32, everything=True)), adapter_weights):
        assert same(read(alone), read(beside))


# ---- An adapter's folder


@pytest.mark.parametrize("dtype", [{}, {"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}], ids=str)
def test_an_adapters_folder_is_a_model(tmp_path: Path, dtype: dict[str, Any]) -> None:
    """Its base model with the adapter, which is trained on; the tokenizer is the base model's."""
    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    more = {"beta": 0.1, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1, "learning_rate": 1e-2}
    args = GRPOConfig(output_dir=str(tmp_path / "run"), model_init_kwargs=dtype, report_to="none", **sizes, **more)
    run = GRPOTrainer(str(tmp_path / "adapter"), even_words, args, PROMPTS)
    assert run.model.get_base_model().dtype is (torch.bfloat16 if dtype else torch.float32)
    before = adapter_weights(run.model)
    assert same(before, adapter_weights(model))
    run.train()
    assert values(run, "kl")[0] == 0 and not same(before, adapter_weights(run.model))


# ---- What is refused


def with_trained_norm() -> PeftModel:
    model = trained()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def with_own_adapter() -> PreTrainedModel:
    model = base()
    model.add_adapter(LoraConfig(target_modules=LAYERS))
    return model


PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
REPEATED = LoraConfig(target_modules=LAYERS, layer_replication=[[0, 2], [0, 2]])
CONFIGS: dict[str, tuple[peft.PeftConfig, str]] = {
    "prompts": (peft.PromptTuningConfig(**PROMPT), "PromptTuningConfig would not be trained: its prompt or prefix"),
    "prefixes": (peft.PrefixTuningConfig(**PROMPT), "PrefixTuningConfig would not be trained: its prompt or prefix"),
    "AdaLoRA": (peft.AdaLoraConfig(total_step=9), "AdaLoraConfig would not be trained: its ranks"),
    "aLoRA": (LoraConfig(alora_invocation_tokens=[1]), "would not be trained: what alora_invocation_tokens switch"),
    "biases": (LoraConfig(bias="all"), r"beta=0.1 with LoraConfig\(bias='all'\): .* bias='none' or beta=0"),
}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a frozen adapter": (lambda: trained().requires_grad_(False), "no weight of the PeftModel is trained; load"),
    "an adapter beside the path": (lambda: unreached(), "LoraConfig would not be trained: 4 of its 4 tensors, .*lora_A"),
    "weights of the base": (with_trained_norm, r"but 1 trained tensors are the model's own \(.*norm.weight\); freeze"),
    "no second adapter": (
        lambda: trained(REPEATED),
        r"no reference can be kept of LoraConfig: .* by 0\.\d+ of",
    ),
    "transformers' own adapter": (with_own_adapter, "in transformers' own way .*; give the trainer a PeftModel"),
}


def unreached() -> PeftModel:
    """As of a type whose weights are not in the causal LM's forward."""
    model = get_peft_model(base(), LoraConfig(target_modules=["down_proj"]))
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.forward = layer.mlp.down_proj.base_layer.forward
    return model


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_adapters_that_are_refused(tmp_path: Path, config: peft.PeftConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=base(), beta=0.1, peft_config=config)


@pytest.mark.parametrize(("model", "message"), MODELS.values(), ids=MODELS)
def test_models_that_are_refused(tmp_path: Path, model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=model(), beta=0.1)


def test_a_second_adapter_is_refused_and_the_first_one_stays(tmp_path: Path) -> None:
    model = trained()
    before = adapter_weights(model)
    with pytest.raises(ValueError, match=r"an adapter already \(LoraConfig\), which peft_config would erase; leave it out"):
        tiny_trainer(tmp_path, model=model, peft_config=LoraConfig(target_modules=LAYERS))
    assert same(before, adapter_weights(model))


def test_noise_on_the_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5.0 .* the one that samples, .*; leave it out"):
        tiny_trainer(tmp_path, neftune_noise_alpha=5.0)


def test_an_adapter_without_the_name_of_its_base_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no base_model_name_or_path; write it there, or give the model itself"):
        GRPOTrainer(str(tmp_path), even_words, GRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True), PROMPTS)


# ---- Generation defaults


@pytest.mark.parametrize(
    ("defaults", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({"length_penalty": 2.0}, {"eos_token_id": [VOCAB - 1, 5]}),
    ],
)
def test_defaults_that_transformers_does_not_save_are_mended(tmp_path: Path, defaults: dict, kept: dict) -> None:
    model = base()
    for name, value in ({"do_sample": False, "eos_token_id": 5} | defaults).items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Fix these issues"):
        model.save_pretrained(tmp_path / "no")
    run = tiny_trainer(tmp_path, model=model, save_strategy="steps", save_steps=1)
    run.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").generation_config
    assert {name: getattr(loaded, name) for name in kept} == kept
