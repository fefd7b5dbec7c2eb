"""Who may write a state folder, which folder may become one, and what in it is refused."""

import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from recap_cli.errors import CorruptStateError, StateError, StateLockedError
from recap_cli.state import files as storage
from recap_cli.state.journal import JOURNAL, WORK
from recap_cli.state.manifest import COMMIT, LOOK_AT_PERMISSIONS, START_OVER, UNDER_WAY, quoted

LOCK = ".recap-lock"
HOLDER = ".recap-writer"  # who holds the lock, for the message only
NO_LINKS = "put the folder or file itself back in its place; a whole state may lie elsewhere, and be linked to"


def plain(path: str | Path) -> Path:
    """Return the path without `x/..` if `x` does not exist: making the folder would make `x` too, and leave it there.

    If all its folders exist, the path stays as it is: `..` after a link leads to the parent of the link's target.
    """
    return Path(path) if os.path.exists(Path(path).parent) else Path(os.path.normpath(path))


def claim(root: Path) -> bool:
    """Make the folder of a new state, or take an empty one, and mark it.

    Returns:
        Whether the folder did not exist before.

    Raises:
        StateError: The folder is not empty.
        StorageError: The folder cannot be made or written.
    """
    with storage.storage_errors(root):
        refuse_state(root)
        made = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()) and not (root / UNDER_WAY).exists():
            raise StateError(f"{root}: is not empty, and not a state", hint="give a new folder with --state")
        refuse_odd(root, ())
        (root / UNDER_WAY).touch()
    return made


def refuse_state(root: Path) -> None:
    """Refuse a folder that holds a state.

    Raises:
        StateError: There is a state, or a file instead of a folder.
    """
    if root.exists() and not root.is_dir():
        raise StateError(f"{root}: is a file, not a folder", hint="give a new folder with --state")
    if (root / COMMIT).exists():
        raise StateError(
            f"{root}: is a state already",
            hint=f"give another folder with --state, or continue this state: recap run --state {quoted(root)}",
        )


def refuse_running(root: Path) -> None:
    """Refuse a folder in which an `init` is running.

    Raises:
        StateLockedError: Another process is making a state there.
    """
    lock = FileLock(root / LOCK, timeout=0)
    with suppress(OSError):  # the caller raises a better error
        if (root / UNDER_WAY).exists() and (root / LOCK).exists():
            try:
                lock.acquire()
            except Timeout:
                raise _locked_error(root) from None
            lock.release()


def withdraw(root: Path, made: bool) -> None:
    """Restore the folder of a failed `init`. If a file cannot be removed, leave the folder marked.

    The mark lets the next `init` use the folder, and remove what the journal names.
    """
    with suppress(OSError):  # must not hide the error that failed `init`
        for name in (HOLDER, LOCK):
            (root / name).unlink(missing_ok=True)
        if os.path.lexists(root / WORK):
            return
        (root / UNDER_WAY).unlink(missing_ok=True)
        if made:
            root.rmdir()


@contextmanager
def locked(root: Path, stage: str) -> Iterator[None]:
    """Hold the kernel's lock on the folder, which ends with the process. A file names the holder, for messages.

    Raises:
        StateLockedError: Another process holds it.
        CorruptStateError: The lock, or a file beside it, is not a plain file.
        StorageError: The folder cannot be written.
    """
    refuse_odd(root, ())
    lock = FileLock(root / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _locked_error(root) from None
    except OSError as error:
        raise storage.storage_error(root, error.errno or errno.EIO) from error
    holder = root / HOLDER
    try:
        with suppress(OSError):  # without the file, only the other process's message knows less
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage}
            holder.write_text(json.dumps(facts), encoding="utf-8")
        yield
    finally:
        try:
            with suppress(OSError):
                holder.unlink()
        finally:  # even if a second Ctrl-C interrupts the removal
            lock.release()


def _locked_error(root: Path) -> StateLockedError:
    try:
        facts = json.loads((root / HOLDER).read_text(encoding="utf-8"))
        who = f"process {facts['pid']} on {facts['host']} (`recap {facts['stage']}`)"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just starting or ending
        who = "another process"
    return StateLockedError(f"{root}: {who} is writing this state", hint="wait until it is done, or stop it")


def is_tidy(root: Path) -> bool:
    """Whether no leftovers of a stopped writer exist."""
    return not any(os.path.lexists(root / name) for name in (WORK, UNDER_WAY, HOLDER))


def refuse_odd(root: Path, files: Iterable[str]) -> None:
    """Refuse links, pipes and devices in place of `files`, of the files of every state, and of their folders.

    Raises:
        CorruptStateError: One is not a plain file or folder.
        StateError: One may not be looked at.
    """
    for rel in (*files, COMMIT, LOCK, HOLDER, UNDER_WAY, f"{WORK}/{JOURNAL}"):
        refuse_odd_place(root, rel)


def refuse_odd_place(root: Path, rel: str) -> None:
    """Do the same for one file.

    Raises:
        CorruptStateError: It, or a folder on the way to it, is not a plain one.
        StateError: It may not be looked at.
    """
    try:
        odd = storage.odd_place(root, rel)
    except PermissionError as error:
        raise StateError(f"{root / rel}: {storage.DENIED} ({error.strerror})", hint=LOOK_AT_PERMISSIONS) from error
    if odd:
        raise odd_error(*odd)


def odd_error(path: Path, what: str) -> CorruptStateError:
    """Return the error for a link, a pipe or a device in place of a file or folder of a state."""
    hint = NO_LINKS if what == "a link" else START_OVER
    return CorruptStateError(f"{path}: is {what}, which nothing in a state is", hint=hint)
