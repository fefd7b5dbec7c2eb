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
    data = recipe.data
    if other.data is None and data.name is not None and other.split in (data.train_split, data.validation_split):
        raise _own(f"--test-split {other.split}")
    try:
        found = labelled_others(recipe, other)
    except DataError as error:
        raise DataError(error.message, hint=_with_options(error.hint)) from error
    if other.data is None:
        return HeldOut(other, found.origin, sha256(found.origin.encode()).hexdigest(), found.notes)
    place = Path(found.origin)
    if any(Path(own).expanduser().samefile(place) for own in (data.train, data.validation) if own is not None):
        raise _own(f"--test {place}")
    name, digest = other.data.expanduser().resolve().name, _digest(place)
    if place.is_file() and digest in {
        _of_file(Path(own)) for own in (data.train, data.validation) if own and Path(own).is_file()
    }:
        raise _own(f"--test {place}, a copy of them")
    return HeldOut(other, name if other.split is None else f"{name}, split {other.split}", digest, found.notes)


def _own(given: str) -> DataError:
    return DataError(
        f"{given}: the recipe trains or chooses by these data", hint="name data that nothing is chosen by: --test FILE"
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
