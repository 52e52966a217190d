"""An explanation of a text or a snapshot, and of what each knob of a named model would free."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.explaining.growth import Growth, find_growth
from trainfit.explaining.knobs import Freed, frees
from trainfit.explaining.message import Message, find_messages
from trainfit.explaining.snapshot import Snapshot, read_snapshot
from trainfit.gpus.catalogue import Gpu, chosen_gpu, gpu_with_memory
from trainfit.models.setting import Setting, make_setting

PICKLED = b"\x80"
MOST_TEXT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why memory ran out, or where it is."""

    source: str
    """Where the text or snapshot came from."""
    messages: tuple[Message, ...] = ()
    """Messages in the text."""
    growth: Growth | None = None
    """Growth of memory over a log with memory figures."""
    snapshots: tuple[Snapshot, ...] = ()
    """One snapshot per device."""
    setting: Setting | None = None
    """The setting that ran; None if none was named."""
    gpu: Gpu | None = None
    """The card; None if it is not known."""
    needs_bytes: int = 0
    """The most that the setting needs on that card."""
    knobs: tuple[Freed, ...] = ()
    """What each knob of the setting would free, largest first."""


def explain_bytes(
    data: bytes,
    source: str,
    *,
    setting: Setting | None = None,
    gpu: Gpu | None = None,
    trace: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Explanation:
    """Explain a text or a pickled snapshot.

    Args:
        data: The file.
        source: Its name, for messages.
        setting: The model that ran, for what each knob would free.
        gpu: The card; that of the last message unless given.
        trace: Trace what no stored trace covers (some 10 s a knob).
        note: Called with one line before anything that takes seconds.

    Raises:
        TrainfitError: there is nothing to explain, or no card is known for the model.
    """
    snapshots: tuple[Snapshot, ...] = ()
    messages: tuple[Message, ...] = ()
    growth: Growth | None = None
    if data[:1] == PICKLED:
        snapshots = tuple(read_snapshot(data, source))
        if not snapshots:
            raise TrainfitError(f"{source} is a snapshot of a process that held no GPU memory")
    else:
        if len(data) > MOST_TEXT_BYTES:
            raise TrainfitError(f"{source} has {len(data) >> 20} MiB: give the part of the log around the error")
        text = data.decode("utf-8", errors="replace")
        messages = find_messages(text)
        growth = find_growth(text)
        if not messages and growth is None:
            raise TrainfitError(
                f"{source} has no out-of-memory message, no memory figures, and is not a snapshot of "
                "torch.cuda.memory._dump_snapshot"
            )
    if setting is None:
        return Explanation(source=source, messages=messages, growth=growth, snapshots=snapshots)
    card = gpu or _card(messages)
    needs, knobs = frees(setting, card, trace=trace, note=note)
    return Explanation(
        source=source,
        messages=messages,
        growth=growth,
        snapshots=snapshots,
        setting=setting,
        gpu=card,
        needs_bytes=needs,
        knobs=knobs,
    )


def explain(
    what: str | bytes | Path,
    *,
    model: str | Setting | None = None,
    gpu: str | Gpu | None = None,
    memory: str | None = None,
    trace: bool = False,
    note: Callable[[str], None] = lambda _: None,
    **knobs: Any,
) -> Explanation:
    """Explain why memory ran out, or where it is: `trainfit explain`.

    Args:
        what: The text of a message or log, the bytes of a pickled snapshot, or the path of a file with either.
        model: The model that ran, for what each of its knobs would free; `knobs` are its other knobs.
        gpu: The card, where the message does not say how much memory it has.
        memory: Memory of the card, for instance "8GiB".
        trace: Trace what no stored trace covers too (some 10 s a knob).
        note: Called with one line before anything that takes seconds.
        knobs: Knobs of the model's family, for instance `micro_batch=8`.

    Raises:
        TrainfitError: there is nothing to explain, or no such model or card.
        OSError: the file cannot be read.
    """
    source = "the text"
    if isinstance(what, Path):
        data = what.read_bytes()
        source = str(what)
    elif isinstance(what, str):
        data = what.encode()
    else:
        data = what
    card: Gpu | None = None
    if isinstance(gpu, Gpu):
        card = gpu
    elif gpu or memory:
        card = chosen_gpu(gpu, memory)
    setting = make_setting(model, **knobs) if isinstance(model, str) else model
    return explain_bytes(data, source, setting=setting, gpu=card, trace=trace, note=note)


def _card(messages: tuple[Message, ...]) -> Gpu:
    total = next((m.total_bytes for m in reversed(messages) if m.total_bytes and m.kind != "host memory"), 0)
    if not total:
        raise TrainfitError("the message does not say how much memory the card has: give --gpu NAME or --memory 8GiB")
    return gpu_with_memory(f"{total / 2**30:.2f}GiB")
