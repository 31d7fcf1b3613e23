"""vLLM as a server: what it samples and from which weights, a whole run, and a server that dies and comes back."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_hf.cli.serve import check_key, check_port, without_key
from grpo_hf.rollout import vllm_server
from grpo_hf.rollout.engine import EngineLostError, sample_groups
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.vllm_client import ServerKeyError, VLLMClient
from grpo_hf.rollout.vllm_server import VLLMServerEngine
from grpo_hf.rollout.vllm_transfer import start_update
from grpo_hf.rollout.weight_sync import StaleEngineError
from tests.conversations import at_once, conversations, one_at_a_time, sampled
from tests.peers import on_processes
from tests.runs import AfterStep, logs, lora, values
from tests.server import KEY, Server, engine_of
from tests.test_vllm_training import check_two_processes, vllm_trainer
from tests.tiny import tiny_model, tiny_trainer
from tests.tiny_vllm import (
    PROMPTS,
    SAMPLING,
    SEEDS,
    STOPS,
    difference,
    ids,
    sample,
    update,
    vllm_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_weights_that_are_no_longer_the_trainers_are_not_sampled_from(server: Server) -> None:
    """Somebody else's sync, or a restart, takes the name away; the groups are sampled again after a new sync."""
    model = vllm_model(tied=True, seed=3)
    engine = engine_of(server, model)
    engine.sync_weights(0)
    expected = ids(sample(engine))
    other = engine_of(server, vllm_model(tied=True, seed=4))
    other.sync_weights(0)
    assert ids(sample(engine)) == expected
    other.weights.forget()
    other.sync_weights(0)
    assert ids(sample(other)) != expected


def test_turns_of_conversations_are_those_asked_for_one_at_a_time(server: Server) -> None:
    """And weights that change between turns are noticed."""
    engine, together, alone = engine_of(server, vllm_model(tied=True, seed=3)), conversations(), conversations()
    engine.sync_weights(0)
    assert len(at_once(engine, SAMPLING, together)) == 24
    one_at_a_time(engine, SAMPLING, alone)
    assert sampled(together) == sampled(alone)
    with pytest.raises(StaleEngineError), engine.requests(SAMPLING) as requests:
        requests.add("first", [5], 1)
        update(engine.weights.model, 1)
        requests.add("second", [6], 1)


def test_weights_that_another_trainer_is_loading_count_as_nobodys(server: Server) -> None:
    """They are in the server and not named yet."""
    model = vllm_model(tied=True, seed=3)
    engine = engine_of(server, model)
    engine.sync_weights(0)
    expected = ids(sample(engine))
    other = engine_of(server, vllm_model(tied=True, seed=4))
    other.weights.run(0, other._load, other._load_adapter)
    assert engine.client.weight_version() == f"in flux by {other.run}"
    assert ids(sample(engine)) == expected


def test_a_temperature_that_an_earlier_run_has_left_is_taken_back(server: Server) -> None:
    """And one that changes from call to call is followed, as in an evaluation."""
    VLLMClient(server.url, timeout=5).post("/collective_rpc", {"method": "grpo_hf_divide_logits", "args": ["0.5"]})
    model = vllm_model(tied=True, seed=3)
    engine = engine_of(server, model)
    engine.sync_weights(0)
    assert difference(model, PROMPTS, sample(engine), 1.0) < 1e-3
    engine.filtered = True  # temperature goes into the logits then
    for temperature in (2.0, 1.0):
        groups = sample(engine, replace(SAMPLING, temperature=temperature))
        assert difference(model, PROMPTS, groups, temperature) < 1e-3
    engine.client.post("/collective_rpc", {"method": "grpo_hf_divide_logits", "args": ["1.0"]})


