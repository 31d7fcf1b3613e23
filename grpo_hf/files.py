"""Files that a power loss leaves whole, and locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk; a folder that cannot be asked is left."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that keep no such promise
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or as it was before, also after a power loss."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file, which is made where there is none; None where another process has it. The lock ends when the descriptor
    that is returned is closed, which the death of the process does too.

    Raises OSError with ENOLCK or ENOTSUP on a file system without locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor
