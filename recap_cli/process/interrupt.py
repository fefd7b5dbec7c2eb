"""Ctrl-C: the first ends the command in order, a second ends it at once. Both have the same message and exit code.

A library may catch the first and raise another error, or none. So interrupts are counted, and not only raised.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 130
_done: list[str] = []  # what this process finished last, unless it has started something since
STDERR, SHOW_CURSOR = 2, "\x1b[?25h"


def note_done(what: str | None) -> None:
    """Note what is finished, as a hint how to continue. None: something unfinished has started."""
    _done[:] = [] if what is None else [what]


def done() -> str | None:
    """Return what was noted last."""
    return _done[0] if _done else None


@contextmanager
def counted(message: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C inside: the first raises `KeyboardInterrupt`, a second prints `message()` and ends the process.

    After a first Ctrl-C this also holds outside, until the process ends. Nothing changes if Ctrl-C is ignored, if another
    handler is set, or outside the main thread, where Python receives no signals.

    Yields:
        A function that returns whether there was a Ctrl-C.
    """
    count = 0
    note_done(None)

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        _end(message())

    in_main = threading.current_thread() is threading.main_thread()
    is_default = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: count > 0
    finally:
        if is_default and count == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(message: str) -> None:
    """Print a message and end at once, without cleaning up: cleaning may be what was interrupted. States are always whole."""
    cursor = SHOW_CURSOR if sys.stderr is not None and sys.stderr.isatty() else ""
    with suppress(OSError):  # stderr may be closed
        os.write(STDERR, (cursor + message).encode(errors="backslashreplace"))
    os._exit(INTERRUPTED)
