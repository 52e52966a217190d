"""Objects with many tensors between processes: each travels as one anonymous file, whose pages both sides share.

`multiprocessing` sends every tensor through a file of its own in /dev/shm, which is 64 MiB in a container and takes a file
descriptor for each: a window of a few hundred samples exhausts either. Here all tensors lie one after another in one file made
by `memfd_create`, which needs no /dev/shm, and one descriptor is open for as long as it takes to map it.
"""

import mmap
import os
import pickle
import socket
import sys
import tempfile
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes: each part begins at a multiple, as torch's own allocations do."""
BY_DESCRIPTOR = sys.platform == "linux"
"""Whether a file descriptor is sent. Elsewhere the bytes themselves go through the pipe, which is slower, and the receiver
waits for the sender meanwhile."""


class Spooled(list[Any]):
    """Items with tensors that may wait in a file on the disk: the system keeps of it in memory what it has room for."""

    folder: Path | None = None
    """The file's folder; None: the items are in memory. The file has no name, and is gone with its last reader."""
    maps: tuple[mmap.mmap, ...] = ()
    """What the tensors are views of, where they are in a file."""

    def release(self) -> None:
        """Give the pages of the file that were read back to the system; they are read again where they are needed."""
        for each in self.maps:
            with suppress(AttributeError, OSError, ValueError):  # not every system has it
                each.madvise(mmap.MADV_DONTNEED)


class _Pickler(pickle.Pickler):
    """Tensors go as NumPy arrays, whose bytes the pickle protocol 5 leaves outside of the stream."""

    def reducer_override(self, obj: Any) -> Any:
        """A tensor shares its memory with the array, so nothing is copied."""
        if type(obj) is torch.Tensor and obj.dtype != torch.bfloat16:  # NumPy has no bfloat16: as torch pickles it
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


def pack(value: object) -> list[memoryview]:
    """The parts of `value`, which is anything that can be pickled: its structure, then the bytes of each array."""
    stream = BytesIO()
    parts = list[memoryview]()
    _Pickler(stream, protocol=5, buffer_callback=lambda buffer: parts.append(buffer.raw())).dump(value)
    return [stream.getbuffer(), *parts]


def unpack(parts: list[memoryview]) -> Any:
    """What was packed. Tensors and arrays are views of the parts and keep their memory alive."""
    return pickle.loads(parts[0], buffers=parts[1:])


def _write(file: BinaryIO, parts: list[memoryview]) -> int:
    """Number of parts, the size of each, then the parts; returns the bytes written."""
    head = np.array([len(parts), *(part.nbytes for part in parts)], np.int64)
    written = file.write(head.tobytes())
    for part in parts:
        written += file.write(bytes(-written % ALIGNMENT))
        written += file.write(part)
    return written


def _read(packet: memoryview) -> list[memoryview]:
    """The parts that `_write` wrote."""
    count = int(np.frombuffer(packet, np.int64, 1)[0])
    start = 8 * (count + 1)
    parts = list[memoryview]()
    for size in np.frombuffer(packet, np.int64, count, offset=8).tolist():
        start += -start % ALIGNMENT
        parts.append(packet[start : start + size])
        start += size
    return parts


def _anonymous_file(folder: Path | None = None) -> BinaryIO:
    """A file without a name: in a folder, or in memory where the system has that."""
    if folder is not None:
        return tempfile.TemporaryFile(dir=folder)
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("trainfit"), "w+b")
    return tempfile.TemporaryFile()


def spooled(items: Spooled) -> Spooled:
    """The items of this process, their tensors in a file of `items.folder`; as they are where it has none.

    Raises:
        OSError: no room on the disk.
    """
    if items.folder is None:
        return items
    with _anonymous_file(items.folder) as file:
        _write(file, pack(items))
        file.flush()
        return _mapped(file.fileno())[0]


def _mapped(descriptor: int) -> tuple[Any, int]:
    """What was written into a file, and its bytes."""
    shared = mmap.mmap(descriptor, 0)
    value = unpack(_read(memoryview(shared)))
    if isinstance(value, Spooled) and value.folder is not None:
        value.maps = (shared,)
    return value, len(shared)


def send(connection: Connection, value: object) -> int:
    """Send anything that can be pickled; returns its bytes. Nothing waits for the receiver. `Spooled` goes through its folder.

    Raises:
        OSError: no memory or file descriptor is left, or the receiver is gone.
        MemoryError: no memory is left.
    """
    parts = pack(value)
    if not BY_DESCRIPTOR:
        packet = BytesIO()
        nbytes = _write(packet, parts)
        connection.send_bytes(packet.getbuffer())
        return nbytes
    folder = value.folder if isinstance(value, Spooled) else None
    with _anonymous_file(folder) as file, socket.socket(fileno=os.dup(connection.fileno())) as channel:
        nbytes = _write(file, parts)
        file.flush()
        socket.send_fds(channel, [b"\0"], [file.fileno()])
    return nbytes


def receive(connection: Connection) -> tuple[Any, int]:
    """What the other side sent with `send`, and its bytes. To be called when `connection.poll()` is true.

    Raises:
        EOFError: the sender is gone.
        OSError: no file descriptor is left.
    """
    if not BY_DESCRIPTOR:
        packet = memoryview(connection.recv_bytes())
        return unpack(_read(packet)), packet.nbytes
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        _, descriptors, flags, _ = socket.recv_fds(channel, 1, 1)
    if flags & socket.MSG_CTRUNC:
        raise OSError("no file descriptor is left (ulimit -n)")
    if not descriptors:
        raise EOFError
    try:
        return _mapped(descriptors[0])
    finally:
        os.close(descriptors[0])
