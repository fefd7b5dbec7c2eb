"""Commands in processes of their own, some at a time: a crash, or memory that runs out, ends one of them and no other.

Asked to end, by Ctrl-C or by a signal that can be heard, this process ends them; if it is killed, they notice (`parent`).
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

from recap_cli.machine import threads
from recap_cli.process import die_with_parent
from recap_cli.state import files

POLL_SECONDS, END_SECONDS = 0.05, 10.0
ERROR = re.compile(r"^error: (.*?)(?=^hint: |\Z)", re.MULTILINE | re.DOTALL)  # as `console.error` prints it
ASKED = ("SIGTERM", "SIGHUP")  # what a batch system and a closed terminal send


class Process(NamedTuple):
    """A command to run, and the file that what it says is appended to."""

    name: str
    command: Sequence[str]
    log: Path


class Ended(NamedTuple):
    """A command that has ended; `error` is what it said was wrong, None if nothing was."""

    name: str
    error: str | None


class _Running(NamedTuple):
    process: Process
    child: "subprocess.Popen[bytes]"
    log: IO[bytes]
    begins: int  # of what this command says, in the log


def run(processes: Sequence[Process], jobs: int) -> Generator[Ended]:
    """Run the commands in their order, `jobs` at a time; yields each as it ends. Closed early, it ends those that run.

    Raises `StorageError` if a log cannot be written.
    """
    waiting, running = deque(processes), list[_Running]()
    environment = surroundings(jobs, os.environ)
    with _heard():
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
    """The environment of the commands: each has its share of the cores, unless the user has said how many; no colour."""
    environment = {key: value for key, value in given.items() if key != "FORCE_COLOR"}
    if jobs > 1 and "OMP_NUM_THREADS" not in environment:
        environment |= {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), threads.SHARED: "1"}
    return environment


def cores() -> int:
    """How many cores this process may use."""
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
        said = log.read().decode("utf-8", "replace")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return Ended(one.process.name, f"its process was ended by {name}{why}")
    told = ERROR.findall(said)
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    return Ended(one.process.name, told[-1].strip() if told else f"it ended with {code}: {last}")


def _end(running: Sequence[_Running]) -> None:
    """End what runs: by asking, and after a while by force. A state is whole at every moment."""
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
    """Close what is open of a command that has ended."""
    one.log.close()
    if one.child.stdin is not None:
        one.child.stdin.close()


@contextmanager
def _heard() -> Iterator[None]:
    """Inside, a signal to end is a Ctrl-C. Python hears signals in its main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [getattr(signal, name) for name in ASKED if hasattr(signal, name)]
    mine = [number for number in asked if signal.getsignal(number) == signal.SIG_DFL]  # `nohup` has SIGHUP ignored
    for number in mine:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
