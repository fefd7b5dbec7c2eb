"""An audit hook: what a call opens, writes, connects to, starts and unpickles, where it may not.

A hook cannot be taken off, so it is put on in the runner alone, and counts only between `begin` and `end`. It sees what goes
through Python; files that a library in Rust or C opens by itself are not seen. What would harm the machine is refused.
"""

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVING = {
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "shutil.rmtree": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
}
FORBIDDEN = {
    **dict.fromkeys(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"), "socket"),
    **dict.fromkeys(
        ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"), "process"
    ),
    "pickle.find_class": "unpickled",
    "os.chdir": "chdir",
}
HARM = ("outside", "socket", "process")
PLACES = ("/dev/null", "/proc/self")


class Watch:
    """What the hook knows of the call under way, and what it saw."""

    def __init__(self) -> None:
        self.on = False
        self.writable: tuple[str, ...] = ()
        self.hidden = self.data = self.code = "\0"
        self.may_start = False
        self.seen: list[tuple[str, str]] = []

    def begin(self, writable: Iterable[Path], hidden: Path, data: Path, code: Path, may_start: bool) -> None:
        """Count from now: files may be written below `writable`, none read below `hidden`; below `data` only `code` runs."""
        self.may_start = may_start
        self.writable = (*map(str, writable), *PLACES)
        self.hidden, self.data, self.code = str(hidden), str(data), str(code)
        self.seen = []
        self.on = True

    def end(self) -> list[tuple[str, str]]:
        """Count no more; returns each kind of violation with its detail."""
        self.on = False
        return self.seen

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._opened(*values)
        elif (paths := MOVING.get(event)) is not None:
            at = 1 if event in ("os.link", "os.symlink") else 0  # what a link points to is not touched
            last = values[-1] if event != "os.truncate" else None
            if not isinstance(last, int) or last < 0:  # else relative to a folder that is open, as within rmtree
                for path in values[at:paths]:
                    self._touches(event, path)
        elif event in FORBIDDEN and not (self.may_start and FORBIDDEN[event] == "process"):
            self._saw(FORBIDDEN[event], f"{event} {str(values[:2])[:120]}")
        elif event in ("compile", "exec") and values:
            name = str(values[-1] if event == "compile" else getattr(values[0], "co_filename", ""))
            if name.startswith(self.data) and not name.startswith(self.code):
                self._saw("executed", name.removeprefix(self.data))

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        if isinstance(flags, int) and flags & WRITING:
            self._touches("open", path)
        elif _absolute(path).startswith(self.hidden):
            self._saw("peeked", _absolute(path).removeprefix(self.data))

    def _touches(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        place = _absolute(path)
        if not any(place == inside or place.startswith(inside + os.sep) for inside in self.writable):
            self._saw("outside", f"{event} {place.removeprefix(self.data)}")

    def _saw(self, what: str, detail: str) -> None:
        if (what, detail) not in self.seen and len(self.seen) < 20:
            self.seen.append((what, detail))
        if what in HARM:
            raise PermissionError(errno.EPERM, f"the watch refuses this: {what} {detail}")


def _absolute(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))


WATCH = Watch()


def put_on() -> None:
    """Put the hook on this process, and on those forked from it."""
    sys.addaudithook(WATCH)
