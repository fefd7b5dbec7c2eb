"""Commands in separate processes, several at a time: a crash, or a lack of memory, ends only one of them.

Ctrl-C, or a signal to end, makes this process end them. If it is killed, they end themselves (`die_with_parent`).
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from recap_cli.machine.variables import CORES_DIVIDED
from recap_cli.process import die_with_parent
from recap_cli.state import files

POLL_SECONDS, END_SECONDS = 0.05, 10.0
ERROR = re.compile(r"^error: (.*?)(?=^hint: |\Z)", re.MULTILINE | re.DOTALL)  # as `console.error` prints it
ASKED = ("SIGTERM", "SIGHUP")  # what a batch system and a closed terminal send


class Process(NamedTuple):
    """A command to run, and the log file to which its output is appended."""

    name: str
    command: Sequence[str]
    log: Path


class Ended(NamedTuple):
    """A command that has ended. `error` is its message; None if it succeeded."""

    name: str
    error: str | None


class _Running(NamedTuple):
    process: Process
    child: "subprocess.Popen[bytes]"
    log: IO[bytes]
    begins: int  # where its output starts in the log


def run(processes: Sequence[Process], jobs: int) -> Generator[Ended]:
    """Run the commands in order, `jobs` at a time, and yield each as it ends. Closing the generator ends those that run.

    Raises:
        StorageError: A log cannot be written.
    """
    waiting, running = deque(processes), list[_Running]()
    environment = surroundings(jobs, os.environ)
    with _interrupted_by_signals():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.popleft(), environment))
                ended = [one for one in running if one.child.poll() is not None]
                running = [one for one in running if one not in ended]
                yield from [_ended(one) for one in ended]
                if not ended:
                    time.sleep(POLL_SECONDS)
        finally:
            _end(running)


def surroundings(jobs: int, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the commands: a share of the cores for each, unless the user has set a number; no colour."""
    environment = {key: value for key, value in given.items() if key != "FORCE_COLOR"}
    if jobs > 1 and "OMP_NUM_THREADS" not in environment:
        environment |= {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), CORES_DIVIDED: "1"}
    return environment


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(process: Process, environment: Mapping[str, str]) -> _Running:
    with files.storage_errors(process.log):
        log = process.log.open("ab")
    begins = log.tell()
    asked = {**environment, die_with_parent.VARIABLE: "1"}
    child = subprocess.Popen(process.command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=asked)
    return _Running(process, child, log, begins)


def _ended(one: _Running) -> Ended:
    _close(one)
    code = one.child.returncode
    if code == 0:
        return Ended(one.process.name, None)
    with one.process.log.open("rb") as log:
        log.seek(one.begins)
        output = log.read().decode("utf-8", "replace")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ", as the system does if memory runs out" if name == "SIGKILL" else ""
        return Ended(one.process.name, f"its process was ended by {name}{why}")
    messages = ERROR.findall(output)
    last_line = (output.strip().splitlines() or ["no output"])[-1]
    return Ended(one.process.name, messages[-1].strip() if messages else f"it ended with {code}: {last_line}")


def _end(running: Sequence[_Running]) -> None:
    """End the running commands: first by SIGTERM, later by SIGKILL. Their states are whole at any moment."""
    for one in running:
        one.child.terminate()
    for one in running:
        try:
            one.child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            one.child.kill()
            one.child.wait()
        _close(one)


def _close(one: _Running) -> None:
    """Close the files of a command that has ended."""
    one.log.close()
    if one.child.stdin is not None:
        one.child.stdin.close()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Turn signals to end into a Ctrl-C inside. Python receives signals in its main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ASKED if hasattr(signal, name)]
    defaults = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # `nohup` ignores SIGHUP
    for number in defaults:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
