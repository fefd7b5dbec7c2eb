"""Commands in forks of the process of the tests: they can be killed as any other, and need import nothing anew."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.limits import HANG_SECONDS


class Fork:
    """A command under way in a fork; what it prints is appended to the file `said`."""

    def __init__(self, command: Callable[[], int], said: Path) -> None:
        self.said, self.code = said, None
        said.touch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; those of torch are idle here
            self.pid = os.fork()
        if self.pid == 0:
            _play(command, said)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def wait(self) -> int:
        """The exit code, when there is one. Raises `TimeoutError` if it hangs."""
        deadline = time.monotonic() + HANG_SECONDS
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(self.said.read_text(encoding="utf-8"))
            time.sleep(0.01)
        return code


def _play(command: Callable[[], int], said: Path) -> None:
    code = 70
    try:
        with said.open("a", encoding="utf-8", buffering=1) as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            sys.stdout = sys.stderr = out  # not pytest's, which capture
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                code = command()
            except BaseException:  # noqa: BLE001  (told, and the code says so)
                traceback.print_exc()
    finally:
        os._exit(code)
