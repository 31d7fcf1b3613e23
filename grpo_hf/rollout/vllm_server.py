"""vLLM as a server: requests over HTTP, from weights that are proved to be the trainer's."""

from __future__ import annotations

import math
import uuid
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from grpo_hf.rollout import vllm_support
from grpo_hf.rollout.engine import EngineLostError, Request, Sampling
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.vllm_client import HOW_TO_START, ServerInfo, ServerLostError, VLLMClient
from grpo_hf.rollout.vllm_transfer import make_transfer, shared_folder
from grpo_hf.rollout.weight_sync import EngineWeights, WeightSync, save_adapter
from grpo_hf.types import Completion

logger = logging.get_logger(__name__)

AT_A_TIME = 512
"""Requests of one process that are with the server at a time."""
LOOK_EVERY = 10.0
"""Seconds without an answer after which the server is asked whether it is still there."""
OWN_BASE = "base/"
"""Begins the names of weights whose base is the one that the server was started with."""
TRIES = 3
"""Weight syncs that a server which stays up may fail, and times in a row that it may lose all that it was asked for."""


class VLLMServerEngine:
    """Samples this process's prompts on a server that all processes share.

    Process 0 hands the server weights, and what their logits are divided by, under a name that no other sync has; while it
    does, the server has none that counts. An answer counts only if the server still has that name after it has arrived: a
    server that was started anew, or that another trainer uses, has lost it. What was under way when the server went is
    sampled again, with the same seeds, once it is back and has the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        base_url: str,
        timeout: float,
        sampling: Sampling,
        max_model_length: int,
        dtype: torch.dtype | None = None,
        lora_sync: str = "merge",
        weights_folder: str | None = None,
        group_port: int = 51216,
        peers: Peers = ALONE,
    ):
        """As VLLMEngine. ``timeout``: seconds that the server may stay away. ``weights_folder``: where files that server
        and trainer both see are written; ``group_port``: for NCCL. Raises EngineLostError when there is no server."""
        self.client, self.peers, self.folder = VLLMClient(base_url, timeout=timeout), peers, weights_folder
        lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        vllm_support.check_context(lm.config, max_model_length)
        vllm_support.check_sampling(sampling)
        self.filtered = vllm_support.has_filters(sampling)
        self.weights = WeightSync(model, dtype or lm.dtype, lora_sync)
        self._wait_until_up()
        self.info = self.client.info()
        check_server(self.info, base_url, self.weights, sampling, max_model_length)
        self.transfer = make_transfer(self.client, self.info, folder=weights_folder, port=group_port)
        self.run, self.syncs, self.version = self.peers.gather(uuid.uuid4().hex)[0], 0, 0
        self.adapter: str | None = None
        self.divisor = self._divisor(sampling)
        self.named: str | None = None
        """What the server was last told."""
        self.threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="vllm")

    # ---- Weights

    def sync_weights(self, version: int) -> None:
        """See Engine.sync_weights; does nothing when the server has them."""
        self.version = version
        for attempt in range(1, TRIES + 1):
            problem = None
            self.syncs += self.weights.held != self.weights.stamp(version)
            try:
                self.weights.run(version, self._load, self._load_adapter)
                if self.peers.rank == 0 and self.named != self._name():
                    self._name_weights()
            except (OSError, ValueError) as error:  # the other processes must hear of it
                problem = str(error)
            problems = [text for text in self.peers.gather(problem) if text]
            if not problems:
                self.named = self._name()
                return
            self._forget()
            if attempt == TRIES:
                raise EngineLostError(f"the vLLM server at {self.client.base_url} did not take weights: {problems[0]}")
            self._wait_until_up()

    def _load(self, weights: EngineWeights) -> None:
        if self.peers.rank == 0:
            self._in_flux()
            self.transfer.send(weights)
        elif self.weights.sharded:
            for _ in weights:  # every process has to take part in putting them together
                pass

    def _load_adapter(self, weights: dict[str, Tensor]) -> None:
        before, self.adapter = self.adapter, f"{self.run}-{self.syncs}"
        if self.peers.rank > 0:
            return
        if self.weights.base_stays and not (found := self.client.weight_version()).startswith(("default", OWN_BASE)):
            raise ValueError(
                f"it has the base weights of another run ({found}), not those that it was started with; restart it"
            )
        self._in_flux()
        with shared_folder(sum(tensor.nbytes for tensor in weights.values()), self.folder) as folder:
            save_adapter(self.weights.model, weights, folder)
            self.client.post("/v1/load_lora_adapter", {"lora_name": self.adapter, "lora_path": str(folder)})
        if before in self.client.models():
            self.client.post("/v1/unload_lora_adapter", {"lora_name": before})

    def _in_flux(self) -> None:
        """From here on no group counts, this trainer's or another's, until the server is named again."""
        self.client.post("/update_weight_version", {"new_version": f"in flux by {self.run}"})

    def _name_weights(self) -> None:
        if self.info.extended:  # a temperature that an earlier run has left would stay
            self._in_flux()
            self.client.post("/collective_rpc", {"method": "grpo_hf_divide_logits", "args": [str(self.divisor)]})
        self.client.post("/reset_prefix_cache")  # keys and values of the old weights would be taken for the new ones'
        self.client.post("/update_weight_version", {"new_version": self._name()})

    def _name(self) -> str:
        return f"{OWN_BASE if self.weights.base_stays else ''}{self.run}/{self.syncs}/{self.divisor:g}"

    def _divisor(self, sampling: Sampling) -> float:
        """What the server's logits are divided by: a temperature that goes into log-probs before filters."""
        return sampling.temperature or 1.0 if self.filtered and self.info.extended else 1.0

    def _forget(self) -> None:
        """The server may have lost all that it was given."""
        self.weights.forget()
        self.transfer.forget()
        self.named = None

    # ---- Samples

    def requests(self, sampling: Sampling) -> ServerRequests:
        """See Engine.requests."""
        vllm_support.check_sampling(sampling)
        if self.divisor != (divisor := self._divisor(sampling)):
            self.divisor = divisor
            self.sync_weights(self.version)
        return ServerRequests(self, sampling)

    def abort(self) -> None:
        """See Engine.abort; the server notices that nobody waits for it."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="vllm")
        self.client.reopen()

    def restore(self) -> None:
        """Wait for a server that was lost, all processes together, and give it the trainer's weights."""
        self._wait_until_up()
        self._forget()
        self.sync_weights(self.version)

    def _wait_until_up(self) -> None:
        """All processes together, so that either all go on or all stop."""
        if problems := [problem for problem in self.peers.gather(self.client.wait()) if problem]:
            raise EngineLostError(
                f"no vLLM server samples at {self.client.base_url} for {self.client.timeout:.0f} s (vllm_server_timeout): "
                f"it {problems[0]}; {HOW_TO_START}"
            )


