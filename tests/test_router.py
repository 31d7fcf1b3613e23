"""The load-balancing loss of a mixture of experts: transformers' own on the same rows, however they are laid out and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig
from transformers.models.mixtral import modeling_mixtral

from grpo_hf.algorithm.router import RouterLoss, expert_load, load_balancing
from grpo_hf.packing.choose import choose_router_loss
from grpo_hf.packing.layout import inputs_of, pack, pad
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Update
from grpo_hf.training.models import causal_lm
from grpo_hf.types import TrainingSample
from tests.runs import logs, values, weights
from tests.samples import samples_that_share
from tests.test_policy import COUNTS, make_policy
from tests.tiny import tiny_trainer
from tests.tiny_models import MIXTURES, gradient_of, relative_error, tiny_model

COEFFICIENT = 0.3
ROUTER = RouterLoss(COEFFICIENT, experts_per_token=2)


def without_advantages(samples: list[TrainingSample]) -> list[TrainingSample]:
    """What is left of the loss is the router's."""
    return [replace(item, advantages=torch.zeros_like(item.advantages)) for item in samples]


def of_rows(model: nn.Module, samples: list[TrainingSample]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss as transformers takes it of padded rows, and its gradient."""
    model.zero_grad()
    rows = [torch.tensor(inputs_of(item)) for item in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    lm: Any = causal_lm(model)
    lm.set_attn_implementation("eager")
    aux_loss = lm(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    (COEFFICIENT * aux_loss).backward()
    return aux_loss.item(), whole_gradient(model)


def whole_gradient(model: nn.Module) -> dict[str, torch.Tensor]:
    """With zeros for what the loss does not reach: the head and the last layer's experts."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    return gradient_of(model)


def test_literally() -> None:
    """Two layers, three tokens of which one counts twice and one is padding; two experts, one a token."""
    p = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[0.7, 0.3], [0.9, 0.1], [0.5, 0.5]]])
    load = expert_load([layer.log() for layer in p], torch.tensor([2, 1, 0]), 1)
    torch.testing.assert_close(load, torch.tensor([[2.0 + 3, 1.0 + 0], [2.0 + 2.3, 1.0 + 0.7]]))
    whole = load_balancing(*load, 1)
    assert whole.item() == pytest.approx(2 * (5 / 6 * 4.3 / 6 + 1 / 6 * 1.7 / 6))
    parts = [expert_load([layer.log() for layer in p], torch.tensor(c), 1) for c in ([2, 0, 0], [0, 1, 0])]
    sent = parts[0][0] + parts[1][0]
    assert sum(load_balancing(sent, part[1], 1) for part in parts).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("seed", range(20))
def test_how_many_samples_have_a_position(seed: int) -> None:
    samples = samples_that_share(seed)
    tokens = sum(len(inputs_of(item)) for item in samples)
    padded = pad(samples, tokens_per_microbatch=60)
    for batches in (pack(samples, tokens_per_microbatch=10**6), pack(samples, tokens_per_microbatch=12), padded):
        assert sum(int(batch.shared_by.sum()) for batch in batches) == tokens
    for batch in padded:
        assert batch.attention_mask is not None and torch.equal(batch.shared_by, batch.attention_mask.flatten())


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("how", ["packed", "padded", "cut", "lora", "checkpointed"])
def test_it_is_that_of_padded_rows(family: str, how: str) -> None:
    model: Any = tiny_model(family).train()
    if how == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    samples = without_advantages(samples_that_share(3))
    expected, gradient = of_rows(model, samples)
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = "padded" if how == "padded" else "packed"
    policy = make_policy(model, budget=12 if how == "cut" else 10**6, layout=layout, router=ROUTER)
    model.zero_grad()
    report = policy.forward_backward(Update(samples, COUNTS), step=1)
    assert report.aux_loss is not None and report.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert report.loss.item() == pytest.approx(COEFFICIENT * expected, rel=1e-5)
    assert (len(report.batches) > 1) == (how == "cut")
    assert relative_error(whole_gradient(model), gradient) < 1e-5


def test_on_two_processes_it_is_the_same() -> None:
    """Each has some of the samples, and takes its share of the loss with the load of all."""
    samples = without_advantages(samples_that_share(3))
    model = tiny_model("mixtral")
    expected, gradient = of_rows(model, samples)

    parts = [Update(mine, replace(COUNTS, num_processes=2)) for mine in (samples[:2], samples[2:])]
    policies = [make_policy(tiny_model("mixtral"), router=ROUTER) for _ in parts]
    # One after the other: transformers catches the router's logits in a place that threads would share.
    sent = [policy._sent_to_experts(policy.microbatches(part)).cpu() for policy, part in zip(policies, parts, strict=True)]
    for rank, policy in enumerate(policies):
        policy.peers = Peers(rank, 2, lambda item: sent)
    (first, second) = (policy.forward_backward(part, step=1) for policy, part in zip(policies, parts, strict=True))
    assert first.aux_loss is not None and second.aux_loss is not None
    assert (first.aux_loss + second.aux_loss).item() / 2 == pytest.approx(expected, rel=1e-5)
    grads, others = (whole_gradient(policy.inner) for policy in policies)
    mean = {name: (grads[name] + others[name]) / 2 for name in grads}
    assert relative_error(mean, gradient) < 1e-5