def test_a_server_that_somebody_pauses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment costs nothing, not even what it was in the middle of; for longer than it may stay away ends the run."""
    monkeypatch.setattr(vllm_server, "LOOK_EVERY", 0.2)
    engine = engine_of(server, vllm_model(tied=True, seed=3), timeout=3.0)
    engine.sync_weights(0)
    expected = ids(sample(engine))
    for mode in ("abort", "keep"):
        asked = sample_groups(engine, PROMPTS, SEEDS, 4, SAMPLING)
        engine.client.post(f"/pause?mode={mode}")
        resume = threading.Timer(1.0, lambda: engine.client.post("/resume"))
        resume.start()
        groups = dict(asked)
        assert ids([groups[number] for number in range(len(PROMPTS))]) == expected
        resume.join()
    engine.client.post("/pause?mode=keep")
    with pytest.raises(EngineLostError, match=r"for 3 s \(vllm_server_timeout\): it is paused \(POST /resume"):
        sample(engine)
    engine.client.post("/resume")


def test_every_route_asks_for_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = VLLMClient(server.url, timeout=5).get("/openapi.json")["paths"]
    assert {"/collective_rpc", "/update_weights", "/pause", "/update_weight_version", "/v1/completions"} <= routes.keys()
    for wrong in ({}, {"Authorization": "Bearer other"}):
        answers = {
            httpx.request(method, server.url + path, headers=wrong).status_code
            for path, methods in routes.items()
            for method in methods
            if path != "/health"
        }
        assert answers == {401}
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ServerKeyError, match="asks for a key, which the environment variable VLLM_API_KEY does not hold"):
        engine_of(server, vllm_model(tied=True))


KEYS: dict[str, tuple[list[str], Any]] = {
    "none": (["--port", "1"], (None, ["--port", "1"])),
    "one": (["--api-key", "a", "--port", "1"], ("a", ["--port", "1"])),
    "the other form": (["--port", "1", "--api_key=a"], ("a", ["--port", "1"])),
}


@pytest.mark.parametrize(("given", "expected"), KEYS.values(), ids=KEYS)
def test_the_key_is_no_argument_of_the_server(given: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert without_key(given) == expected
    with pytest.raises(ValueError, match="--api-key has 2 keys; give one"):
        without_key([*given, "--api-key", "b", "c"][-3:])


def test_a_host_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match=f"--host {host} can be reached .*VLLM_API_KEY to a key of your choice"):
            check_key(host, None)
        check_key(host, "a")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_key(host, None)


def test_a_sync_that_a_killed_trainer_has_left_open_is_ended(server: Server) -> None:
    start_update(VLLMClient(server.url, timeout=5))
    model = vllm_model(tied=True, seed=3)
    engine = engine_of(server, model)
    engine.sync_weights(0)
    assert difference(model, PROMPTS, sample(engine), 1.0) < 1e-3


def test_stop_strings_and_structured_outputs(server: Server) -> None:
    engine = engine_of(server, vllm_model(tied=True, seed=3))
    engine.sync_weights(0)
    free, stopped = sample(engine), sample(engine, replace(SAMPLING, stop_strings=("w4", "w7")))
    ends = {token for token in range(97) if str(token)[0] in "47"}
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        first = next((place for place, token in enumerate(before.ids) if token in ends), None)
        assert after.ids == before.ids[: None if first is None else first + 1]
    eos = SAMPLING.stop_token_ids[-1:]
    regex = replace(SAMPLING, stop_token_ids=eos, regex="(w1|w2)+")
    ((_, group),) = sample_groups(engine, [[5]], [1], 8, regex)
    assert {token for item in group for token in item.ids} <= {1, 2, *eos}
    assert all(item.rollout_logprobs is None for item in group)  # they would be those under the grammar


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_length": 63}, "started for 62 tokens.* make 63: --max-model-len 63"),
        ({"dtype": torch.bfloat16}, "computes in float32, the trainer in bfloat16: --dtype bfloat16"),
        ({"sampling": replace(SAMPLING, top_p=0.9)}, "--logprobs-mode raw_logprobs"),
    ],
    ids=["context", "dtype", "filters"],
)
def test_a_server_that_was_started_otherwise_is_refused(server: Server, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(server, vllm_model(tied=True), **options)


def test_a_port_that_is_taken_is_refused(server: Server) -> None:
    with pytest.raises(ValueError, match=f"127.0.0.1:{server.port}.*choose another with --port"):
        check_port("127.0.0.1", server.port)


def test_no_server_is_refused_with_how_to_start_one() -> None:
    with pytest.raises(EngineLostError, match=r"no vLLM server .* at http://127.0.0.1:9 for 1 s .*grpo-hf serve"):
        VLLMServerEngine(vllm_model(), base_url="http://127.0.0.1:9", timeout=1, sampling=SAMPLING, max_model_length=24)


def even(completion: str) -> float:
    """The share of even words."""
    words = completion.split()
    return sum(int(word.removeprefix("w")) % 2 == 0 for word in words) / max(len(words), 1)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_reward_rises(server: Server, tmp_path: Path, ahead: int) -> None:
    settings = {"max_steps": 25, "learning_rate": 0.01, "num_generations": 8, "per_device_train_batch_size": 32}
    trainer = vllm_trainer(tmp_path, reward=even, seed=3, **server.settings(**settings, rollout_ahead=ahead))
    trainer.train()
    rewards = values(trainer, "reward")
    print(f"\nahead {ahead}: reward {rewards[0]:.2f} -> {sum(rewards[-5:]) / 5:.2f}")
    assert sum(rewards[-5:]) / 5 > rewards[0] + 0.2
    # A step whose groups all agree has nothing to compare.
    worst = max(line.get("sampling/sampling_logp_difference/max", 0.0) for line in logs(trainer))
    assert (worst < 1e-3) is (ahead == 0)
    assert values(trainer, "sampling/staleness") == [0] + [ahead] * 24


def test_the_samples_are_those_of_vllm_in_process(server: Server, tmp_path: Path) -> None:
    """The same prompts, seeds and weights, so the same first rollout whatever samples it."""
    first = []
    for settings in (server.settings(), {"use_vllm": True}):
        trainer = vllm_trainer(tmp_path, max_steps=1, **settings)
        trainer.train()
        first.append(ids([group.completions for group in trainer.rollout.groups]))
    assert first[0] == first[1]


def test_two_processes_share_the_server(server: Server, tmp_path: Path) -> None:
    check_two_processes(tmp_path, **server.settings())


def test_lora_by_its_adapter_alone(server: Server, tmp_path: Path) -> None:
    trainer = vllm_trainer(
        tmp_path,
        max_steps=4,
        learning_rate=0.01,
        peft_config=lora(),
        **server.settings(vllm_lora_sync="adapter", save_strategy="steps"),
    )
    trainer.train()
    assert max(values(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if KEY.encode() in path.read_bytes()]


def test_qlora(tmp_path: Path) -> None:
    """The 4-bit base never travels, and its bytes stay; a server of that base agrees, until another run has been there."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    base = tiny_model("qwen3", **sizes)
    base.generation_config.eos_token_id = list(STOPS)
    base.save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def four_bit() -> Any:
        options = {"quantization_config": quantized, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    server = Server(tmp_path, "--enable-lora", "--max-lora-rank", "8", model=four_bit().dequantize())
    server.start()
    server.wait()
    options = server.settings(vllm_lora_sync="adapter", learning_rate=0.01, max_steps=4)
    trainer = tiny_trainer(tmp_path / "run", model=four_bit(), peft_config=lora(), beta=0.1, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert any(p.dtype == torch.uint8 for p in before.values())
    trainer.train()
    assert max(values(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    assert min(values(trainer, "grad_norm")) > 0 and values(trainer, "kl")[0] == 0 < values(trainer, "kl")[-1]
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    tiny_trainer(tmp_path / "full", model=tiny_model("qwen3", **sizes), **server.settings()).train()
    with pytest.raises(EngineLostError, match=r"it has the base weights of another run .*; restart it"):
        tiny_trainer(tmp_path / "again", model=four_bit(), peft_config=lora(), **options).train()
    server.stop()


def test_a_killed_server_costs_no_prompt(server: Server, tmp_path: Path) -> None:
    """SIGKILL in mid-rollout: once it is back it gets the weights again, and the run is the one that had no fault."""
    expected = vllm_trainer(tmp_path / "whole", max_steps=4, learning_rate=0.01, **server.settings())
    expected.train()

    def kill_and_restart() -> None:
        time.sleep(0.05)  # requests are on their way
        server.kill()
        server.start()

    def at_step(state: Any, model: nn.Module) -> None:
        if state.global_step == 2:
            threading.Thread(target=kill_and_restart).start()

    trainer = vllm_trainer(
        tmp_path / "killed", max_steps=4, learning_rate=0.01, callbacks=[AfterStep(at_step)], **server.settings()
    )
    trainer.train()
    for name in ("reward", "loss", "completions/mean_length"):
        assert values(trainer, name) == pytest.approx(values(expected, name), rel=1e-4)


def test_a_server_that_is_killed_between_turns_is_asked_for_them_again(server: Server) -> None:
    """By two processes, one with five conversations and the other with three shorter ones; both get the same tokens."""
    whole, models = conversations(), [vllm_model(tied=True, seed=3) for _ in range(3)]
    engine = engine_of(server, models[2])
    engine.sync_weights(0)
    at_once(engine, SAMPLING, whole)

    def restart(count: int) -> None:
        if count == 3:
            server.kill()
            server.start()

    def work(peers: Peers) -> list[list[list[int]]]:
        engine = engine_of(server, models[peers.rank], peers=peers, timeout=300.0)
        engine.sync_weights(0)
        own = [conversations()[:5], conversations()[5:]][peers.rank]
        if peers.rank == 0:
            at_once(engine, SAMPLING, own, after=restart)
        else:
            at_once(engine, SAMPLING, own, turns=2)
        return sampled(own)

    first, second = on_processes(work)
    assert first == sampled(whole)[:5]
    assert second == [turns[:2] for turns in sampled(whole)[5:]]


def test_a_server_that_stays_away_stops_the_run_with_its_work_saved(server: Server, tmp_path: Path) -> None:
    """And the run goes on from there once there is one again."""

    def stop(state: Any, model: nn.Module) -> None:
        if state.global_step == 2:
            assert server.stop(signal.SIGTERM) == []

    settings = server.settings(max_steps=4, learning_rate=0.01, vllm_server_timeout=2, save_strategy="no")
    with pytest.raises(EngineLostError, match="no vLLM server"):
        vllm_trainer(tmp_path, callbacks=[AfterStep(stop)], **settings).train()
    server.start()
    server.wait()
    trainer = vllm_trainer(tmp_path, **settings | {"vllm_server_timeout": 60})
    trainer.train(resume_from_checkpoint="auto")
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
