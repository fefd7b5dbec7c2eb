"""A stranger's code, run so that it can fail in no way of its own: a plugin may raise, print, end or move the process.

Whoever calls into a plugin does so within `guarded`.
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
    """Turn whatever is raised inside into a `PluginError` that says `what` failed; our own errors and a lack of memory pass.

    SystemExit, and a KeyboardInterrupt that no signal caused, are such failures too; Ctrl-C ends the process as ever. What is
    printed inside goes to stderr, for stdout is for results. The working directory is afterwards what it was.
    """
    with _working_directory(), _results_kept_apart(), _interrupts() as heard:
        try:
            yield
        except (RecapError, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            if lacks_device_memory(error) or (isinstance(error, KeyboardInterrupt) and heard):
                raise
            told = ": ".join(filter(None, [type(error).__name__, _first_line(error)]))
            raise PluginError(f"{what}: {told}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    try:
        return str(error).partition("\n")[0]
    except Exception:  # noqa: BLE001  (its `__str__` is a stranger's code as well)
        return ""


@contextmanager
def _working_directory() -> Iterator[None]:
    before = _here()
    try:
        yield
    finally:
        if before is not None and _here() != before:
            os.chdir(before)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed; there is no way back to it either
        return None


@contextmanager
def _results_kept_apart() -> Iterator[None]:
    """Send to stderr what is printed inside, by Python or by a process that it starts."""
    try:
        results = os.dup(STDOUT)
    except OSError:  # closed: there is nothing to keep apart
        yield
        return
    plain = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            plain.flush()
            _point_stdout_at(STDERR)
            yield
    finally:
        plain.flush()  # what was written to the stream itself, past `sys.stdout`
        os.dup2(results, STDOUT)
        os.close(results)


def _point_stdout_at(descriptor: int) -> None:
    try:
        os.dup2(descriptor, STDOUT)
    except OSError:  # stderr is closed: what is printed by processes then stays where it goes
        return


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C that have come inside, each passed on to whoever heard them before."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def note(number: int, frame: object) -> None:
        heard.append(number)
        before(number, frame)  # type: ignore[arg-type]

    signal.signal(signal.SIGINT, note)
    try:
        yield heard
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)
