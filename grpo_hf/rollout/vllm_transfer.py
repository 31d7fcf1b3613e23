"""How weights reach a vLLM server: through vLLM's own weight transfer, over NCCL or by a file that both sides see."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from grpo_hf.files import lock
from grpo_hf.rollout.vllm_client import HOW_TO_START, ServerInfo, ServerLostError, VLLMClient
from grpo_hf.rollout.vllm_plugin import FILE_BACKEND
from grpo_hf.rollout.weight_sync import EngineWeights

logger = logging.get_logger(__name__)

PIECE_BYTES = 2**30
"""Weights are put together and written this many bytes at a time."""
PREFIX = "grpo_hf_weights_"
IN_MEMORY = "/dev/shm"
SECONDS_TO_LOCK = 60
"""More than between making a folder and locking it."""


class WeightTransfer(Protocol):
    """One way of handing weights to a server."""

    def send(self, weights: EngineWeights) -> None:
        """Load them on every worker; raises ServerLostError."""

    def forget(self) -> None:
        """The server has been started anew."""


class FileTransfer:
    """Writes safetensors files, in memory where there is room, which the server's workers map and load."""

    def __init__(self, client: VLLMClient, info: ServerInfo, folder: str | None, port: int):
        self.client, self.folder = client, folder

    def send(self, weights: EngineWeights) -> None:
        """Piece by piece; the last one's room is given back first."""
        start_update(self.client)
        routes = WeightRoutes(self.client)
        for piece in pieces(weights, PIECE_BYTES):
            with shared_folder(sum(tensor.nbytes for tensor in piece.values()), self.folder) as folder:
                path = folder / "weights.safetensors"
                save_file({name: tensor.cpu().contiguous() for name, tensor in piece.items()}, path)
                routes.update_weights({"path": str(path)})
        routes.finish_weight_update()

    def forget(self) -> None:
        """Nothing was agreed on."""


class WeightRoutes:
    """What vLLM's trainer side calls a weight-sync client: its four routes, with the server's key."""

    def __init__(self, client: VLLMClient, *, timeout: float | None = None):
        """``timeout``: seconds that the server may take over weights; None: as long as it takes."""
        self.client, self.timeout = client, timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See vLLM."""
        self.client.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """See vLLM."""
        self.client.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """See vLLM."""
        self.client.post("/update_weights", {"update_info": update_info}, timeout=self.timeout)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See vLLM."""
        self.client.post("/finish_weight_update", {"weight_version": weight_version} if weight_version else None)

    def shutdown_weight_transfer_engine(self) -> None:
        """See vLLM."""
        self.client.post("/shutdown_weight_transfer_engine")


class NCCLTransfer:
    """Broadcasts from the trainer's GPU to the server's, with vLLM's own code on both sides."""

    def __init__(self, client: VLLMClient, info: ServerInfo, folder: str | None, port: int):
        if not torch.cuda.is_available():
            raise ValueError(
                "the vLLM server takes weights over NCCL, but the trainer has no GPU, and NCCL's calls do nothing without "
                f"one; {HOW_TO_START}"
            )
        self.client, self.world_size, self.port = client, info.world_size + 1, port
        self.engine: Any = None

    def send(self, weights: EngineWeights) -> None:
        """vLLM's own trainer side drives the update."""
        source = _source(weights)
        if self.engine is None:
            self.engine = self._connect(source)
        self.engine.source = source
        try:
            self.engine.send_weights()
        except RuntimeError as error:
            raise ServerLostError(f"weights could not be sent over NCCL: {error!r}") from error

    def _connect(self, source: Any) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        address = own_address(self.client.base_url)
        return NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(master_address=address, master_port=self.port, world_size=self.world_size, rank=0),
            client=WeightRoutes(self.client, timeout=self.client.timeout),
            source=source,
        )

    def forget(self) -> None:
        """The communicator went with the server."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


def _source(weights: EngineWeights) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weights.dtype, shape) for name, shape in weights.shapes().items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights)

    return Source()


TRANSFERS: dict[str | None, Callable[..., WeightTransfer]] = {"nccl": NCCLTransfer, FILE_BACKEND: FileTransfer}
"""By the backend that the server was started with."""


def make_transfer(client: VLLMClient, info: ServerInfo, *, folder: str | None, port: int) -> WeightTransfer:
    """The transfer that fits the server; ValueError when there is none."""
    if info.backend not in TRANSFERS:
        raise ValueError(
            f"the vLLM server at {client.base_url} has the weight transfer backend {info.backend!r}, not one of "
            f"{', '.join(map(str, TRANSFERS))}; {HOW_TO_START}"
        )
    return TRANSFERS[info.backend](client, info, folder, port)


def start_update(client: VLLMClient) -> None:
    """Begin a weight update; one that a killed trainer has left open is ended first."""
    client.post("/init_weight_transfer_engine", {"init_info": {}})
    try:
        # The server drops a connection after an error, which nothing else should find in the pool.
        client.post("/start_weight_update", headers={"connection": "close"})
    except ServerLostError:
        client.post("/finish_weight_update")
        client.post("/start_weight_update")


def pieces(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors together as long as they have at most ``limit`` bytes."""
    piece: dict[str, Tensor] = {}
    for name, tensor in chain(weights, [("", None)]):
        if piece and (tensor is None or sum(held.nbytes for held in piece.values()) + tensor.nbytes > limit):
            yield piece
            piece = {}
        if tensor is not None:
            piece[name] = tensor


@contextmanager
def shared_folder(size: int, chosen: str | None) -> Iterator[Path]:
    """A folder for this many bytes that trainer and server both see, for a while; ``chosen``: where to make it.

    What killed trainers have left is removed first: theirs are the folders that nobody holds the lock of.
    """
    for place in [chosen] if chosen else [IN_MEMORY, tempfile.gettempdir()]:
        remove_left(Path(place))
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=chosen or roomy_folder(size)) as folder:
        held = None
        with suppress(OSError):  # a file system without locks
            held = lock(Path(folder, "lock"))
        try:
            yield Path(folder)
        finally:
            if held is not None:
                os.close(held)


def remove_left(place: Path) -> None:
    """Remove the folders for weights there that no living process holds; a new one may not be locked yet."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone by now
            if time.time() - folder.stat().st_mtime > SECONDS_TO_LOCK and (held := lock(folder / "lock")) is not None:
                shutil.rmtree(folder)
                os.close(held)
                logger.warning(f"{folder} is removed: weights that a trainer has left which was killed")


def roomy_folder(size: int) -> str:
    """A folder in memory with room for this many bytes, or else the usual one for temporary files."""
    in_memory = Path(IN_MEMORY)
    roomy = in_memory.is_dir() and shutil.disk_usage(in_memory).free > size + 2**26
    return str(in_memory) if roomy else tempfile.gettempdir()


def own_address(base_url: str) -> str:
    """This machine's address as the server's machine sees it."""
    server = urlsplit(base_url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        probe.connect((server.hostname or "127.0.0.1", server.port or 80))
        return probe.getsockname()[0]
