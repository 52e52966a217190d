"""An explanation of memory as text and as JSON."""

from dataclasses import asdict
from typing import Any

from trainfit.explaining.explain import Explanation
from trainfit.explaining.growth import Growth
from trainfit.explaining.knobs import Freed
from trainfit.explaining.message import Message
from trainfit.explaining.snapshot import Snapshot

_WHY = {
    "shortage": "the card is full with tensors",
    "fragmentation": "fragmentation: PyTorch holds enough unused memory, in pieces that are each too small",
    "one tensor too large": "a single tensor is larger than the card",
    "other processes": "other processes hold what was missing",
    "limit": "not a shortage: the card had more than enough free when the message was written",
    "spilled": "the driver has moved tensors to the host's memory: more is allocated than the card has",
    "outside the allocator": "a library found no room outside PyTorch's allocator",
    "host memory": "the machine's memory ran out, not a GPU's",
}
_REPAIR = {
    "shortage": "halve the micro-batch (with accumulation the result stays the same), or switch activation checkpointing on",
    "fragmentation": "PYTORCH_ALLOC_CONF=expandable_segments:True",
    "one tensor too large": "no allocator setting helps: make this tensor smaller (batch, resolution, sequence, chunks)",
    "other processes": "see nvidia-smi; end what is left of earlier runs, or take another card",
    "limit": "look for set_per_process_memory_fraction, a MIG slice, a container's limit, or a process that has ended since",
    "spilled": "it runs slowly before it fails: treat the card's own size as the limit",
    "outside the allocator": "leave it 0.5-1 GiB: a smaller micro-batch, or torch.cuda.set_per_process_memory_fraction(0.9)",
    "host memory": "fewer loader workers, a smaller batch, or no cache of decoded data",
}


def explain_text(result: Explanation) -> str:
    """Paragraphs: each message, the snapshot, the growth, the knobs."""
    parts = [_message(message) for message in result.messages]
    parts += [_snapshot(snapshot) for snapshot in result.snapshots]
    if result.growth is not None:
        parts.append(_growth(result.growth))
    if result.setting is not None:
        parts.append(_knobs(result))
    return "\n\n".join(parts)


def _message(message: Message) -> str:
    lines = [f"{_WHY[message.kind]}"]
    if message.where:
        phase = f" ({message.phase})" if message.phase else ""
        lines.append(f"  asked for by   {message.where}{phase}")
    numbers = {
        "asked for": message.request_bytes,
        "in tensors": message.allocated_bytes,
        "reserved, unused": message.cached_bytes,
        "free on the card": message.free_bytes,
        "outside PyTorch": message.others_bytes,
        "card": message.total_bytes,
    }
    if message.total_bytes:
        lines.append("  " + ", ".join(f"{name} {_size(value)}" for name, value in numbers.items()))
        missing = message.request_bytes - message.free_bytes
        if message.kind == "shortage":
            lines.append(f"  missing        {_size(missing)} more, for this tensor alone")
    elif message.request_bytes:
        lines.append(f"  asked for {_size(message.request_bytes)}")
    if message.phase == "optimizer":
        lines.append(
            "  why then       the first step of an optimizer makes its state: two copies of the weights for Adam"
        )
    if message.phase == "backward" and message.kind == "shortage":
        lines.append("  why then       in backward the gradients come on top of the activations that are not yet used")
    if message.phase == "evaluation":
        lines.append(
            "  why then       evaluation has a batch and image sizes of its own, and keeps outputs: use no_grad"
        )
    lines.append(f"  repair         {_REPAIR[message.kind]}")
    return "\n".join(lines)


def _snapshot(snapshot: Snapshot) -> str:
    when = {"out of memory": "when memory ran out", "peak": "at the peak", "end": "when it was taken (no history)"}[
        snapshot.at
    ]
    lines = [
        f"GPU {snapshot.device} {when}: {_size(snapshot.allocated_bytes)} in tensors, {_size(snapshot.reserved_bytes)} reserved"
    ]
    if snapshot.request_bytes:
        place = f" by {snapshot.request_place}" if snapshot.request_place else ""
        lines.append(
            f"  asked for      {_size(snapshot.request_bytes)}{place}; {_size(snapshot.device_free_bytes)} free on the card"
        )
    free = _size(snapshot.free_pieces_bytes)
    largest = _size(snapshot.largest_free_bytes)
    pieces = f"{free} free in reserved segments, the largest piece {largest}"
    if snapshot.fragmented:
        lines.append(f"  fragmentation  {pieces}: {_REPAIR['fragmentation']}")
    else:
        lines.append(f"  no fragmentation that matters ({pieces})")
    lines += [
        f"  {_size(holder.nbytes):>10}  {holder.tensors} tensors  {holder.place}"
        + (f" ({holder.category})" if holder.category else "")
        for holder in snapshot.holders
    ]
    for leak in snapshot.leaks:
        lines.append(
            f"  leak           {leak.tensors} tensors ({_size(leak.nbytes)}) of {leak.place} stay alive throughout the history: "
            "keep .item() or .detach() instead"
        )
    if snapshot.events and not snapshot.judges_leaks:
        lines.append("  leak           not judged: the history holds fewer than three steps; record five or more")
    elif snapshot.events and not snapshot.leaks:
        lines.append("  no place's tensors pile up over the history: no leak")
    return "\n".join(lines)


def _growth(growth: Growth) -> str:
    moved = f"{_size(growth.first_bytes)} to {_size(growth.last_bytes)} over {growth.figures} figures"
    repair = {
        "leak": "something keeps tensors of every step: look for lists of losses or outputs without .item() or .detach()",
        "larger input": "not a leak: plan for the largest image and the most objects (trainfit plan MODEL --data DIR)",
        "steady": "no leak",
        "too short": "give a longer log",
    }[growth.verdict]
    return f"growth: {growth.verdict} ({moved})\n  {growth.reason}\n  {repair}"


def _knobs(result: Explanation) -> str:
    assert result.setting is not None
    assert result.gpu is not None
    setting = result.setting
    head = (
        f"{setting.model} at micro-batch {setting.micro_batch} needs up to {_size(result.needs_bytes)} on a {result.gpu.name}"
        f" ({_size(result.gpu.memory_bytes)}); one knob at a time:"
    )
    lines = [f"  {freed.knob:<28} {_effect(freed)}" for freed in result.knobs]
    return "\n".join([head, *(lines or ["  no knob is left to turn"])])


def _effect(freed: Freed) -> str:
    if freed.failure:
        return freed.failure
    effect = f"frees {_size(freed.frees_bytes):>10}, then {_size(freed.needs_bytes)}"
    return effect if freed.same_result else f"{effect}; changes what is learned"


def _size(nbytes: int) -> str:
    sign, nbytes = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    if nbytes < 2**20 / 100:
        return f"{sign}{nbytes} B" if nbytes < 2**10 else f"{sign}{nbytes / 2**10:.4g} KiB"
    return f"{sign}{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{sign}{nbytes / 2**20:.4g} MiB"


def explain_json(result: Explanation) -> dict[str, Any]:
    """Schema 1."""
    record = asdict(result)
    if result.setting is not None:
        record["setting"] = result.setting.to_json()
    return {"schema": 1, **record}