class ServerRequests:
    """See Requests: each is an HTTP request, in a thread of its own, and the server has them from when they are added.

    One that is lost with the server is asked again once nothing else of this process is with the server, and all others
    have come as far or are through: weights come from all processes together.
    """

    patience = 0.0

    def __init__(self, engine: VLLMServerEngine, sampling: Sampling):
        self.engine, self.sampling, self.threads = engine, sampling, engine.threads
        self.ask = _Ask(engine, sampling)
        self.asked: dict[Future[list[Completion] | None], Request] = {}
        """Those that are with the server, or in line."""
        self.answers: SimpleQueue[Future[list[Completion] | None]] = SimpleQueue()
        """Those of them that have ended, one way or the other."""
        self.lost: list[Request] = []
        self.heard, self.failures, self.progress = monotonic(), 0, 0
        """When something last ended; how often nothing came back between two losses; what has since the last one."""

    def __enter__(self) -> ServerRequests:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self.asked and self.threads is self.engine.threads:
            self.engine.abort()
        self.asked, self.lost = {}, []
        while kind is None and self._recover():  # until all processes are through
            pass

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """See Requests.add."""
        self.engine.weights.check()
        limit = self.sampling.max_completion_length if max_tokens is None else max_tokens
        vllm_support.check_request(ids, limit, self.engine.info.max_model_len)
        self._submit(Request(key, ids, seed, count, limit))

    def _submit(self, request: Request) -> None:
        future = self.threads.submit(self.ask, request)
        self.asked[future] = request
        future.add_done_callback(self.answers.put)

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """See Requests.finished. Raises EngineLostError when the server stays away, or is of no use."""
        end = math.inf if timeout is None else monotonic() + timeout
        found: list[tuple[Hashable, list[Completion]]] = []
        while not found:
            if self.asked:
                found = self._answered(max(0.0, min(LOOK_EVERY, end - monotonic())))
            elif self.lost:
                self._recover()
            else:
                break
            if monotonic() >= end:
                break
        return found

    def _answered(self, timeout: float) -> list[tuple[Hashable, list[Completion]]]:
        """What has ended within the time and was not lost; after some time without, an eye on the server."""
        found = []
        try:
            future = self.answers.get(timeout=timeout)
            while True:
                self.heard, request, completions = monotonic(), self.asked.pop(future), future.result()
                if completions is None:
                    self.lost.append(request)
                else:
                    found.append((request.key, completions))
                future = self.answers.get_nowait()
        except Empty:
            pass
        self.progress += len(found)
        client = self.engine.client
        if monotonic() - self.heard > LOOK_EVERY:
            if client.problem() and client.wait():
                client.reopen()  # which ends all that were waiting for it
            self.heard = monotonic()
        return found

    def _recover(self) -> bool:
        """Together with all processes, none of which has anything with the server: whether any has lost requests. They are
        asked again, of a server that has the trainer's weights."""
        engine = self.engine
        everyone = engine.peers.gather((len(self.lost), self.progress))
        count, progress = map(sum, zip(*everyone, strict=True))
        if not count:
            return False
        self.failures = 0 if progress else self.failures + 1
        self.progress = 0
        if self.failures >= TRIES:
            raise EngineLostError(
                f"the vLLM server at {engine.client.base_url} loses this trainer's weights again and again; is another "
                "trainer using it? Each needs a server of its own"
            )
        logger.warning(f"the vLLM server at {engine.client.base_url} was lost; {count} requests are sampled again")
        engine.restore()
        self.ask = _Ask(engine, self.sampling)
        lost, self.lost = self.lost, []
        for request in lost:
            self._submit(request)
        return True


