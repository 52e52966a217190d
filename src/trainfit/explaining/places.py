"""Finds where in the code a tensor was made, from the frames of a memory snapshot. Imports no torch.

Snapshots that are recorded with C++ frames (torch's default) mix frames of torch, of the interpreter's C sources and of the C
library with those of Python; what the thread of backward makes has often no Python frame at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

LIBRARIES = re.compile(r"(site|dist)-packages|/lib(64)?/python|^<frozen|^<__array_function__")
BACKWARD = re.compile(r"torch::autograd::generated::(\w+?)(Backward\d*)?::apply")
OPERATOR = re.compile(r"at::_ops::(\w+)::call")
"""Names in C++ frames. The outermost operator is the one that was called; what it calls is within."""


def place_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost line of the user's own Python code, as "file.py:12 in forward"; else that of a library; else the operator or
    the part of backward that C++ frames name; empty where nothing is known.
    """
    python = [frame for frame in frames if _is_python(_file(frame))]
    own = next((frame for frame in python if not LIBRARIES.search(_file(frame))), None)
    frame = own or (python[0] if python else None)
    if frame is not None:
        line = f":{frame['line']}" if frame.get("line") else ""
        return f"{_file(frame)}{line} in {frame.get('name', '?')}"
    return _of_operators([str(frame.get("name", "")) for frame in frames])


def _of_operators(names: Sequence[str]) -> str:
    for name in names:
        if "AccumulateGrad::" in name:
            return "backward: gradients of parameters (no Python line was recorded)"
        if match := BACKWARD.search(name):
            return f"backward of {match[1]} (no Python line was recorded)"
    called = [match[1] for name in names if (match := OPERATOR.search(name))]
    if any("autograd::Engine" in name for name in names):
        return "backward (no Python line was recorded)"
    return f"operator {called[-1]} (no Python line was recorded)" if called else ""


def _is_python(file: str) -> bool:
    return file.endswith((".py", ".pyx")) or file.startswith(("<stdin>", "<string>", "<ipython", "<cell"))


def _file(frame: Mapping[str, Any]) -> str:
    return str(frame.get("filename", ""))
