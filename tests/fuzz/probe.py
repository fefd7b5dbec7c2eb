"""Plays that do what no command may do, one for each kind of fault: a run begins by seeing that the judge sees them."""

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

from recap_cli.errors import DataError
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.world import World


def prepare(world: World) -> None:
    """Nothing to make."""


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """One call, to a function here in the place of a command."""
    state = box.root / "state"
    state.mkdir()
    (state / "weights").write_text("w")
    (box.outside / "secret").write_text("s")
    rules = {
        "accepted": {"refuse": "a rule"},
        "refused": {"succeed": "a rule"},
        "wrong": {"same": {"weights": "0"}},
        "stdout": {"stdout": ""},
        "unclear": {"never": ("straddling",)},
    }
    yield Call(act=lambda: ACTS[case.base](box), state=state, writes=(state,), names=("there",), **rules.get(case.base, {}))  # type: ignore[arg-type]


def _refuse(box: Box) -> None:
    raise DataError("a.csv: not there")


def _bug(box: Box) -> None:
    raise DataError("this is a bug in recap: KeyError: 'x' (/a/b.py, line 3)")


def _bare(box: Box) -> None:
    raise KeyError("there")


def _lose(box: Box) -> None:
    (box.root / "state" / "weights").unlink()
    _refuse(box)


def _alter(box: Box) -> None:
    with (box.root / "state" / "weights").open("a") as file:
        file.write("x")
    _refuse(box)


def _connect(box: Box) -> None:
    with socket.socket() as made:
        made.connect(("127.0.0.1", 9))


def _refused(act: Callable[[Box], object]) -> Callable[[Box], None]:
    """The act, which the watch refuses as well as it sees it."""

    def tried(box: Box) -> None:
        try:
            act(box)
        except PermissionError:
            _refuse(box)

    return tried


def _execute(box: Box) -> None:
    exec(compile("1", str(box.root / "model" / "modeling_evil.py"), "exec"))


def _hold(box: Box) -> None:
    held = b"x" * 2**30
    print(len(held), file=sys.stderr)


def _fall(box: Box) -> None:
    os.abort()


def _exit(box: Box) -> None:
    error = DataError("not there")
    error.exit_code = 99
    raise error


def _mute(box: Box) -> None:
    error = DataError("")
    raise error


ACTS: dict[str, Callable[[Box], object]] = {
    "nothing": _refuse,
    "bug": _bug,
    "bare": _bare,
    "lost": lambda box: (box.scratch.joinpath("x").touch(), _lose(box)),
    "altered": _alter,
    "hang": lambda box: time.sleep(100),
    "crash": _fall,
    "accepted": lambda box: None,
    "refused": _refuse,
    "wrong": lambda box: None,
    "stdout": lambda box: print("hello"),
    "outside": _refused(lambda box: (box.root / "elsewhere.txt").touch()),
    "peeked": lambda box: (box.outside / "secret").read_text(),
    "socket": _refused(_connect),
    "process": _refused(lambda box: subprocess.run(["true"], check=True)),
    "unpickled": lambda box: pickle.loads(pickle.dumps(Fraction(1, 2))),
    "executed": _execute,
    "chdir": lambda box: os.chdir("/"),
    "code": _exit,
    "mute": _mute,
    "endless": lambda box: print("error: there " + "x" * 30_000, file=sys.stderr),
    "escape": lambda box: print("\x1b[31m", file=sys.stderr),
    "memory": _hold,
    "unclear": lambda box: print("straddling", file=sys.stderr),
    "unnamed": lambda box: (_ for _ in ()).throw(DataError("some file is missing")),
}
