"""A vLLM server for the tests, started as users start one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from torch import nn
from transformers import PreTrainedModel

from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.vllm_server import VLLMServerEngine
from tests.tiny_models import tiny_tokenizer
from tests.tiny_vllm import SAMPLING, vllm_model

KEY = "a-key-that-nothing-else-holds"


class Server:
    """`grpo-hf serve` of a model whose weights are not the trainer's."""

    def __init__(self, folder: Path, *options: str, model: PreTrainedModel | None = None, max_model_len: int = 62):
        self.folder = folder
        self.options = ["--dtype", "float32", "--max-model-len", str(max_model_len), *options]
        (model or vllm_model(tied=True, seed=99)).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Without waiting for it."""
        program = "import sys; from grpo_hf.cli import main; main(sys.argv[1:])"
        self.log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                program,
                "serve",
                str(self.folder / "model"),
                "--port",
                str(self.port),
                *self.options,
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
            start_new_session=True,
        )

    def wait(self, seconds: float = 300) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """As a machine that goes down."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, how: signal.Signals = signal.SIGINT) -> list[psutil.Process]:
        """As a user who presses Ctrl-C; those of its processes that are left after it."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        self.process.wait(60)
        return psutil.wait_procs(started, timeout=10)[1]

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of a trainer that samples here."""
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": self.url, "vllm_server_timeout": 300} | more


def engine_of(server: Server, model: nn.Module, sampling: Sampling = SAMPLING, **options: Any) -> VLLMServerEngine:
    """An engine that samples there."""
    settings = {"timeout": 60.0, "sampling": sampling, "max_model_length": 60} | options
    return VLLMServerEngine(model, base_url=server.url, **settings)
