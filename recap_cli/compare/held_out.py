"""Held-out data of a comparison: nothing was chosen by them, and every finished cell is scored on them."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from recap_cli.errors import DataError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.scoring import OtherData, labelled_others
from recap_cli.state import files


@dataclass(frozen=True)
class HeldOut:
    """Data that fit a recipe.

    Attributes:
        other: Where they are.
        name: What they are called, without the folders above them.
        digest: The SHA-256 of their content, or of their name on the hub.
        notes: What a user should know of them.
    """

    other: OtherData
    name: str
    digest: str
    notes: tuple[str, ...] = ()


def checked(recipe: Recipe, other: OtherData) -> HeldOut:
    """Read held-out data as those of a recipe, before anything is trained.

    Raises:
        DataError: They are missing, do not fit, have no labels, or have one that the training data lack. So it is with the
            recipe's own training or validation data.
        StorageError: They cannot be read.
    """
    _refuse_own(recipe, other)
    try:
        found = labelled_others(recipe, other)
    except DataError as error:
        raise DataError(error.message, hint=_with_options(error.hint)) from error
    if other.data is None:
        return HeldOut(other, found.origin, sha256(found.origin.encode()).hexdigest(), found.notes)
    name = other.data.expanduser().resolve().name
    said = name if other.split is None else f"{name}, split {other.split}"
    return HeldOut(other, said, _digest(Path(found.origin)), found.notes)


def _refuse_own(recipe: Recipe, other: OtherData) -> None:
    """Refuse the data that a recipe trains on, and those by which its rounds and rates are chosen."""
    data = recipe.data
    if other.data is None:
        own = other.split is not None and other.split in (data.train_split, data.validation_split) and data.name is not None
    else:
        place = other.data.expanduser() if other.split is None else other.data.expanduser() / other.split
        named = [Path(path).expanduser() for path in (data.train, data.validation) if path is not None]
        own = place.exists() and any(path.exists() and path.samefile(place) for path in named)
    if own:
        raise DataError(
            f"--test{'-split' if other.data is None else ''} {other.split if other.data is None else other.data}: "
            "the recipe trains or chooses by these data",
            hint="name data that nothing is chosen by: --test FILE",
        )


def _digest(place: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder."""
    with files.storage_errors(place):
        if place.is_file():
            return _of_file(place)
        whole = sha256()
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            whole.update(f"{path.relative_to(place).as_posix()}\0{_of_file(path)}\n".encode("utf-8", "surrogateescape"))
        return whole.hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def _with_options(hint: str | None) -> str | None:
    """Replace the options of `recap eval` in a hint by those of `recap compare`."""
    return None if hint is None else hint.replace("--data", "--test").replace("--split", "--test-split")


def say(found: HeldOut, tell: Callable[[str], None]) -> None:
    """Tell what the data are, and what a user should know of them."""
    for note in found.notes:
        tell(f"note: {found.name}: {note}")
    tell(f"every finished cell is scored on {found.name}, by which nothing is chosen")
