"""The housekeeping of a state folder: who may write it, which folder may become one, and what is swept out of it."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from recap_cli import storage
from recap_cli.errors import StateError, StateLockedError
from recap_cli.manifest import COMMIT, OURS, RECIPES, UNDER_WAY, quoted

LOCK = ".recap-lock"
HOLDER = ".recap-writer"  # who holds the lock, for the message only


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
    """Leaves the folder of a failed `init` as it was found."""
    with suppress(OSError):  # an error is under way; and the marker lets the next `init` use the folder
        for name in (HOLDER, LOCK, UNDER_WAY):
            (root / name).unlink(missing_ok=True)
        if made:
            root.rmdir()


@contextmanager
def locked(root: Path, stage: str) -> Iterator[None]:
    """Holds the kernel's lock on the folder, which goes when the process goes; a file beside it says who holds it.

    Raises:
        StateLockedError: another process holds it.
        StorageError: the folder cannot be written.
    """
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
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _locked_error(root: Path) -> StateLockedError:
    try:
        told = json.loads((root / HOLDER).read_text(encoding="utf-8"))
        who = f"process {told['pid']} on {told['host']} (`recap {told['stage']}`)"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just starting, or just going
        who = "another process"
    return StateLockedError(f"{root}: {who} is writing this state", hint="wait until it is done, or stop it")


def sweep(root: Path, keep: Collection[str]) -> None:
    """Removes leftovers: whatever stands in folders of ours, or under names of ours, and not in `keep`.

    Raises:
        OSError: something cannot be removed.
    """
    names = {COMMIT + ".tmp"} | ({UNDER_WAY} if (root / COMMIT).exists() else set())
    for entry in list(root.iterdir()):
        name = entry.name
        if (name in names or RECIPES.fullmatch(name)) and name not in keep:
            entry.unlink()
        elif OURS.fullmatch(name):
            _sweep_folder(root, entry, keep)


def _sweep_folder(root: Path, folder: Path, keep: Collection[str]) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    elif not any(rel.startswith(f"{folder.name}/") for rel in keep):
        shutil.rmtree(folder)
    else:
        for parent, folders, files in os.walk(folder, topdown=False):
            here = Path(parent)
            links = [name for name in folders if (here / name).is_symlink()]
            for name in [*files, *links]:
                if (here / name).relative_to(root).as_posix() not in keep:
                    (here / name).unlink()
            if not any(here.iterdir()):
                here.rmdir()
