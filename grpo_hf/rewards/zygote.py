"""The process that every worker is forked from: preloaded, single-threaded, and gone, with all its kin, when the trainer is.

Imported by the fork server alone, see processes.py.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import sys
import warnings

import pebble.pool.process  # noqa: F401

from grpo_hf.rewards import in_worker
from grpo_hf.rewards.processes import PRELOAD, kill_children

os.setsid()  # what kills the trainer's process group leaves this one time to clear up
in_worker.adopt_orphans()
warnings.filterwarnings("ignore", "forkserver: waitpid returned")  # of the orphans


def _clear_up(server: int) -> None:
    if os.getpid() == server:  # and not a worker, which was forked from it
        kill_children(server)


atexit.register(_clear_up, os.getpid())

_wanted = json.loads(os.environ.pop(PRELOAD, "{}"))
sys.path += [path for path in _wanted.get("path", ()) if path not in sys.path]
for _module in _wanted.get("modules", ()):
    with contextlib.suppress(Exception):  # the workers will meet it again, and say so
        importlib.import_module(_module)
