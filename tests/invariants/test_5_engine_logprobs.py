"""Invariant 5: "After a weight sync the engine's log-probs of its own samples equal the trainer's (float32, < 1e-3
absolute)." """

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.rollout.weight_sync import LORA_SYNCS
from tests.server import Server, engine_of
from tests.tiny_vllm import (
    PROMPTS,
    SAMPLING,
    check_that_it_follows,
    difference,
    sample,
    serve,
    update,
    vllm_model,
    with_lora,
)

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


HEAD = {"target_modules": ["q_proj", "lm_head"]}
EXPERTS = [("qwen3_moe", None), ("qwen3_moe", HEAD), ("mixtral", None)]


def other_model(family: str, lora: dict | None) -> Any:
    model = vllm_model(family, seed=2)
    return model if lora is None else with_lora(model, **lora)


@pytest.mark.parametrize("sync", LORA_SYNCS)
def test_lora_on_the_head(sync: str) -> None:
    model = other_model("llama", HEAD)
    KEPT.append(VLLMEngine(model, sampling=SAMPLING, max_model_length=60, lora_sync=sync))
    assert check_that_it_follows(KEPT[-1], model) < 1e-3


KEPT: list[VLLMEngine] = []
"""An engine that goes takes the process group of the others along."""


def test_experts_in_a_process() -> None:
    """Of its own: vLLM has no room for experts where it has begun without."""
    command = [sys.executable, "-m", "tests.invariants.test_5_engine_logprobs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.stdout.count("follows its experts") == len(EXPERTS), done.stderr[-3000:]


def follow_experts() -> None:
    """After 1, 10 and 100 updates, at two temperatures."""
    for family, lora in EXPERTS:
        model = other_model(family, lora)
        KEPT.append(VLLMEngine(model, sampling=SAMPLING, max_model_length=60))
        print(f"{family} follows its experts, largest difference {check_that_it_follows(KEPT[-1], model):.1e}", flush=True)


@pytest.fixture(scope="module")
def server_of_experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("experts"), model=vllm_model("mixtral", seed=99))
    server.start()
    server.wait()
    yield server
    server.stop()


@pytest.mark.parametrize("lora", [None, HEAD], ids=["full", "LoRA on the head"])
def test_experts_on_a_server(server_of_experts: Server, lora: dict | None) -> None:
    """After 1, 10 and 100 updates, at two temperatures."""
    model = other_model("mixtral", lora)
    assert check_that_it_follows(engine_of(server_of_experts, model), model) < 1e-3


@pytest.mark.parametrize("form", ["full", "lora, merge", "lora, adapter"])
def test_vllm_as_a_server(server: Server, form: str) -> None:
    """After 1, 10 and 100 updates, at two temperatures."""
    model: Any = vllm_model(tied=True, seed=2)
    model = model if form == "full" else with_lora(model)
    engine = engine_of(server, model, lora_sync=form.removeprefix("lora, ") if "lora" in form else "merge")
    print(f"\nserver, {form}: largest difference {check_that_it_follows(engine, model):.1e}")


if __name__ == "__main__":
    follow_experts()
