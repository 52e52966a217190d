"""Out-of-memory messages in a text: their numbers, who wrote them, and what they mean. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "shortage",
    "fragmentation",
    "one tensor too large",
    "other processes",
    "limit",
    "spilled",
    "outside the allocator",
    "host memory",
]
"""shortage: more than there is, in many tensors; fragmentation: enough, in pieces; one tensor too large: larger than the
card; other processes: enough, had they not taken it; limit: the card had room, a limit or another device did not; spilled: more
allocated than the card has, in the host's memory; outside the allocator: a CUDA library found no room; host memory: of the
machine, not of a GPU."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One out-of-memory message."""

    text: str
    """The message as it was printed."""
    kind: Kind
    """What ran out of memory."""
    request_bytes: int = 0
    """Bytes of the request; 0 if the message has no numbers."""
    allocated_bytes: int = 0
    """Bytes of tensors."""
    cached_bytes: int = 0
    """Reserved by PyTorch, in no tensor."""
    free_bytes: int = 0
    """Free memory of the device."""
    total_bytes: int = 0
    """Memory of the device."""
    others_bytes: int = 0
    """Bytes of other processes, as far as the message shows."""
    where: str = ""
    """The innermost line of the traceback that is not a library's, as "file.py:12, in forward: x = self.conv(x)"."""
    operator: str = ""
    """The innermost line of the traceback."""
    phase: str = ""
    """"forward", "backward", "optimizer", "evaluation", "data" or "model to the GPU", as the traceback shows."""


