"""Where weights lie on their way to a server, and what becomes of those that a killed trainer has left there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from grpo_hf.rollout.vllm_transfer import PREFIX, SECONDS_TO_LOCK, shared_folder


def test_what_a_killed_trainer_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """And what a living one is about to send is not, however long ago it was made."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        with shared_folder(1, str(tmp_path)) as folder:
            (folder / "weights.safetensors").write_bytes(b"a GiB")
            os.write(there, b"made")
            signal.pause()
    os.read(here, 4)
    (left,) = tmp_path.glob(f"{PREFIX}*")
    long_ago = time.time() - SECONDS_TO_LOCK - 1
    os.utime(left, (long_ago, long_ago))
    with shared_folder(1, str(tmp_path)) as folder:
        assert set(tmp_path.iterdir()) == {left, folder}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert left.exists()
    with shared_folder(1, str(tmp_path)) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())
