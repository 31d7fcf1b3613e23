"""What grpo_hf adds to a vLLM server: weights from a file that both sides see, log-probs with temperature and filters, and a
key for all routes.

vLLM finds `register` through its plugin entry point in each of its processes, wherever grpo_hf is installed.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_hf.rollout.vllm_client import KEY

FILE_BACKEND = "grpo_hf_file"
"""The weight transfer backend for machines without NCCL: vLLM's own all need CUDA."""


def register() -> None:
    """Make the file backend known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if FILE_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(FILE_BACKEND, _file_engine())


def _file_engine() -> type:
    from safetensors import safe_open
    from vllm.distributed.weight_transfer import base
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class FileInitInfo(base.WeightTransferInitInfo):
        """Nothing to agree on."""

    @dataclass
    class FileUpdateInfo(base.WeightTransferUpdateInfo):
        """Where the weights lie."""

        path: str
        """A safetensors file, on a file system that trainer and server share."""

    class FileWeightTransferEngine(base.WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
        """Maps a file of weights into memory and loads them layer by layer."""

        init_info_cls, update_info_cls = FileInitInfo, FileUpdateInfo

        def init_transfer_engine(self, init_info: FileInitInfo) -> None:
            """Nothing to set up."""

        def start_weight_update(self) -> None:
            """Prepare for weights in a checkpoint's form."""
            keep_experts_packed(self.model)
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: FileUpdateInfo) -> None:
            """Load every tensor of the file."""
            with safe_open(update_info.path, framework="pt") as file:
                weights = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
                self.model.load_weights(weights)  # type: ignore[operator]

        def update_weights(self, update_info: dict[str, Any]) -> None:
            """Without vLLM's wait for a device, which there need not be."""
            self.receive_weights(self.parse_update_info(update_info))

        def finish_weight_update(self) -> None:
            """Put the weights into the form that the kernels take."""
            finalize_layerwise_reload(self.model, self.model_config)
            refresh_tied_head(self.model)

        def shutdown(self) -> None:
            """Nothing to release."""

    return FileWeightTransferEngine


class WorkerExtension:
    """Methods that /collective_rpc finds on vLLM's workers."""

    model_runner: Any

    def grpo_hf_divide_logits(self, divisor: str) -> None:
        """See vllm_support.logprobs_mode: a temperature that "raw_logprobs" see."""
        divide_logits(self.model_runner.get_model(), float(divisor))


class KeyOnEveryRoute:
    """ASGI middleware: without the server's key a request is answered 401, but for whether the server lives.

    vLLM's own looks at the routes of its public interface alone, not at those that take weights.
    """

    def __init__(self, app: Any):
        self.app, self.key = app, f"Bearer {os.environ[KEY]}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand it on, or refuse it."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_request = scope["type"] in ("http", "websocket")
        if not is_request or scope["path"] == "/health" or hmac.compare_digest(given, self.key):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"the key is missing or wrong"})


def refresh_tied_head(model: Any) -> None:
    """On the CPU a head that shares the embeddings' weight multiplies with a packed copy, which a reload leaves stale."""
    head: Any = getattr(model, "lm_head", None)
    head = getattr(head, "base_layer", head)
    if hasattr(head, "quant_method") and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


def keep_experts_packed(model: Any) -> None:
    """On the CPU experts multiply with packed weights, and vLLM packs those of the first load alone: pack each reload's."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        packs = getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu"
        if packs and "process_weights_after_loading" not in vars(method):
            method.process_weights_after_loading = partial(_process_and_pack, method.process_weights_after_loading)


def _process_and_pack(process: Callable[[Any], None], layer: Any) -> None:
    process(layer)
    layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def divide_logits(model: Any, divisor: float) -> None:
    """Make every log-prob and sample that of logits / divisor; the model's own scale of them stays in."""
    processor: Any = getattr(model, "logits_processor", None)
    if not hasattr(processor, "scale"):
        if divisor == 1:
            return
        raise ValueError(
            "top_p, top_k, min_p and repetition_penalty need log-probs before them, and vLLM's form of this model gives no "
            "access to its logits; leave them unset, or set use_vllm=False"
        )
    own = vars(processor).setdefault("scale_before_division", processor.scale)
    processor.scale = own / divisor
