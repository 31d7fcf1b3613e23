"""Invariant 5: "After a weight sync the engine's log-probs of its own samples equal the trainer's (float32, < 1e-3
absolute)." """

from __future__ import annotations

from typing import Any

import pytest

from grpo_hf.rollout.vllm_engine import VLLMEngine
from tests.server import Server, engine_of
from tests.tiny_vllm import PROMPTS, check_that_it_follows, difference, sample, serve, update, vllm_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_vllm_in_this_process(engines: dict[str, VLLMEngine], head: str, lora: bool) -> None:
    """After 1, 10 and 100 updates, at two temperatures; under LoRA the base weights stay as they are."""
    engine, model = engines[head], vllm_model(tied=head == "tied", seed=2)
    model = with_lora(model) if lora else model
    serve(engine, model)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    worst = check_that_it_follows(engine, model)
    assert all(p.equal(base[name]) for name, p in model.named_parameters() if name in base)
    print(f"\n{head}, {'lora' if lora else 'full'}: largest difference {worst:.1e}")


def test_an_adapter_alone(text_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held by vLLM beside base weights that are sent once."""
    engine, model = text_engine, text_engine.weights.model
    engine.sync_weights(0)
    monkeypatch.setattr(engine, "_load", lambda weights: pytest.fail("sent the base weights again"))
    done = 0
    for updates in (1, 9, 90):
        update(model, updates)
        done += updates
        engine.sync_weights(done)
        assert difference(model, PROMPTS, sample(engine), 1.0) < 1e-3


@pytest.mark.parametrize("form", ["full", "lora, merge", "lora, adapter"])
def test_vllm_as_a_server(server: Server, form: str) -> None:
    """After 1, 10 and 100 updates, at two temperatures."""
    model: Any = vllm_model(tied=True, seed=2)
    model = model if form == "full" else with_lora(model)
    engine = engine_of(server, model, lora_sync=form.removeprefix("lora, ") if "lora" in form else "merge")
    print(f"\nserver, {form}: largest difference {check_that_it_follows(engine, model):.1e}")
