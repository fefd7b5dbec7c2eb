"""A process that ends when the one that began it is gone, even if that was killed and could not end it.

Whoever begins it holds the other end of its standard input, and the system closes that with the holder.
"""

import os
import signal
import threading

VARIABLE = "RECAP_ENDS_WITH_STDIN"
STDIN = 0


def watch() -> None:
    """End this process by SIGTERM when its standard input ends, if whoever began it asks for that by `VARIABLE`.

    Nothing else reads that input: for all others, and for processes that this one begins, standard input is empty.
    """
    if os.environ.pop(VARIABLE, ""):
        held = os.dup(STDIN)
        with open(os.devnull, "rb") as empty:
            os.dup2(empty.fileno(), STDIN)
        threading.Thread(target=_wait, args=(held,), name="parent", daemon=True).start()


def _wait(held: int) -> None:
    while os.read(held, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
