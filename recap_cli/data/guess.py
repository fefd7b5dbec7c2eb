"""Which columns of a table a task may mean, where nobody has said it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.core.task import Task
from recap_cli.data.class_folders import read_folder
from recap_cli.data.column_hints import Role
from recap_cli.data.columns import IMAGE, TEXT, WORDS
from recap_cli.data.hub import read_hub
from recap_cli.data.sources import folder_for_texts
from recap_cli.data.tables import READERS, read_file
from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa

SEEN = 200  # values of a column that are looked at
USUAL = {  # what such columns are called most often, the first that is there first
    "label": ("label", "labels"),
    "label_map": ("label_map", "label", "labels", "annotation", "mask", "segmentation", "semantic_segmentation"),
    "text": ("text", "sentence", "sentences", "content", "review", "document", "comment", "tokens", "words"),
    "image": ("image", "img", "picture", "photo"),
}
PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
)
NUMBERED = re.compile(r"(.*?)[ _-]?(1|a)", re.IGNORECASE)  # of the first of two columns; the second has 2 or b


def is_local(data: str) -> bool:
    """Whether a name means a file or a folder of this machine, there or not, and not a data set of the hub."""
    try:
        there = Path(data).expanduser().exists()
    except OSError:  # a name that no file may have
        there = True
    looks_local = data.startswith((".", "/", "~")) or data.count("/") > 1 or Path(data).suffix.lower() in READERS
    return there or looks_local


def read_table(task: Task, data: Mapping[str, Any]) -> "pa.Table | None":
    """Return the training table that a recipe's section `data` names; None for a folder of images, which has no columns.

    Raises:
        DataError: It cannot be read.
    """
    if data.get("train") is None:
        try:
            return read_hub(data["name"], data.get("subset"), [data.get("train_split") or "train"])[0]
        except DataError as error:
            raise DataError(
                f"there is no file or folder {data['name']}, and as a data set of the hub: {error.message}",
                hint="give a file that is there, as in --data train.csv",
            ) from error
    path = Path(data["train"]).expanduser()
    if path.is_dir():
        if task.inputs != "image":
            raise folder_for_texts(path, "data.train")
        if task.target.maps:  # whose folders have usual names
            return None
        read_folder(path, key="data.train")
        return None
    return read_file(path, key="data.train", text_columns=[])


def guess_columns(task: Task, table: "pa.Table", origin: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of a task's inputs and labels that nobody has named, by the keys of a recipe's section `data`.

    A column of a usual name is taken. Else the one that fits is; two texts are a pair only if their names say so.

    Args:
        task: The task.
        table: All columns.
        origin: The source, for messages.
        given: The keys that are named.

    Raises:
        DataError: No column fits, or several do; the hint has the `--set` for one.
    """
    key, label = "image" if task.inputs == "image" else "text", "label_map" if task.target.maps else "label"
    taken = {str(given[name]) for name in (key, "text_pair", label) if given.get(name) is not None}
    found: dict[str, str] = {}
    if given.get(label) is None:
        target = task.target
        role = Role(label, "label", target.holds, target.can_be, target.is_likely)
        found[label] = _the_one([name for name in _fitting(table, role) if name not in taken], role, table, origin)
    if given.get(key) is None:
        role = Role(key, key, *{"text": TEXT, "words": WORDS, "image": IMAGE}[task.inputs])
        free = [name for name in _fitting(table, role) if name not in taken | set(found.values())]
        if task.inputs == "text":
            free = [name for name in free if _has_blanks(table.column(name))] or free
        pair = _pair(free) if task.inputs == "text" and given.get("text_pair") is None else None
        found |= dict(zip(("text", "text_pair"), pair, strict=True)) if pair else {key: _the_one(free, role, table, origin)}
    return found


def _fitting(table: "pa.Table", role: Role) -> list[str]:
    names = [name for name in table.column_names if table.column_names.count(name) == 1]
    return [name for name in names if role.can_be(table.column(name).type) and role.is_likely(table.column(name))]


def _has_blanks(column: "pa.ChunkedArray") -> bool:
    """Whether most texts of a column have several words, which identifiers and addresses have not."""
    values = [str(value).strip() for value in column.slice(0, SEEN).to_pylist()]
    return sum(" " in value for value in values) > len(values) / 2


def _pair(names: Sequence[str]) -> tuple[str, str] | None:
    """Return two columns whose names say that they belong together, such as sentence1 and sentence2; None if none do."""
    return next(_pairs(names), None)


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    by_lower = {name.lower(): name for name in names}
    yield from ((by_lower[a], by_lower[b]) for a, b in PAIRS if a in by_lower and b in by_lower)
    for name in names:
        if (match := NUMBERED.fullmatch(name)) is not None:
            second = name[: match.start(2)] + {"1": "2", "a": "b", "A": "B"}[match[2]]
            if second in names:
                yield name, second


def _the_one(names: list[str], role: Role, table: "pa.Table", origin: str) -> str:
    usual = [name for wanted in USUAL[role.key] for name in names if name.lower() == wanted]
    if usual or len(names) == 1:
        return [*usual, *names][0]
    what = f"several columns that may hold {role.holds}: {', '.join(names)}" if names else f"no column of {role.holds}"
    hint = f"name it with {setting(f'data.{role.key}', names[0])}" if names else "choose other data"
    raise DataError(
        f"{origin} has {what}; its columns are: {', '.join(table.column_names)}",
        hint=f"{hint}, or another task: --set task.kind=NAME",
    )
