"""For every test: one thread, since models this small gain nothing from more and threads that wait for each other cost far
more on a busy machine; and no network. Set before torch is imported; processes that a test starts inherit both."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import cloudpickle
import pytest

import tests

if TYPE_CHECKING:
    from grpo_hf.rollout.vllm_engine import VLLMEngine
    from tests.server import Server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Verifiers in test modules are sent to workers whole, as those of a user's script are: importing a test module would have
# every worker load torch.
cloudpickle.register_pickle_by_value(tests)


LEAVES_NOTHING = ["test_sandbox_torture", "test_isolation_users", "test_code", "test_code_asserts"]
"""These look for what a program has left on the machine, which another file's programs may be."""

SLOW_FIRST = [
    "test_vllm_server",
    "invariants/test_6_killed_run",
    "test_cli",
    "test_launch",
    *LEAVES_NOTHING,
    "invariants/test_9_any_samples",
    "test_checkpoints",
    "invariants/test_2_gradient_does_not_depend_on_cuts",
    "test_trainer",
]
"""Files whose tests take long, the slowest first: the others fill up what is left of the two processes' time."""

VLLM_LAST = ["test_vllm_training", "test_vllm_engine", "invariants/test_5_engine_logprobs"]
"""These start vLLM in their own process, which changes it for whatever comes after."""


TOGETHER = dict.fromkeys(VLLM_LAST, "vllm") | dict.fromkeys(LEAVES_NOTHING, "programs")
"""Files whose tests are run in one process with those of others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, and keep each one's tests in one process (pytest-xdist's --dist loadgroup)."""
    order = {name: place for place, name in enumerate([*SLOW_FIRST, "", *VLLM_LAST])}
    for item in items:
        name = str(item.path.relative_to(item.config.rootpath / "tests").with_suffix(""))
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(name, name)))
        item.stash[PLACE] = order.get(name, order[""])
    items.sort(key=lambda item: item.stash[PLACE])


PLACE = pytest.StashKey[int]()


def pytest_collection_finish() -> None:
    """Trainer collects garbage when it starts: keep the imported libraries out of that, which saves 0.3 s a trainer."""
    gc.collect()
    gc.freeze()


# vLLM takes long to start: the tests of a file share its engines, and those of all files a server. An engine that goes takes
# the process group of all others in its process along, so that none may be kept for another file.


@pytest.fixture(scope="module")
def engines() -> dict[str, VLLMEngine]:
    """One engine in this process for each kind of head; a test hands it the model that it trains."""
    from tests.tiny_vllm import make_engine

    return {"tied": make_engine(tied=True), "untied": make_engine(tied=False)}


@pytest.fixture(scope="module")
def text_engine() -> VLLMEngine:
    """Holds a LoRA adapter beside the base weights, and decodes what it samples."""
    from tests.tiny_vllm import make_text_engine

    return make_text_engine()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a key; stopped with Ctrl-C, which leaves no process."""
    from tests.server import KEY, Server

    os.environ["VLLM_API_KEY"] = KEY
    server = Server(tmp_path_factory.mktemp("server"), "--enable-lora", "--max-lora-rank", "8")
    server.start()
    server.wait()
    yield server
    assert server.stop() == []
    del os.environ["VLLM_API_KEY"]
