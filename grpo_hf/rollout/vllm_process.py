"""What vLLM does to the process that it lives in, undone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where it takes weights straight from the trainer's tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of the environment, before vLLM is imported; one that is set already stays."""


@contextmanager
def as_it_was() -> Iterator[None]:
    """Give the process back its environment, number of threads and random state, which starting vLLM changes.

    torch.set_num_threads becomes a no-op, LOCAL_WORLD_SIZE and LD_PRELOAD (which child processes would inherit) are
    overwritten, and every generator is seeded. vLLM's own variables stay: it reads them later on.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    try:
        with same_random_state():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name in {*os.environ, *environment}:
            if name in environment:
                os.environ[name] = environment[name]
            elif not name.startswith("VLLM_"):
                del os.environ[name]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give the trainer back its random state: vLLM draws from the global generators even for requests with a seed."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
