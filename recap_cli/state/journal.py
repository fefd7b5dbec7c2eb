"""What a writer writes or drops, noted and flushed before it does: the one ground on which a file of a state is removed.

Whatever the journal names and `state.yaml` does not is ours: a stage that was stopped has written it, or a commit has dropped
it. Everything else, wherever it lies, is the user's.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from recap_cli.state import files
from recap_cli.state.names import COMMIT, RECIPES, UNDER_WAY, is_ours

WORK = ".recap-draft"  # the folder of the one who writes: the journal, and files that are not yet in their places
JOURNAL = "names"
MARK_DIGITS = 16


def open_journal(root: Path) -> Path:
    """The folder of the one who writes, made if it is not there.

    Raises:
        StorageError: the disk is full or refuses.
    """
    work = root / WORK
    with files.storage_errors(work):
        work.mkdir(exist_ok=True)
    return work


def note(root: Path, names: Iterable[str]) -> None:
    """Adds names to the journal; returns when they are on the disk.

    Raises:
        StorageError: the disk is full or refuses.
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
    """The names in the journal. A line that is not whole, or not as it was written, names nothing.

    Raises:
        OSError: the journal cannot be read.
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
    """Removes the files that the journal names, the folders that they leave empty, and the journal.

    What is `committed` stays; what is `spared` too, and the journal with it, so that another sweep may remove it.

    Raises:
        OSError: something cannot be removed.
    """
    if files.odd_place(root, f"{WORK}/{JOURNAL}"):
        return  # not of our making
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
    """Returns when it is on the disk that these files are gone: until then the journal must name them."""
    folders = {root / parent for name in names for parent in Path(name).parents}
    for folder in sorted(folders):
        if folder.is_dir():
            with suppress(OSError):  # on a disk that flushes nothing, a tidy folder now is all that can be had
                files.flush(folder)


def _remove_empty(root: Path, name: str) -> None:
    for parent in list(Path(name).parents)[:-1]:
        with suppress(OSError):  # it holds something else, or is not there
            (root / parent).rmdir()


def _line(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:MARK_DIGITS]} {name}\n"
