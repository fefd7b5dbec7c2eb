"""Data files and image folders: damaged, odd, hostile; `recap init` reads them, for it warms up the head."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage, pictures
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.values import shares, unfold
from tests.fuzz.world import World

TEXTS = ("csv", "tsv", "json", "jsonl", "parquet")
BASES = (*TEXTS, "images")
ROWS = 40
CELLS = [
    "",
    " ",
    "NA",
    "nan",
    "null",
    "true",
    "1",
    "0",
    "-1",
    "1.0",
    "1.5",
    "01",
    "1e3",
    "cat",
    "CAT",
    "dog ",
    "x" * 3000,
    "a\0b",
    "é",
    '"',
    "a,b",
    "a\nb",
    "\x1b[31m",
    "\ufeff",
    "=1+1",
    "۳",
]
VALUES = [
    None,
    True,
    0,
    1,
    2,
    5,
    -1,
    1.0,
    1.5,
    float("nan"),
    10**30,
    "",
    "cat",
    [],
    ["cat"],
    {},
    {"bytes": 1},
    {"$deep": 40},
    {"$long": 3000},
]
LABELS = [
    ["1", "2", "3"],
    ["0", "2"],
    ["01", "02"],
    ["True", "False"],
    ["1.0", "2.0"],
    ["a", "A"],
    ["x"],
    ["-1", "0"],
    ["0.5", "1.5"],
    ["", "a"],
    ["cat", "1"],
]

_which = st.sampled_from(["train", "train", "train", "validation"])
_cell = st.tuples(
    st.just("cell"),
    _which,
    shares,
    st.sampled_from(["sentence", "label", "label", "new"]),
    st.one_of(
        st.sampled_from(CELLS), st.sampled_from(VALUES), st.text(max_size=5, alphabet=st.characters(exclude_categories=("Cs",)))
    ),
)
_labels = st.tuples(st.just("labels"), st.sampled_from(LABELS))
_column = st.tuples(
    st.just("column"),
    _which,
    st.sampled_from(
        [
            "drop sentence",
            "drop label",
            "rename label",
            "rename sentence",
            "double label",
            "empty",
            "one row",
            "float16",
            "huggingface",
        ]
    ),
)
_bytes = st.tuples(st.just("bytes"), _which, damage.bytewise)
_file = st.tuples(st.just("file"), _which, damage.filewise)
_image = st.one_of(
    st.tuples(
        st.just("png"),
        shares,
        st.sampled_from(["cut", "flip", "empty", "fifo", "dangling", "folder", "junk", "bomb", "wide", "text", "delete"]),
        shares,
    ),
    st.tuples(
        st.just("mode"),
        shares,
        st.sampled_from(["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV"]),
        st.sampled_from([1, 3, 16, 300]),
    ),
    st.tuples(
        st.just("beside"),
        st.sampled_from(
            [
                "._0.png",
                ".DS_Store",
                "Thumbs.db",
                "notes.txt",
                "evil.py",
                "cat/._1.png",
                "cat/x.gif",
                "cat/b\\udcff.png",
                "n\\udcfft/1.png",
                "metadata.csv",
                "metadata.jsonl",
                "cat/sub/1.png",
                " /1.png",
                "\x1b[31m/1.png",
            ]
        ),
    ),
)


def cases() -> st.SearchStrategy[Case]:
    """A form, and one or two steps."""
    texts = st.one_of(_cell, _cell, _labels, _column, _bytes, _file)
    text_cases = st.builds(
        Case, st.just("data"), st.sampled_from(TEXTS), st.one_of(st.tuples(texts), st.tuples(texts, texts)), st.just(("init",))
    )
    images = st.one_of(_image, _image, _image, _bytes, _file)
    image_cases = st.builds(
        Case, st.just("data"), st.just("images"), st.one_of(st.tuples(images), st.tuples(images, images)), st.just(("init",))
    )
    return st.one_of(text_cases, text_cases, image_cases)


def prepare(world: World) -> None:
    """Write the data."""
    world.data()
    world.recipe("bert")
    world.recipe("vit")


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The call of a case, or where colours are looked at three calls."""
    root = box.root / "data"
    root.mkdir()
    refuse = ""
    if case.base == "images":
        spoiled: dict[Path, str] = {}
        for split in ("train", "validation"):
            shutil.copytree(world.data() / split, root / split)
        for step in case.steps:
            pictures.altered(root, step, box, spoiled)
        refuse = next(filter(None, spoiled.values()), "")
    else:
        rows = {split: _rows(world.data() / f"{split}.csv") for split in ("train", "validation")}
        for step in case.steps:
            refuse = _tables(rows, step) or refuse
        refuse = refuse or _missing(rows)
        written = {split: root / f"{split}.{case.base}" for split in rows}
        for split, table in rows.items():
            if not _write(written[split], table, [step[2] for step in case.steps if step[0] == "column" and step[1] == split]):
                return  # the form has no way to say so
        for step in case.steps:
            if step[0] in ("bytes", "file"):
                name = written[step[1]].name
                damage.apply(root, (step[2][0], name, *step[2][2:]), box.outside)
                refuse = refuse or (
                    "a data file that is not there is refused"
                    if step[2][0] in ("delete", "dangling", "empty", "folder")
                    else ""
                )
            elif step[0] == "write":
                damage.apply(root, step, box.outside)
    if any(step[0] == "ramps" for step in case.steps):
        yield from _ramps(root, world, box)
        return
    call = _init(case.base, root, world, box, "state", refuse)
    fine = ("succeed",) in case.steps
    yield replace(call, succeed="what a user expects to work, works" if fine else "", never=("straddling",))
    suffix = "" if case.base == "images" else f".{case.base}"
    model = world.checkpoint("vit" if case.base == "images" else "bert")
    guessed = ("compress", str(model), "--data", str(root / f"train{suffix}"), "--dry-run")
    yield Call(guessed, state=root, reads_only=True, never=("straddling",))