def test_it_is_added_to_the_objective_and_costs_a_forward_pass() -> None:
    """g = g of the objective + c g of the loss; without it the model runs as often as there are micro-batches."""
    samples, gradients, forwards = samples_that_share(3), {}, {}
    for name, router, trained in (
        ("objective", None, samples),
        ("loss", ROUTER, without_advantages(samples)),
        ("both", ROUTER, samples),
    ):
        calls: list[bool] = []
        policy = make_policy(tiny_model("mixtral"), budget=12, router=router)
        decoder: Any = policy.inner.get_decoder()  # type: ignore[operator]
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append("output_router_logits" in kwargs), with_kwargs=True
        )
        report = policy.forward_backward(Update(trained, COUNTS), step=1)
        gradients[name], forwards[name] = whole_gradient(policy.inner), len(calls) / len(report.batches)
        assert all(calls) if router else not any(calls)
        assert (report.aux_loss is None) == (router is None)
    together = {name: grad + gradients["loss"][name] for name, grad in gradients["objective"].items()}
    assert relative_error(gradients["both"], together) < 1e-5
    assert forwards == {"objective": 1, "loss": 2, "both": 2}


def test_an_idle_update_adds_nothing() -> None:
    policy = make_policy(tiny_model("mixtral"), router=ROUTER)
    report = policy.forward_backward(Update(samples_that_share(3), COUNTS, idle=True), step=1)
    assert report.loss.item() == 0 and not any(grad.any() for grad in whole_gradient(policy.inner).values())


def same(prompts: list[Any], **row: Any) -> list[float]:
    return [1.0 for _ in prompts]


@pytest.mark.parametrize(("coefficient", "learns"), [(None, True), (0.5, True), (0, False)])
def test_a_run_logs_it_and_learns_from_it_alone(tmp_path: Path, coefficient: float | None, learns: bool) -> None:
    """The config's coefficient is the default, as in TRL; every sample counts, with signal or without."""
    model = tiny_model("mixtral")
    before = weights(model)
    run = tiny_trainer(tmp_path, model=model, reward=same, router_aux_loss_coef=coefficient)
    run.train()
    assert run.aux_loss_enabled == learns
    assert ("aux_loss" in logs(run)[0]) == learns
    if learns:
        assert 1.9 < values(run, "aux_loss")[0] < 4  # 2 where experts are used evenly, two a token; 4 where two are
        assert values(run, "loss")[0] == pytest.approx((coefficient or 0.001) * values(run, "aux_loss")[0], rel=1e-4)
    assert any(not torch.equal(p, before[name]) for name, p in weights(model).items()) == learns


def test_what_has_no_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1, but qwen2 is no mixture of experts .*leave it out"):
        tiny_trainer(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=-1.* >= 0 is needed"):
        tiny_trainer(tmp_path, router_aux_loss_coef=-1)


OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    "gpt_oss": {"num_local_experts": 4},
}
"""Families whose loss is transformers', beside MIXTURES."""

WITHOUT: dict[str, Any] = {"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
"""Of GLM-4's experts, which are balanced otherwise: transformers has no loss for them."""


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_have_it(family: str) -> None:
    model = tiny_model(family, **{"num_experts_per_tok": 2} | OTHERS[family])
    assert choose_router_loss(model, [1, 2, 3]) == RouterLoss(model.config.router_aux_loss_coef, 2)


def test_a_model_without_such_a_loss_trains_unless_it_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model("glm4_moe", **WITHOUT)
    with pytest.raises(ValueError, match=r"_coef=0.1, but Glm4MoeForCausalLM has no load-balancing loss .*; leave it out"):
        tiny_trainer(tmp_path, model=model, router_aux_loss_coef=0.1)
    model.config.router_aux_loss_coef = 0.1
    run = tiny_trainer(tmp_path, model=model)
    run.train()
    assert not run.aux_loss_enabled and values(run, "grad_norm")[0] > 0


def test_another_loss_of_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args: 2 * own(*args))
    with pytest.raises(ValueError, match=r"=0.001 in its config, but .* on a prompt it differs by \d.*_coef=0"):
        choose_router_loss(tiny_model("mixtral"), [1, 2, 3])


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_a_config_may_ask_for_router_logits(tmp_path: Path, coefficient: float | None) -> None:
    """transformers' own generate ends in an error with them, for it takes the loss of one new token a row."""
    model = tiny_model("mixtral", output_router_logits=True)
    run = tiny_trainer(tmp_path, model=model, router_aux_loss_coef=coefficient, save_strategy="steps", save_steps=1)
    run.train()
    assert values(run, "grad_norm")[0] > 0 and ("aux_loss" in logs(run)[0]) == (coefficient is None)
    assert AutoConfig.from_pretrained(tmp_path / "checkpoint-1").output_router_logits
