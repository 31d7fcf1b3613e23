"""For every test: one thread, since models this small gain nothing from more and threads that wait for each other cost far
more on a busy machine; and no network. Set before torch is imported; processes that a test starts inherit both."""

import gc
import os

import cloudpickle

import tests

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Verifiers in test modules are sent to workers whole, as those of a user's script are: importing a test module would have
# every worker load torch.
cloudpickle.register_pickle_by_value(tests)


def pytest_collection_finish() -> None:
    """Trainer collects garbage when it starts: keep the imported libraries out of that, which saves 0.3 s a trainer."""
    gc.collect()
    gc.freeze()