class _Ask:
    """One request: its completions, or None when the server was lost or has other weights."""

    def __init__(self, engine: VLLMServerEngine, sampling: Sampling):
        self.client, self.version = engine.client, engine._name()
        self.comparable = vllm_support.comparable_logprobs(sampling, filtered=engine.filtered)
        self.body = vllm_support.request_options(sampling) | {
            "model": engine.adapter or engine.info.model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # no text where only numbers are read
            "add_special_tokens": False,
        }
        if engine.filtered and engine.info.extended:  # the temperature is in the logits, see logprobs_mode
            self.body["temperature"] = 0.0 if sampling.temperature == 0 else 1.0

    def __call__(self, request: Request) -> list[Completion] | None:
        body = {"prompt": request.ids, "seed": request.seed, "n": request.count, "max_tokens": request.max_tokens}
        try:
            answer = self.client.post("/v1/completions", self.body | body)
            whole = all(choice["finish_reason"] != "abort" for choice in answer["choices"])  # by somebody's /pause
            return [self._completion(choice) for choice in answer["choices"]] if whole and self._is_current() else None
        except ServerLostError:
            return None
        except ValueError:
            if self._is_current():
                raise
            return None

    def _is_current(self) -> bool:
        try:
            return self.client.weight_version() == self.version
        except ServerLostError:
            return False

    def _completion(self, choice: dict[str, Any]) -> Completion:
        return Completion(
            ids=choice["token_ids"],
            truncated=choice["finish_reason"] == "length",
            rollout_logprobs=choice["logprobs"]["token_logprobs"] if self.comparable else None,
        )


def check_server(info: ServerInfo, url: str, weights: WeightSync, sampling: Sampling, max_model_length: int) -> None:
    """Raise ValueError for a server that was started otherwise than this run needs, with what to start it with."""
    vllm_support.check_version(info.version, f"the vLLM server at {url}")
    dtype = str(weights.dtype).removeprefix("torch.")
    wrong = []
    if info.max_model_len < max_model_length:
        wrong.append(
            f"it was started for {info.max_model_len} tokens, but the longest prompt and max_completion_length make "
            f"{max_model_length}: --max-model-len {max_model_length}"
        )
    if info.dtype != dtype:
        wrong.append(f"it computes in {info.dtype}, the trainer in {dtype}: --dtype {dtype}")
    if info.logprobs_mode != vllm_support.logprobs_mode(sampling) and (
        sampling.temperature != 1 or vllm_support.has_filters(sampling)
    ):
        wrong.append(
            f"it gives {info.logprobs_mode}, which with this temperature or these filters are of another distribution than "
            f"the one that is trained: --logprobs-mode {vllm_support.logprobs_mode(sampling)}"
        )
    if vllm_support.has_filters(sampling) and sampling.temperature != 1 and not info.extended:
        wrong.append(
            "filters and a temperature together need --worker-extension-cls grpo_hf.rollout.vllm_plugin.WorkerExtension"
        )
    if weights.adapter_only:
        rank = vllm_support.lora_options(weights.model)["max_lora_rank"]
        if (info.max_lora_rank or 0) < rank:
            wrong.append(f"vllm_lora_sync='adapter' needs room for an adapter: --enable-lora --max-lora-rank {rank}")
    if wrong:
        raise ValueError(f"the vLLM server at {url} cannot sample for this run: {'; '.join(wrong)}. {HOW_TO_START}")