def _init(
    base: str, root: Path, world: World, box: Box, name: str, refuse: str, check: Callable[[Any], str] | None = None
) -> Call:
    values = world.recipe("vit" if base == "images" else "bert")
    suffix = "" if base == "images" else f".{base}"
    values["data"] |= {split: str(root / f"{split}{suffix}") for split in ("train", "validation")}
    values["finetune"] |= {"steps": 1}
    recipe = box.cwd / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(values))
    state = box.root / name
    names = ("data", "model", "label", "memory")
    return Call(
        ("init", str(recipe), "--state", str(state)),
        state=root,
        reads_only=True,
        refuse=refuse,
        names=names,
        writes=(state,),
        check=check,
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as text:
        return [dict(row) for row in csv.DictReader(text)]


def _tables(rows: dict[str, list[dict[str, Any]]], step: tuple[Any, ...]) -> str:
    """Do a step to the rows; returns the rule that forbids to use them."""
    if step[0] == "must-refuse":
        return str(step[1])
    if step[0] == "cell":
        _, split, share, column, value = step
        if table := rows[split]:  # an earlier step may have emptied it
            table[int(share * len(table))][column] = unfold(value)
    elif step[0] == "labels":
        for table in rows.values():
            for number, row in enumerate(table):
                row["label"] = step[1][number % len(step[1])]
    elif step[0] == "column":
        _, split, what = step
        action, _, column = what.partition(" ")
        for row in rows[split]:
            if action in ("drop", "rename") and column in row:
                value = row.pop(column)
                row.update({"strange": value} if action == "rename" else {})
        if what == "one row":
            del rows[split][1:]
        if what == "empty":
            rows[split].clear()
            return "data without a row is refused"
    return ""


def _missing(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The rule for tables without one of their columns, once all steps are done: a later step may have put it back."""
    without = any(table and not any(name in row for row in table) for table in rows.values() for name in ("sentence", "label"))
    return "a column that is not there is refused" if without else ""


def _write(file: Path, rows: list[dict[str, Any]], steps: list[str]) -> bool:
    """Write rows in the form that the suffix names; returns whether it can say them."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["sentence", "label"]
    if file.suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if file.suffix == ".csv" else "\t")
        writer.writerow([*columns, *(["label"] if "double label" in steps else [])])
        writer.writerows(
            [[row.get(name, "") for name in (*columns, *(["label"] if "double label" in steps else []))] for row in rows]
        )
        file.write_text(text.getvalue())
    elif file.suffix in (".json", ".jsonl"):
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) + "\n" if file.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    else:
        return _write_parquet(file, rows, columns, steps)
    return True


