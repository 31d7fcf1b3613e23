"""GRPO with vLLM in the training process: the trainer's invariants, its log lines, and a reward that rises.

As a script under `accelerate launch` it trains a step and writes what each process has sampled, and its gradient.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig

from grpo_hf.algorithm.objective import Objective
from grpo_hf.cli.train import main
from grpo_hf.rollout import vllm_engine
from grpo_hf.rollout.vllm_engine import VLLMEngine
from grpo_hf.training.guards import GuardError
from grpo_hf.training.trainer import GRPOTrainer
from tests.runs import same, weights
from tests.tiny import Gradients, relative_error, tiny_trainer
from tests.tiny_vllm import STOPS, vllm_model

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


def vllm_trainer(folder: Path, **settings: Any) -> GRPOTrainer:
    """A trainer whose groups vLLM samples."""
    model = vllm_model(tied=True)
    model.generation_config.eos_token_id = list(STOPS)
    return tiny_trainer(folder, model=model, **({"use_vllm": True} | settings))


def test_a_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """The longest prompt has 5 tokens, and a completion may have 8."""
    with pytest.raises(ValueError, match=r"vllm_max_model_length=12 leaves no room for the longest prompt of 5 .* set 13"):
        vllm_trainer(tmp_path, vllm_max_model_length=12)


def lines(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """The log lines of training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_first_ratio_is_one_and_the_engine_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    """Invariant 4 with vLLM; and invariant 5 of every rollout, in the log lines."""
    trainer = vllm_trainer(
        tmp_path, max_steps=6, learning_rate=0.01, steps_per_generation=2, peft_config=LORA if lora else None
    )
    ratios: dict[int, list] = defaultdict(list)
    parts = Objective.parts

    def observed(self, batch, denominators):
        ratios[trainer.state.global_step].append((batch.logprobs - batch.old_logprobs).detach().exp())
        assert (batch.old_logprobs - batch.rollout_logprobs).abs().max() < 1e-3
        return parts(self, batch, denominators)

    monkeypatch.setattr(Objective, "parts", observed)
    trainer.train()
    assert sorted(ratios) == list(range(6))
    for step, found in ratios.items():
        is_first = step % 2 == 0
        assert bool((torch.cat(found) == 1).all()) is is_first
        assert lines(trainer)[step]["clip_ratio/region_mean"] == 0 or not is_first
    for line in lines(trainer):
        assert 0 < line["sampling/sampling_logp_difference/mean"] <= line["sampling/sampling_logp_difference/max"] < 1e-3
        assert 0.99 < line["sampling/importance_sampling_ratio/min"] <= line["sampling/importance_sampling_ratio/mean"]
        assert line["sampling/importance_sampling_ratio/max"] < 1.01
        assert abs(line["sampling/kl"]) < 1e-6
        assert line["sampling/frac_weights_bounded"] == 0


def test_an_engine_with_other_weights_stops_the_run_before_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's CPU build has them when a tied head is not packed anew."""
    monkeypatch.setattr(vllm_engine, "refresh_tied_head", lambda model: None)
    trainer = vllm_trainer(tmp_path)
    before = weights(trainer.model)
    with pytest.raises(GuardError, match=r"by \d.* on average in step 1, above 0.2: it has other weights .*use_vllm=False"):
        trainer.train()
    assert same(weights(trainer.model), before)


