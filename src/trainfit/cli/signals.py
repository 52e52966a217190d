"""What Ctrl-C, SIGTERM and SIGHUP do: one line, and the exit code 128 + the signal's number."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(KeyboardInterrupt):
    """The user stopped the command."""

    def __init__(self, number: int) -> None:
        """Signal `number` was received."""
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


class Signals:
    """Handlers for as long as the context lasts.

    Until `ready` is set the process ends at once: modules are being imported, and an exception might be lost there.
    Then the first signal raises `Stopped`, and the second ends the process at once, wherever it is.
    """

    def __init__(self) -> None:
        """Install nothing yet."""
        self.ready = False
        self.received: int | None = None
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers; only a main thread can."""
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked loader process, which inherits this handler: the trainer decides
            return
        if self.received is not None or not self.ready:
            end_at_once(number)
        self.received = number
        self.first(number)

    def first(self, number: int) -> None:
        """Act on the first signal once `ready` is set."""
        raise Stopped(number)


class StopAfterStep(Signals):
    """Handlers of training: once windows are trained, the first signal lets the step end and the state be saved."""

    def requested(self) -> bool:
        """Whether to stop; training asks after every window."""
        self.ready = True
        return self.received is not None

    def first(self, number: int) -> None:  # noqa: ARG002
        """Announce that training stops."""
        write_line("\nstopping: the state is saved after this step or evaluation (once more: stop at once)")


def end_quietly() -> None:
    """Let Ctrl-C end the process while Python itself ends, where an exception would be printed as a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_at_once(number: int) -> None:
    """End the process without cleaning up; files are replaced as a whole, so that the last saved ones are intact."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    write_line("\ntrainfit: stopped at once; what was saved before is intact")
    os._exit(128 + number)


def write_line(text: str) -> None:
    """Write to stderr from a signal handler, where `print` may find its own buffer in use."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return  # nobody reads it
