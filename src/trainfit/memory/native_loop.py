"""The loop of `replay_loop.c`, fifty times as fast as `python_loop`: compiled on first use, which takes half a second, and kept
in the user's cache folder. Where there is no C compiler, or it fails, replays run in Python, with the same results.
"""

import ctypes
import platform
import shutil
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from trainfit.files import cache_folder
from trainfit.memory.python_loop import LARGE, LARGEST_SHARED, SEGMENT, SMALL, UNLIMITED, Ended, Events

SOURCE = Path(__file__).with_name("replay_loop.c")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_S = 30.0
_KINDS = np.array([SMALL, SEGMENT, LARGE, LARGEST_SHARED], dtype=np.int64)


class _Ended(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("survives", "accepted", "rejected", "has_missed", "reserved", "retries", "exchange_count")
    ]


class NativeLoop:
    """Replays of one trace. They raise MemoryError where the host has too little memory for one, and ValueError where a tensor is
    freed that is not allocated.
    """

    def __init__(self, events: Events, function: Any) -> None:
        self.events = events
        self._function = function
        numbers = (events.ops, events.sizes, events.pools)
        self._ops, self._sizes, self._pools = (np.ascontiguousarray(each, dtype=np.int64) for each in numbers)

    def run(self, limit: int) -> Ended:
        """Replay with a capacity in blocks."""
        events = self.events
        lengths = np.zeros(events.tensors, dtype=np.int64)
        exchanges = np.empty((2 * len(events.ops), 2), dtype=np.int64)  # pages that nothing is written to cost nothing
        ended = _Ended()
        done = self._function(
            self._ops.ctypes.data,
            len(events.ops),
            events.tensors,
            self._sizes.ctypes.data,
            self._pools.ctypes.data,
            events.pool_count,
            limit,
            _KINDS.ctypes.data,
            events.has_missed,
            lengths.ctypes.data,
            exchanges.ctypes.data,
            ctypes.byref(ended),
        )
        if done < 0:
            raise ValueError("the trace frees a tensor that is not allocated")
        if not done:
            raise MemoryError
        return Ended(
            survives=bool(ended.survives),
            accepted=ended.accepted,
            rejected=ended.rejected,
            has_missed=bool(ended.has_missed),
            reserved=ended.reserved,
            retries=ended.retries,
            exchanges=exchanges[: ended.exchange_count].copy(),
            lengths=lengths,
        )

    def run_free(self, keep_from: int) -> Ended:  # noqa: ARG002 - as PythonLoop's; no states are kept
        """Replay without a capacity."""
        return self.run(UNLIMITED)


@cache
def native_function() -> Any | None:
    """The compiled function; None where it cannot be compiled or loaded."""
    library = cache_folder() / "native" / _name()
    try:
        if not library.exists():
            _compile(library)
        function = ctypes.CDLL(str(library)).trainfit_replay
    except (OSError, subprocess.SubprocessError):
        return None
    numbers, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [
        *(pointer, numbers, numbers, pointer, pointer, numbers),
        *(numbers, pointer, numbers, pointer, pointer, pointer),
    ]
    function.restype = ctypes.c_int
    return function


def _name() -> str:
    """Of the compiled file: another for another source, machine or C library, which may share the folder."""
    made_of = [SOURCE.read_text(), platform.system(), platform.machine(), *platform.libc_ver()]
    return f"replay_loop-{sha256(repr(made_of).encode()).hexdigest()[:16]}.so"


def _compile(library: Path) -> None:
    """Raises OSError or SubprocessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_S)
        made.replace(library)  # whole, also where two processes compile
