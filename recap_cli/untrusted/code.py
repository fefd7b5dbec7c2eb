"""Third-party code, run so that every failure is a `PluginError`: a plugin may raise, print, exit or change the directory.

All calls into plugins are inside `guarded`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from recap_cli.errors import PluginError, RecapError, lacks_device_memory

STDOUT, STDERR = 1, 2


@contextmanager
def guarded(what: str, hint: str) -> Iterator[None]:
    """Turn every exception inside into a `PluginError`. RECAP's errors, a lack of memory and Ctrl-C pass.

    SystemExit becomes a `PluginError`, too, and so does a KeyboardInterrupt without a signal. Output inside goes to stderr,
    because stdout is for results. Afterwards the working directory is what it was before.

    Args:
        what: What failed, for the message.
        hint: What the user can do.

    Raises:
        PluginError: The code inside failed.
    """
    with _working_directory(), _results_kept_apart(), _interrupts() as interrupts:
        try:
            yield
        except (RecapError, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            if lacks_device_memory(error) or (isinstance(error, KeyboardInterrupt) and interrupts):
                raise
            message = ": ".join(filter(None, [type(error).__name__, _first_line(error)]))
            raise PluginError(f"{what}: {message}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    try:
        return str(error).partition("\n")[0]
    except Exception:  # noqa: BLE001  (its `__str__` is third-party code as well)
        return ""


@contextmanager
def _working_directory() -> Iterator[None]:
    before = _current_directory()
    try:
        yield
    finally:
        if before is not None and _current_directory() != before:
            os.chdir(before)


def _current_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed, so it cannot be restored either
        return None


@contextmanager
def _results_kept_apart() -> Iterator[None]:
    """Send output inside to stderr, that of Python and of processes that it starts."""
    try:
        results = os.dup(STDOUT)
    except OSError:  # closed: there are no results to separate
        yield
        return
    plain = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            plain.flush()
            _point_stdout_at(STDERR)
            yield
    finally:
        plain.flush()  # output that was written to the stream itself, not by `sys.stdout`
        os.dup2(results, STDOUT)
        os.close(results)


def _point_stdout_at(descriptor: int) -> None:
    try:
        os.dup2(descriptor, STDOUT)
    except OSError:  # stderr is closed: output of child processes then goes to stdout
        return


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yield a list of the SIGINT signals that come inside. Each is passed on to the handler from before."""
    interrupts: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return

    def note(number: int, frame: object) -> None:
        interrupts.append(number)
        before(number, frame)  # type: ignore[arg-type]

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)
