"""End this process when its parent has ended, even if the parent was killed.

The parent holds the other end of this process's standard input, and the system closes it with the parent.
"""

import os
import signal
import threading

VARIABLE = "RECAP_ENDS_WITH_STDIN"
STDIN = 0


def watch() -> None:
    """End this process by SIGTERM when its standard input ends, if the parent asks for that by `VARIABLE`.

    For all other readers, and for child processes, standard input is empty then.
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
