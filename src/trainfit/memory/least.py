"""The least memory that a step runs in: the allocator gives cached blocks back before it gives up."""

from trainfit.memory.allocator import AllocatorConfig, replay
from trainfit.tracing.events import Trace

TOLERANCE = 0.005
"""Of the result: a closer one costs replays, and repeated runs differ by 1 %."""


def least_capacity_bytes(trace: Trace, config: AllocatorConfig, *, low_bytes: int, high_bytes: int) -> int:
    """A capacity between two at which the replay survives, and hardly above one at which it does not.

    It does not survive anything less than `low_bytes` (the peak of its tensors), and survives `high_bytes`. Survival is not
    quite monotone in the capacity (see `replay`), so a little below there may be another capacity that does.
    """
    while high_bytes - low_bytes > TOLERANCE * high_bytes:
        middle = (low_bytes + high_bytes) // 2
        if replay(trace, capacity_bytes=middle, config=config).oom is None:
            high_bytes = middle
        else:
            low_bytes = middle
    return high_bytes
