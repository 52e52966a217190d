"""A lock on a run folder, so that two processes never train into one folder."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from trainfit.errors import TrainfitError

LOCK = ".lock"
_held: set[Path] = set()
"""Folders that this process holds: the operating system's lock is between processes only."""


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock; a process that ends, killed or not, releases it.

    It is a POSIX record lock: other than flock's it is not inherited by loader processes, which may outlive a killed
    trainer by seconds, and it works between machines that share the folder.

    Raises:
        TrainfitError: another run holds it, or the folder's file system has no locks.
    """
    file = folder / LOCK
    key = folder.resolve()
    if key in _held:
        raise TrainfitError(_in_use(folder, "this process"))
    with file.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise TrainfitError(_in_use(folder, lock.read(200).strip() or "another process")) from error
        except OSError as error:
            raise TrainfitError(
                f"{file} cannot be locked ({error.strerror}): choose a folder on another disk"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def _in_use(folder: Path, holder: str) -> str:
    return f"{folder} is in use by {holder}, which trains into it: wait until it ends, or choose another --out"
