"""The least memory that a step runs in: the allocator gives cached blocks back before it gives up."""

from trainfit.memory.quick_replay import QuickReplay

TOLERANCE = 0.005
"""Relative precision of the result: a closer one costs replays, and repeated runs differ by 1 %."""


def least_capacity_bytes(step: QuickReplay, *, low_bytes: int, high_bytes: int) -> int:
    """A capacity between two at which the replay survives, and hardly above one at which it does not.

    It does not survive anything less than `low_bytes` (the peak of its tensors), and survives `high_bytes`. QuickReplay is not
    quite monotone in the capacity (see `allocator.replay`), so a little below there may be another capacity that does.
    """
    while high_bytes - low_bytes > TOLERANCE * high_bytes:
        middle = (low_bytes + high_bytes) // 2
        if step.survives(middle):
            high_bytes = middle
        else:
            low_bytes = middle
    return high_bytes
