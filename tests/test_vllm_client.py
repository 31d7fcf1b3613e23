"""The HTTP client of a vLLM server."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_hf.rollout.vllm_client import ServerLostError, VLLMClient


def test_requests_in_progress_are_ended_on_both_sides() -> None:
    """Whoever waits for an answer is told, and the server sees that nobody does."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        client = VLLMClient(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5)
        answers = [threads.submit(client.post, "/v1/completions", {"seed": seed}) for seed in range(2)]
        connections = [server.accept()[0] for _ in answers]
        for connection in connections:
            connection.settimeout(20)
            received = b""
            while b"seed" not in received:
                received += connection.recv(4096)
        client.reopen()
        for answer in answers:
            with pytest.raises(ServerLostError):
                answer.result(20)
        assert [connection.recv(4096) for connection in connections] == [b"", b""]
        for connection in connections:
            connection.close()