_SIZE = r"([\d.]+) ?(bytes|[KMGT]i?B)"
_UNITS = {
    "bytes": 1,
    "KB": 2**10,
    "MB": 2**20,
    "GB": 2**30,
    "TB": 2**40,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_FIELDS = {
    "request": rf"[Tt]ried to allocate {_SIZE}",
    "total": rf"(?:total capac\w+ of {_SIZE}|{_SIZE} total capacity|max allowed: {_SIZE})",
    "free": rf"(?:of which {_SIZE} is free|{_SIZE} free)",
    "allocated": rf"(?:allocated memory {_SIZE} is allocated by PyTorch|{_SIZE} already allocated|MPS allocated: {_SIZE})",
    "cached": rf"(?:{_SIZE} is reserved by PyTorch but unallocated|{_SIZE} cached)",
    "reserved": rf"{_SIZE} reserved in total",
    "mine": rf"this process has {_SIZE} memory in use",
    "theirs": rf"other allocations: {_SIZE}",
}
_START = re.compile(
    r"CUDA out of memory|HIP out of memory|MPS backend out of memory|DefaultCPUAllocator: (?:can't allocate|not enough) memory|"
    r"CUDA (?:driver )?error: out of memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|"
    r"CUFFT_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory'|std::bad_alloc|unable to find an engine to execute|"
    r"CUDNN_STATUS_INTERNAL_ERROR_\w*ALLOCATION_FAILED|Triton Error \[CUDA\]: out of memory|XPU out of memory"
)
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in (\S+)\s*$')
_LIBRARIES = ("site-packages", "dist-packages", "/lib/python", "\\lib\\", "<frozen", "<string>")
_PHASES = (
    ("backward", r"\.backward\(|autograd/__init__|run_backward|_tensor\.py"),
    ("optimizer", r"optimizer\.step|/optim/|_init_group|_foreach|adamw?\("),
    ("evaluation", r"in (?:\w*eval\w*|\w*valid\w*|\w*test\w*|\w*predict\w*|\w*inference\w*)\b"),
    ("model to the GPU", r"in (?:_apply|cuda|to|convert)\b.*(?:\n.*)*return t\.to|module\._apply|model\.(?:to|cuda)\("),
    ("data", r"dataloader|in collate|__getitem__"),
)


def find_messages(text: str) -> tuple[Message, ...]:
    """Every out-of-memory message of a text, in order; the same message printed again counts once."""
    messages: list[Message] = []
    end = 0
    for start in _START.finditer(text):
        if start.start() < end:
            continue
        line_start = text.rfind("\n", 0, start.start()) + 1
        line_end = text.find("\n", start.end())
        end = len(text) if line_end < 0 else line_end
        line = text[line_start:end].strip()
        more = (
            text[end : end + 400]
            if "Tried to allocate" not in line and "ried to allocate" in text[end : end + 200]
            else ""
        )
        message = _read(
            (line + " " + " ".join(more.split())).strip(), text[end_of_previous(messages, text) : line_start]
        )
        if all((message.text, message.where) != (each.text, each.where) for each in messages):
            messages.append(message)
    return tuple(messages)


def end_of_previous(messages: Sequence[Message], text: str) -> int:
    """The end of the last message: its traceback does not belong to the next one."""
    if not messages:
        return 0
    place = text.find(messages[-1].text)
    return place + len(messages[-1].text) if place >= 0 else 0


def _read(line: str, before: str) -> Message:
    sizes = {name: _size(re.search(pattern, line)) for name, pattern in _FIELDS.items()}
    request = sizes["request"] or 0
    total = sizes["total"] or 0
    free = sizes["free"] or 0
    allocated = sizes["allocated"] or 0
    cached = sizes["cached"] or 0
    if sizes["reserved"]:
        cached = max(sizes["reserved"] - allocated, 0)
    mine = sizes["mine"] or allocated + cached
    others = (
        max(total - free - mine, 0)
        if total and (sizes["mine"] or sizes["reserved"] or sizes["cached"] is not None)
        else 0
    )
    if sizes["theirs"]:
        others = sizes["theirs"]
        free = max(total - allocated - others, 0)
    where, operator = _frames(before)
    context = before[-4000:]
    phase = next((name for name, pattern in _PHASES if re.search(pattern, context)), "forward" if where else "")
    return Message(
        text=line,
        kind=_kind(line, request, total, free, allocated, cached, others),
        request_bytes=request,
        allocated_bytes=allocated,
        cached_bytes=cached,
        free_bytes=free,
        total_bytes=total,
        others_bytes=others,
        where=where,
        operator=operator,
        phase=phase,
    )


def _kind(line: str, request: int, total: int, free: int, allocated: int, cached: int, others: int) -> Kind:
    if "DefaultCPUAllocator" in line or "std::bad_alloc" in line:
        return "host memory"
    if not total:
        return "outside the allocator"
    if request > total:
        return "one tensor too large"
    if allocated + cached > total:
        return "spilled"
    if free - request >= ROOM * total:
        return "limit"
    if cached >= max(request, PIECES * (allocated + cached)):
        return "fragmentation"
    return "other processes" if others - CONTEXT_BYTES + free + cached >= request else "shortage"


ROOM = 0.05
"""Part of the card that has to be free beyond the request before its failure is not a shortage."""
PIECES = 0.1
"""Part of the reserved memory that has to be unused before its pieces, and not the tensors, are the cause."""
CONTEXT_BYTES = 3 * 2**29
"""What a CUDA context, cuDNN's kernels and a desktop may hold outside PyTorch: less than this is not taken for a process."""


def _frames(before: str) -> tuple[str, str]:
    """The innermost frame of the user's and the innermost of all, of the traceback just before a message."""
    lines = before.splitlines()
    own = inner = ""
    for number in range(len(lines) - 1, -1, -1):
        match = _FRAME.match(lines[number])
        if not match:
            continue
        code = lines[number + 1].strip() if number + 1 < len(lines) and not _FRAME.match(lines[number + 1]) else ""
        text = f"{match[1]}:{match[2]}, in {match[3]}" + (f": {code}" if code and not set(code) <= set("^~ ") else "")
        inner = inner or text
        if not any(part in match[1] for part in _LIBRARIES):
            own = text
            break
    return own or inner, inner


def _size(match: "re.Match[str] | None") -> int | None:
    if match is None:
        return None
    number, unit = next((match[i], match[i + 1]) for i in range(1, len(match.groups()) + 1, 2) if match[i])
    return int(float(number.rstrip(".")) * _UNITS[unit])
