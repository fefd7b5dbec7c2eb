"""Commands in processes that can be killed as any other, and need import nothing anew: forks of a server that only imports.

The process of the tests itself is no place to fork from. Once its autograd has started a thread (for an accelerator, for a
device that a prediction makes up, for backward passes that are deeply nested), no fork of it can run a backward pass.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from recap_cli.cli import main
from tests.limits import HANG_SECONDS

SERVER = multiprocessing.get_context("forkserver")  # one for all of a worker; it never computes
SERVER.set_forkserver_preload(
    [
        *("recap_cli.cli", "recap_cli.stages.run", "datasets"),
        *("transformers.models.vit.modeling_vit", "torchmetrics.functional.classification"),
    ]
)


class Fork:
    """A command line of `recap` under way in a fork; what it prints is appended to the file `printed`."""

    def __init__(self, arguments: Sequence[str], printed: Path, stop_at: str = "") -> None:
        self.printed = printed
        printed.touch()
        self.process: ForkServerProcess = SERVER.Process(target=_play, args=(list(arguments), printed, stop_at), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self) -> int:
        """The exit code, when there is one. Raises `TimeoutError` if it hangs."""
        self.process.join(HANG_SECONDS)
        if (code := self.poll()) is None:
            self.process.kill()
            raise TimeoutError(self.printed.read_text(encoding="utf-8"))
        return code


def _play(arguments: list[str], printed: Path, stop_at: str) -> None:
    with printed.open("a", encoding="utf-8", buffering=1) as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = out
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if stop_at:
            _stop_twice(stop_at)
        sys.exit(main(arguments))


def _stop_twice(at: str) -> None:
    """Let Ctrl-C come twice where a file of this name is about to be removed: the second while the first unwinds."""
    unlink = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.as_posix().endswith(at):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
        unlink(path, missing_ok=missing_ok)

    Path.unlink = stop  # type: ignore[method-assign]
