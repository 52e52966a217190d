"""The exceptions of the package."""


class TrainfitError(Exception):
    """What a user can repair. The message is one line: what is wrong, the values, the flag or key that repairs it."""

    exit_code = 2


class OutOfMemory(TrainfitError):  # noqa: N818 - the field's own word
    """No setting left to try fits the memory. The message has the numbers and the smallest change that fits."""

    exit_code = 3


class HalfUpdated(OutOfMemory):
    """Memory ran out in the middle of an update: this state must not be saved; the one saved before stands."""
