"""The journal of a transaction: the names that it writes or drops, on disk before it does so.

A file is removed only if the journal names it and `state.yaml` does not. Then a stopped stage has written it, or a commit has
dropped it. All other files belong to the user.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from recap_cli.state import files
from recap_cli.state.names import COMMIT, RECIPES, UNDER_WAY, is_ours

WORK = ".recap-transaction"  # the folder of the open transaction: the journal, and files that are not yet in their places
JOURNAL = "names"
MARK_DIGITS = 16


def open_journal(root: Path) -> Path:
    """Make the folder of a transaction if it does not exist, and return it.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    work = root / WORK
    with files.storage_errors(work):
        work.mkdir(exist_ok=True)
    return work


def note(root: Path, names: Iterable[str]) -> None:
    """Add names to the journal, and return when they are on the disk.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    place = root / WORK / JOURNAL
    text, is_new = "".join(_line(name) for name in names), not place.exists()
    with files.storage_errors(place, len(text)), place.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        files.flush_folders(root, [f"{WORK}/{JOURNAL}"])


def noted(root: Path) -> set[str]:
    """Return the names in the journal. Truncated or altered lines do not count.

    Raises:
        OSError: The journal cannot be read.
    """
    place = root / WORK / JOURNAL
    try:
        if files.oddity(place):
            return set()
        lines = place.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    names = (line.decode("utf-8", "replace")[MARK_DIGITS + 1 :] for line in lines)
    ours = {name for name in names if is_ours(name) or RECIPES.fullmatch(name)}
    return {name for name in ours if _line(name).encode()[:-1] in lines}


def sweep(root: Path, committed: Collection[str], spared: Collection[str] = ()) -> None:
    """Remove the files that the journal names, the folders that this empties, and the journal.

    Args:
        root: The state folder.
        committed: Files that stay.
        spared: Files that stay for now. The journal stays with them, so that another sweep can remove them.

    Raises:
        OSError: A file cannot be removed.
    """
    if files.odd_place(root, f"{WORK}/{JOURNAL}"):
        return  # recap has not made it
    old = noted(root) - set(committed)
    going = sorted(old - set(spared))
    for name in going:
        if files.odd_place(root, name) is None:
            (root / name).unlink(missing_ok=True)
            _remove_empty(root, name)
    _flush_around(root, going)
    if (root / COMMIT).exists():
        (root / UNDER_WAY).unlink(missing_ok=True)
    if not old & set(spared) and (root / WORK).exists():
        shutil.rmtree(root / WORK)


def _flush_around(root: Path, names: Iterable[str]) -> None:
    """Return when the removal of these files is on the disk: until then the journal must name them."""
    folders = {root / parent for name in names for parent in Path(name).parents}
    for folder in sorted(folders):
        if folder.is_dir():
            with suppress(OSError):  # some disks cannot flush; the files are gone all the same
                files.flush(folder)


def _remove_empty(root: Path, name: str) -> None:
    for parent in list(Path(name).parents)[:-1]:
        with suppress(OSError):  # it is not empty, or does not exist
            (root / parent).rmdir()


def _line(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:MARK_DIGITS]} {name}\n"
