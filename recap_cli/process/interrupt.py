"""Ctrl-C: the first ends what runs in order, a second at once, wherever it comes. Both end with the same word and code.

A library may swallow the first, and raise something else or nothing; so it is counted here, and not only raised.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 130
_done: list[str] = []  # what this process has finished last, if nothing else is under way
STDERR, SHOW_CURSOR = 2, "\x1b[?25h"


def note_done(what: str | None) -> None:
    """Note what is finished now, in words that say how to go on. None: something is under way that is not."""
    _done[:] = [] if what is None else [what]


def done() -> str | None:
    """What was noted last."""
    return _done[0] if _done else None


@contextmanager
def heard(word: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is a `KeyboardInterrupt`, and a second says `word()` and ends the process.

    Yields what tells whether there was one. After one, a second is heard until the process is gone. Where Ctrl-C is ignored,
    or another program's own (Python hears signals in its main thread alone), nothing changes.
    """
    count = 0
    note_done(None)

    def hear(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        _end(word())

    in_main = threading.current_thread() is threading.main_thread()
    ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: count > 0
    finally:
        if ours and count == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(word: str) -> None:
    """Say it and be gone: no other code of ours runs, for it may be what was interrupted. A state is whole at any moment."""
    cursor = SHOW_CURSOR if sys.stderr is not None and sys.stderr.isatty() else ""
    with suppress(OSError):  # nobody may be there to read it
        os.write(STDERR, (cursor + word).encode(errors="backslashreplace"))
    os._exit(INTERRUPTED)