def test_a_correction_that_masks_everything_leaves_no_gradient(tmp_path: Path) -> None:
    kept = Gradients()
    settings = {"vllm_importance_sampling_clip_max": 0.5, "vllm_max_model_length": 24}
    trainer = vllm_trainer(tmp_path, callbacks=[kept], **settings)
    assert trainer.stream.sampler.engine.max_model_length == 24
    trainer.train()
    assert lines(trainer)[0]["sampling/frac_weights_bounded"] == 1
    assert all(not gradient.any() for gradient in kept.steps[0].values())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reward_rises(tmp_path: Path, lora: bool) -> None:
    """A fifth of the way and more towards completions of even words only; then the same trainer goes on."""

    def reward(completion: str) -> float:
        words = completion.split()
        return sum(int(word.removeprefix("w")) % 2 == 0 for word in words) / max(len(words), 1)

    settings = {"max_steps": 25, "learning_rate": 0.01, "num_generations": 8, "per_device_train_batch_size": 32}
    trainer = vllm_trainer(tmp_path, reward=reward, peft_config=LORA if lora else None, seed=3, **settings)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert isinstance(trainer.stream.sampler.engine, VLLMEngine)
    trainer.train()
    rewards = [line["reward"] for line in lines(trainer)]
    print(f"\n{'lora' if lora else 'full'}: reward {rewards[0]:.2f} -> {sum(rewards[-5:]) / 5:.2f}")
    assert sum(rewards[-5:]) / 5 > rewards[0] + 0.2
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)
    trainer.evaluate([{"prompt": "w1 w2"}])
    trainer.args.max_steps = 1
    trainer.train()  # its updates are counted from 0 again
    assert lines(trainer)[0]["reward"] > rewards[0] + 0.1


def test_two_processes_sample_and_train_as_one(tmp_path: Path) -> None:
    """An engine in each, whose weights are put together from both; the server's test has whole ones."""
    check_two_processes(tmp_path, "cpu_fsdp2_2proc")


def test_two_processes_that_share_an_engine_sample_as_one(tmp_path: Path) -> None:
    """Each holds half of its weights, samples the other's prompts too, and is given new weights after the first step."""
    check_two_processes(tmp_path, vllm_tensor_parallel_size=2, max_steps=2)


def test_the_recipe_that_make_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut down to two steps."""
    monkeypatch.chdir(Path(__file__).parents[1])
    small = {"model_options": {"warm_up_until": 0.0}, "dataset_options": {"train": 16, "held_out": 4}, "max_steps": 2}
    small |= {"per_device_train_batch_size": 8, "num_generations": 4, "output_dir": str(tmp_path), "disable_tqdm": True}
    recipe = yaml.safe_load(Path("recipes/sorting_lm.yaml").read_text())
    assert recipe["use_vllm"] is True
    changed = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in small.items()]
    assert main(["recipes/sorting_lm.yaml", *changed]) == 0
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert first["sampling/staleness"] == 0


def check_two_processes(folder: Path, config: str = "cpu_2proc", **settings: Any) -> None:
    """The same samples as those of one and, up to the order of sums, the same gradient."""
    launch = ["accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "-m", "tests.test_vllm_training", str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    sampled = json.loads((folder / "0.json").read_text()) + json.loads((folder / "1.json").read_text())
    alone, gradient = one_step(folder, 16, **(settings | {"vllm_tensor_parallel_size": 1}))
    assert sampled == alone
    assert relative_error(torch.load(folder / "0.pt"), gradient) < 1e-4


def one_step(folder: Path, batch: int, **settings: Any) -> tuple[list, dict[str, torch.Tensor]]:
    """Ids of this process's completions, and the gradient."""
    kept = Gradients()
    trainer = vllm_trainer(folder, callbacks=[kept], shuffle_dataset=False, per_device_train_batch_size=batch, **settings)
    trainer.train()
    if (size := settings.get("vllm_tensor_parallel_size", 1)) > 1:
        model = trainer.stream.sampler.engine.part.llm.llm_engine.model_executor.driver_worker.model_runner.model
        rows = [module.weight.shape[0] for name, module in model.named_modules() if name.endswith("embed_tokens")]
        assert rows[0] * size < 2 * trainer.model.get_input_embeddings().weight.shape[0], "it holds its share of the weights"
    assert trainer.rollout is not None
    return [[item.ids for item in group.completions] for group in trainer.rollout.groups], kept.steps[0]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    completions, gradient = one_step(folder, 8, **json.loads(sys.argv[2]))
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(completions))
    torch.save(gradient, folder / f"{rank}.pt")
