"""A vLLM server over HTTP: whether it is there, how it was started, and its routes."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakSet

import httpx
from transformers.utils import logging

logger = logging.get_logger(__name__)

HOW_TO_START = "start one with: grpo-hf serve MODEL (the model that is trained), or give its address as vllm_server_base_url"


KEY = "VLLM_API_KEY"
"""The environment variable that holds the server's key, on its side as on the trainer's, and the only place that does."""


class ServerKeyError(ValueError):
    """The server wants another key."""


class ServerLostError(ConnectionError):
    """The server did not answer, or its engine is dead; it may come back."""


@dataclass(frozen=True)
class ServerInfo:
    """How a server was started."""

    version: str
    """Of vLLM."""
    model: str
    """The name that requests give."""
    dtype: str
    """What it computes in, as torch names it: float32, bfloat16."""
    max_model_len: int
    """Tokens of prompt and completion at most."""
    logprobs_mode: str
    """See vllm_support.logprobs_mode."""
    backend: str | None
    """Of its weight transfer; None when it was started without one."""
    max_lora_rank: int | None
    """None when it was started without adapters."""
    world_size: int
    """Workers over all its parallel forms."""
    extended: bool
    """Whether its workers have the methods of vllm_plugin.WorkerExtension."""


class VLLMClient:
    """The routes of one server; safe to use from several threads."""

    def __init__(self, base_url: str, *, timeout: float):
        """``timeout``: seconds without an answer after which a server that may be starting is given up."""
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._lock = Lock()
        self._open()

    def _open(self) -> None:
        # Sampling takes as long as it takes; whether the server is still there is asked beside it.
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(10.0, read=None, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=4),  # servers drop idle ones after 5 seconds
            trust_env=False,
            event_hooks={"request": [lambda request: request.extensions.update(trace=self._note_socket)]},
            headers={"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {},
        )

    def reopen(self) -> None:
        """End every request in progress with ServerLostError, and go on with new connections."""
        with self._lock:
            sockets, self._sockets = self._sockets, WeakSet()
            connected = list(sockets)
        for item in connected:
            with suppress(OSError):  # it has ended by itself
                item.shutdown(socket.SHUT_RDWR)  # closing it alone would leave a thread that reads from it waiting
        self._http.close()
        self._open()

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._sockets.add(info["return_value"].get_extra_info("socket"))

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST JSON, and the JSON of the answer. Raises ServerLostError, and ValueError with what a server refused."""
        return self._answer("POST", path, json=body, **options)

    def get(self, path: str, **options: Any) -> Any:
        """The same for GET."""
        return self._answer("GET", path, **options)

    def _answer(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: closed in the meantime
            raise ServerLostError(f"{self.base_url}{path}: {error!r}") from error
        if response.status_code == 401:
            raise ServerKeyError(
                f"the vLLM server at {self.base_url} asks for a key, which the environment variable {KEY} does not hold "
                "here; set it to the one that the server was started with"
            )
        if response.status_code >= 500:
            raise ServerLostError(f"{self.base_url}{path} answered {response.status_code}: {response.text[:1000]}")
        if response.status_code >= 400:
            raise ValueError(f"{self.base_url}{path} answered {response.status_code}: {response.text[:1000]}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else None  # others are empty, or say "Success"

    def problem(self) -> str | None:
        """Why it would not sample, asked within 5 seconds; None where it would."""
        try:
            self.get("/health", timeout=5.0)
            if self.get("/is_paused", timeout=5.0)["is_paused"]:
                return "is paused (POST /resume lets it go on)"
        except ServerLostError:
            return "does not answer"
        except ServerKeyError:
            raise
        except ValueError:  # it has no such route
            return None
        return None

    def wait(self) -> str | None:
        """Ask again and again, more and more seldom, for at most ``timeout`` seconds; the problem that is left, if any."""
        deadline, pause, told = time.monotonic() + self.timeout, 0.1, False
        while problem := self.problem():
            if time.monotonic() + pause > deadline:
                return problem
            if not told:
                logger.warning(f"the vLLM server at {self.base_url} {problem}; waiting up to {self.timeout:.0f} s for it")
                told = True
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        return None

    def info(self) -> ServerInfo:
        """How the server was started; ValueError when it was not started for training."""
        try:
            settings = self.get("/server_info", params={"config_format": "json"})["vllm_config"]
            world_size = self.get("/get_world_size")["world_size"]
        except ServerKeyError:
            raise
        except ValueError as error:
            raise ValueError(
                f"the vLLM server at {self.base_url} was started without VLLM_SERVER_DEV_MODE=1, so it cannot be given "
                f"weights; {HOW_TO_START}"
            ) from error
        transfer, lora = settings["weight_transfer_config"] or {}, settings["lora_config"] or {}
        return ServerInfo(
            version=self.get("/version")["version"],
            model=self.models()[0],
            dtype=settings["model_config"]["dtype"].removeprefix("torch."),
            max_model_len=settings["model_config"]["max_model_len"],
            logprobs_mode=settings["model_config"]["logprobs_mode"],
            backend=transfer.get("backend"),
            max_lora_rank=lora.get("max_lora_rank"),
            world_size=world_size,
            extended="grpo_hf" in str(settings["parallel_config"]["worker_extension_cls"]),
        )

    def models(self) -> list[str]:
        """Names that requests can give: the model's, then those of its adapters."""
        return [entry["id"] for entry in self.get("/v1/models")["data"]]

    def weight_version(self) -> str:
        """The name that the last weight sync left; "default" on a server that has just started."""
        return self.get("/weight_info", timeout=60.0)["weight_version"]