def _write_parquet(file: Path, rows: list[dict[str, Any]], columns: list[str], steps: list[str]) -> bool:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        if "float16" in steps:
            import numpy as np

            number = columns.index("label")
            table = table.set_column(number, "label", pa.array(np.arange(len(rows), dtype=np.float16) % 3))
        if "huggingface" in steps:
            table = table.replace_schema_metadata({"huggingface": "no json"})
        if "strange type" in steps:
            features = {"info": {"features": {"label": {"_type": "Evil"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, file)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, KeyError, IndexError):
        return False
    return True


def _ramps(root: Path, world: World, box: Box) -> Iterator[Call]:
    """S2: 16 bits train the head as the same pictures in 8 bits do, or are refused; above all not as white ones do."""
    heads: dict[str, Any] = {}
    for depth in ("8", "white", "16"):
        folder = box.root / f"data-{depth}"
        shutil.copytree(root, folder)
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            pictures.ramp(file, depth, number)

        def keep(_: Any, depth: str = depth) -> str:
            from safetensors.torch import load_file

            heads[depth] = load_file(box.root / f"state-{depth}" / "full-000" / "model.safetensors")["classifier.weight"]
            if depth != "16":
                return ""
            near, far = ((heads[depth] - heads[other]).abs().max() for other in ("8", "white"))
            return "" if near < far / 4 else "images of 16 bits train as white ones do"

        yield _init("images", folder, world, box, f"state-{depth}", "", keep)


def _case(*steps: tuple[Any, ...], base: str = "csv") -> Case:
    return Case("data", base, steps, ("init",))


CORPUS = {
    "a csv of a million million zero bytes": _case(
        ("file", "train", ("sparse", 0)), ("must-refuse", "zeros are no text"), base="csv"
    ),
    "a jsonl of as many": _case(("file", "train", ("sparse", 0)), base="jsonl"),
    "a file that was no image and is one now": _case(("png", 0.0, "empty", 0.0), ("mode", 0.0, "L", 16), base="images"),
    "a pipe that is an image now": _case(("png", 0.0, "fifo", 0.0), ("png", 0.0, "wide", 0.0), base="images"),
    "an empty file that is hidden": _case(("beside", "._0.png"), ("png", 0.0, "empty", 0.0), base="images"),
    "an escape in the name of a class": _case(("beside", "\x1b[31m/1.png"), ("png", 0.0, "cut", 0.0), base="images"),
    "S2 images of 16 bits": _case(("ramps",), base="images"),
    "S3 stars from 1 to 5": _case(("labels", ["1", "2", "3", "4", "5"]), ("succeed",)),
    "S3 labels 0 and 2": _case(("labels", ["0", "2"]), ("succeed",)),
    "S15 deep jsonl": _case(("write", "train.jsonl", "[" * 100_000 + "\n"), base="jsonl"),
    "S15 deep json": _case(("write", "train.json", "[" * 100_000), base="json"),
    "S15 float16 as labels": _case(("column", "train", "float16"), base="parquet"),
    "S15 metadata that are no JSON": _case(("column", "train", "huggingface"), base="parquet"),
    "S15 metadata of an unknown type": _case(("column", "train", "strange type"), base="parquet"),
    "a text of a parquet that is not UTF-8": _case(("bytes", "train", ("flip", 20, 0.4294, 7)), base="parquet"),
    "S15 an image of 20,000 x 20,000": _case(("png", 0.1, "bomb", 0.0), base="images"),
    "S15 a class that is not UTF-8": _case(("beside", "n\\udcfft/1.png"), base="images"),
    "S15 a file that is not UTF-8": _case(("beside", "cat/b\\udcff.png"), base="images"),
    "S16 ._0.png of macOS": _case(("beside", "cat/._0.png"), ("succeed",), base="images"),
    "S16 an image that is a FIFO": _case(("png", 0.1, "fifo", 0.0), base="images"),
    "S16 a row of 2 MB": _case(("cell", "train", 0.5, "sentence", {"$long": 2_000_000})),
    "held: UTF-16": _case(("bytes", "train", ("insert", 0, 0.0, "\xff\xfe"))),
}
