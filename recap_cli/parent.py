"""A process that ends with the one that began it, however that ends: killed, too, or out of memory.

Whoever begins it holds the other end of its standard input, and the system closes that when it is gone.
"""

import _thread
import os
import threading
import time

VARIABLE = "RECAP_ENDS_WITH_STDIN"
STDIN, END_SECONDS = 0, 10.0


def watch() -> None:
    """Stop this process, as Ctrl-C does, when its standard input ends, if whoever began it asks for that by `VARIABLE`; a
    process that does not stop within some seconds is ended. Processes that this one begins are not asked.
    """
    if os.environ.pop(VARIABLE, ""):
        threading.Thread(target=_wait, name="parent", daemon=True).start()


def _wait() -> None:
    while os.read(STDIN, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(END_SECONDS)
    os._exit(130)
