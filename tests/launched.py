"""What tests start with `accelerate launch recipes/train.py`: a tiny recipe, and what it names."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import PROMPTS, SIZES, VOCAB, WORDS, tiny_tokenizer

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
RECIPE: dict[str, Any] = {
    "model_function": "tests.launched:make_model",
    "dataset_function": "tests.launched:make_data",
    "rewards": [{"name": "tests.tiny:even_words", "in_process": True}],
    "max_steps": 5,
    "learning_rate": 0.01,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "use_cpu": True,
    "use_vllm": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "write_report": False,
    "logging_steps": 1,
    "disable_tqdm": True,
    "lora_r": 8,
}


def make_model(*, seed: int, dies: dict[str, Any] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A decoder whose heads have the smallest size that vLLM's CPU attention knows; one token in ten ends a completion."""
    torch.manual_seed(seed)
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    model.generation_config.eos_token_id = list(range(VOCAB - 10, VOCAB))
    if dies and dies["rank"] == int(os.environ.get("RANK", 0)):
        model.get_input_embeddings().register_forward_hook(Death(**dies))
    return model, tiny_tokenizer()


def make_data(*, uneven: int = 0) -> tuple[Dataset, None]:
    """Six prompts, or so many of 1 to 30 words."""
    generator = random.Random(0)
    lengths = [generator.randint(1, 30) for _ in range(uneven)]
    made = [{"prompt": " ".join(generator.choices(WORDS, k=length))} for length in lengths]
    return Dataset.from_list(made or PROMPTS), None


class Death:
    """Ends its process in a forward pass of training."""

    def __init__(self, *, rank: int, forward: int, how: str):
        self.left, self.how = forward, how

    def __call__(self, module: nn.Module, *inputs: Any) -> None:
        self.left -= torch.is_grad_enabled()
        if self.left == 0 and self.how == "raise":
            raise RuntimeError("this process was told to fail")
        if self.left == 0:
            os.kill(os.getpid(), getattr(signal, self.how))


def write_recipe(folder: Path, **settings: Any) -> Path:
    """The tiny recipe with these settings, of a run in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | {"output_dir": str(folder)} | settings))
    return folder / "recipe.yaml"


def launched(folder: Path, config: str, *, machines: int = 1, processes: int | None = None, **settings: Any) -> list[str]:
    """Run the recipe in ``folder`` under one of accelerate_configs, by one launcher or by one for each of several "machines"
    that meet on the loopback; what each launcher and its processes have said. Raises RuntimeError when one fails."""
    recipe = write_recipe(folder, **settings)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    port = free_port()
    command += ["--main_process_port", str(port)]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    if machines > 1:
        command += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1", "--rdzv_backend", "c10d"]
    launchers, logs = [], [folder / f"launcher-{rank}.log" for rank in range(machines)]
    for rank, log in enumerate(logs):
        place = ["--machine_rank", str(rank), "recipes/train.py", str(recipe)]
        with log.open("w") as said:
            launchers.append(subprocess.Popen([*command, *place], cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said))
        while rank < machines - 1 and is_free(port) and launchers[0].poll() is None:
            time.sleep(0.1)  # the first launcher wants the port for itself, and the others to come later
    try:
        codes = [launcher.wait(timeout=150) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    texts = [log.read_text() for log in logs]
    if any(codes):
        raise RuntimeError("".join(texts))
    return texts


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether nothing listens on it."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def logged(folder: Path, name: str) -> list[float]:
    """A metric of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]
