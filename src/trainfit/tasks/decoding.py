"""Decodes every image of a data set, to know which of them training would have to leave out."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from trainfit.errors import TrainfitError
from trainfit.tasks.images import MOST_PIXELS
from trainfit.tasks.task import Progress

DECODE_BYTES = 1 << 30
"""Memory that all decoding threads together may hold, where the images' sizes are known."""
MOST_THREADS = 8
_BYTES_PER_PIXEL = 8
"""An image and its upright copy, as Pillow stores RGB."""


class Sized(Protocol):
    """A record whose image has a known size."""

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...


RecordT = TypeVar("RecordT")


def decoded(
    records: Sequence[RecordT],
    decode: Callable[[RecordT], Any],
    *,
    threads: int = MOST_THREADS,
    progress: Progress | None = None,
) -> Iterator[tuple[RecordT, str | None]]:
    """Each record, in order, with None if `decode` took its image, else with why it could not.

    Args:
        records: What is to be decoded, of all splits together.
        decode: Decodes a record; called in several threads. A `TrainfitError` says what is wrong with the image.
        threads: Images that are decoded at one time, at most; never more than there are cores.
        progress: Called after each record with the records done and their number.
    """
    with ThreadPoolExecutor(max(1, min(threads, os.cpu_count() or 1))) as pool:
        faults = pool.map(partial(_fault, decode), records)
        try:
            for done, (record, fault) in enumerate(zip(records, faults, strict=True), 1):
                if progress is not None:
                    progress(done, len(records))
                yield record, fault
        finally:  # a caller that stops, by Ctrl-C too, does not wait for the images that were not begun
            pool.shutdown(wait=False, cancel_futures=True)


def threads_for(records: Sequence[Sized]) -> int:
    """How many images of a data set's largest size `DECODE_BYTES` have room for, at least one."""
    largest = max((record.width * record.height for record in records), default=MOST_PIXELS)
    return max(1, DECODE_BYTES // max(1, largest * _BYTES_PER_PIXEL))


def _fault(decode: Callable[[RecordT], Any], record: RecordT) -> str | None:
    try:
        decode(record)
    except TrainfitError as error:
        return str(error)
    return None
