"""Who may write a state folder, which folder may become one, and what in it is refused as it stands."""

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
    """The path without its `x/..` where there is no `x`: making the folder would make `x` too, and leave it there.

    Where all of them are there the path stays as it is, for `..` behind a link leads to where the link leads.
    """
    return Path(path) if os.path.exists(Path(path).parent) else Path(os.path.normpath(path))


def claim(root: Path) -> bool:
    """Makes the folder of a new state, or takes an empty one, and marks it. Returns whether it was made here.

    Raises:
        StateError: there is a state, or anything else, in the folder.
        StorageError: the folder cannot be made or written.
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
    """Passes where no state is.

    Raises:
        StateError: there is a state, or a file in place of the folder.
    """
    if root.exists() and not root.is_dir():
        raise StateError(f"{root}: is a file, not a folder", hint="give a new folder with --state")
    if (root / COMMIT).exists():
        raise StateError(
            f"{root}: there is a state here already",
            hint=f"give another folder with --state, or go on with this one: recap run --state {quoted(root)}",
        )


def refuse_running(root: Path) -> None:
    """Passes where no `init` is at work.

    Raises:
        StateLockedError: another process is making a state there.
    """
    lock = FileLock(root / LOCK, timeout=0)
    with suppress(OSError):  # whoever calls has an error of its own to raise
        if (root / UNDER_WAY).exists() and (root / LOCK).exists():
            try:
                lock.acquire()
            except Timeout:
                raise _locked_error(root) from None
            lock.release()


def withdraw(root: Path, made: bool) -> None:
    """Leaves the folder of a failed `init` as it was found; or marked, where not all that it wrote could be removed.

    The marker lets the next `init` use the folder, which removes what the journal names.
    """
    with suppress(OSError):  # an error is under way
        for name in (HOLDER, LOCK):
            (root / name).unlink(missing_ok=True)
        if os.path.lexists(root / WORK):
            return
        (root / UNDER_WAY).unlink(missing_ok=True)
        if made:
            root.rmdir()


@contextmanager
def locked(root: Path, stage: str) -> Iterator[None]:
    """Holds the kernel's lock on the folder, which goes when the process goes; a file beside it says who holds it.

    Raises:
        StateLockedError: another process holds it.
        CorruptStateError: the lock, or a file beside it, is no plain file.
        StorageError: the folder cannot be written.
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
        with suppress(OSError):  # only the message of the other process suffers
            told = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage}
            holder.write_text(json.dumps(told), encoding="utf-8")
        yield
    finally:
        try:
            with suppress(OSError):
                holder.unlink()
        finally:  # a second Ctrl-C may come here
            lock.release()


def _locked_error(root: Path) -> StateLockedError:
    try:
        told = json.loads((root / HOLDER).read_text(encoding="utf-8"))
        who = f"process {told['pid']} on {told['host']} (`recap {told['stage']}`)"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just starting, or just going
        who = "another process"
    return StateLockedError(f"{root}: {who} is writing this state", hint="wait until it is done, or stop it")


def is_tidy(root: Path) -> bool:
    """Whether nothing is left of a writer that was stopped."""
    return not any(os.path.lexists(root / name) for name in (WORK, UNDER_WAY, HOLDER))


def refuse_odd(root: Path, files: Iterable[str]) -> None:
    """Passes where `files`, those beside them that every state has, and the folders that they are in, are no links, and no
    pipes or devices.

    Raises:
        CorruptStateError: one is.
        StateError: one may not be looked at.
    """
    for rel in (*files, COMMIT, LOCK, HOLDER, UNDER_WAY, f"{WORK}/{JOURNAL}"):
        refuse_odd_place(root, rel)


def refuse_odd_place(root: Path, rel: str) -> None:
    """The same of one file.

    Raises:
        CorruptStateError: it is odd, or a folder on the way to it is.
        StateError: it may not be looked at.
    """
    try:
        odd = storage.odd_place(root, rel)
    except PermissionError as error:
        raise StateError(f"{root / rel}: {storage.DENIED} ({error.strerror})", hint=LOOK_AT_PERMISSIONS) from error
    if odd:
        raise odd_error(*odd)


def odd_error(path: Path, what: str) -> CorruptStateError:
    """The error that names what stands in the place of a file or a folder of a state."""
    hint = NO_LINKS if what == "a link" else START_OVER
    return CorruptStateError(f"{path}: is {what}, which nothing in a state is", hint=hint)
