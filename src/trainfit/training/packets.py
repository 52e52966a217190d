"""Objects with many tensors between processes: each travels as one anonymous file, whose pages both sides share.

`multiprocessing` sends every tensor through a file of its own in /dev/shm, which is 64 MiB in a container and takes a file
descriptor for each: a window of some hundred samples exhausts either. Here all tensors lie behind each other in one file made
by `memfd_create`, which needs no /dev/shm, and one descriptor is open for as long as it takes to map it.
"""

import mmap
import os
import pickle
import socket
import sys
import tempfile
from io import BytesIO
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes: each part begins at a multiple, as torch's own allocations do."""
BY_DESCRIPTOR = sys.platform == "linux"
"""Elsewhere the bytes themselves go through the pipe: slower, and the receiver waits for the sender while they do."""


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


def _anonymous_file() -> BinaryIO:
    """A file without a name: in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("trainfit"), "w+b")
    return tempfile.TemporaryFile()


def send(connection: Connection, value: object) -> int:
    """Send anything that can be pickled; returns its bytes. Nothing waits for the receiver.

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
    with _anonymous_file() as file, socket.socket(fileno=os.dup(connection.fileno())) as channel:
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
        shared = mmap.mmap(descriptors[0], 0)
    finally:
        os.close(descriptors[0])
    return unpack(_read(memoryview(shared))), len(shared)
