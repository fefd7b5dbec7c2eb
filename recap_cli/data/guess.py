"""Which columns of a table a task may mean, where nobody has said it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.core.task import Task
from recap_cli.data.class_folders import read_folder
from recap_cli.data.column_hints import Role
from recap_cli.data.columns import IMAGE, TEXT, WORDS
from recap_cli.data.hub import read_hub
from recap_cli.data.tables import read_file
from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels")  # what a column of labels is called most often


def read_table(data: Mapping[str, Any]) -> "pa.Table | None":
    """Return the training table that a recipe's section `data` names; None for a folder of images, which has no columns.

    Raises:
        DataError: It cannot be read.
    """
    if data.get("train") is None:
        return read_hub(data["name"], data.get("subset"), [data.get("train_split", "train")])[0]
    path = Path(data["train"]).expanduser()
    if path.is_dir():
        read_folder(path, key="data.train")
        return None
    return read_file(path, key="data.train", text_columns=[])


def guess_columns(task: Task, table: "pa.Table", origin: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of a task's inputs and labels that nobody has named, by the keys of a recipe's section `data`.

    Args:
        task: The task.
        table: All columns.
        origin: The source, for messages.
        given: The keys that are named.

    Raises:
        DataError: No column fits, or several do; the hint has the `--set` for one.
    """
    inputs, target = {"text": TEXT, "words": WORDS, "image": IMAGE}[task.inputs], task.target
    key = "image" if task.inputs == "image" else "text"
    taken = {str(given[name]) for name in (key, "text_pair", "label") if given.get(name) is not None}
    found: dict[str, str] = {}
    if given.get("label") is None:
        label = Role("label", "label", target.holds, target.can_be, target.is_likely)
        likely = [name for name in _fitting(table, label) if name not in taken]
        named = [name for name in likely if name.lower() in LABELS]
        found["label"] = _the_one(named or likely, label, table, origin)
    if given.get(key) is None:
        role = Role(key, key, *inputs)
        free = [name for name in _fitting(table, role) if name not in taken | set(found.values())]
        pair = task.inputs == "text" and len(free) == 2 and given.get("text_pair") is None
        found[key] = free[0] if pair else _the_one(free, role, table, origin)
        found |= {"text_pair": free[1]} if pair else {}
    return found


def _fitting(table: "pa.Table", role: Role) -> list[str]:
    names = [name for name in table.column_names if table.column_names.count(name) == 1]
    return [name for name in names if role.can_be(table.column(name).type) and role.is_likely(table.column(name))]


def _the_one(names: list[str], role: Role, table: "pa.Table", origin: str) -> str:
    if len(names) == 1:
        return names[0]
    what = f"several columns that may hold {role.holds}: {', '.join(names)}" if names else f"no column of {role.holds}"
    raise DataError(
        f"{origin} has {what}; its columns are: {', '.join(table.column_names)}",
        hint=f"name it with {setting(f'data.{role.key}', names[0] if names else 'COLUMN')}",
    )
