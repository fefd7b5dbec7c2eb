"""recap.json of an exported model: read as a foreign file, and every file that it names compared with its checksum."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recap_cli.errors import ModelError
from recap_cli.models.checkpoints import INDEX, PICKLED, WEIGHTS
from recap_cli.state import files as storage
from recap_cli.untrusted import files as foreign

SCHEMA = 1
FACTS = "recap.json"
FORMS = ("stock", "ragged", "dense")
HINT = "export or copy it again"
LOADED = ("spec.json", "config.json")  # and the weights; an export writes these for every form
# What libraries look for in a folder, by name or pattern. No such file may lack a checksum.
LOOKED_FOR = (*LOADED, "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", *PICKLED)


def read(folder: Path) -> dict[str, Any]:
    """Read recap.json, and compare every file with its checksum.

    Raises:
        ModelError: The folder is not an export, or comes from a newer version. Or a file was altered, is a link to another
            folder, or would be loaded without a checksum.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder that recap export wrote", hint="recap export STATE OUT writes one")
    place = folder / FACTS
    if not place.exists():
        raise ModelError(f"{place} does not exist", hint="recap export STATE OUT writes such a folder")
    about = foreign.read_object(place, HINT)
    schema = about.get("schema")
    if type(schema) is not int or schema < 1:
        raise ModelError(f"{place} is not what recap export wrote: its schema is {schema!r}", hint=HINT)
    if schema > SCHEMA:
        raise ModelError(f"{folder} was written by a newer recap (schema {schema})", hint="pip install -U recap-cli")
    if lacking := [key for key in ("form", "sizes", "files") if key not in about]:
        raise ModelError(f"{place} has no {lacking[0]!r}", hint=HINT)
    if about["form"] not in FORMS:
        raise ModelError(f"{place}: form is {about['form']!r}; expected one of {', '.join(FORMS)}", hint=HINT)
    sizes = about["sizes"]
    if not isinstance(sizes, dict) or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise ModelError(f"{place}: sizes are a number for each axis", hint=HINT)
    _check_files(folder, _checksums(place, about["files"]))
    return about


def _checksums(place: Path, files: Any) -> dict[str, storage.Checksum]:
    """Return the checksum of each file. Raises `ModelError` for one that is malformed, or of a file in another folder."""
    if not isinstance(files, dict):
        raise ModelError(f"{place}: files is not an object with a checksum for each name", hint=HINT)
    checksums = {}
    for name, facts in files.items():
        if not foreign.is_plain(name):
            raise ModelError(f"{place} names {name!r}, which is no file in the same folder", hint=HINT)
        if not isinstance(facts, dict) or {key: type(value) for key, value in facts.items()} != {"bytes": int, "sha256": str}:
            raise ModelError(f"{place}: the checksum of {name} is not bytes and sha256", hint=HINT)
        checksums[name] = storage.Checksum(**facts)
    return checksums


def _check_files(folder: Path, checksums: Mapping[str, storage.Checksum]) -> None:
    """Raise `ModelError` unless every file is unaltered, and no other file could be loaded."""
    for name, checksum in checksums.items():
        path = folder / name
        foreign.check_ordinary(path, HINT)
        if path.exists() and not _is_inside(path):
            raise ModelError(f"{path} is a link to a file outside", hint=HINT)
        if what := storage.difference(path, checksum):
            raise ModelError(f"{path}: {what}", hint=HINT)
    there = {path.name for pattern in LOOKED_FOR for path in folder.glob(pattern)}
    if foreign_files := sorted(there - set(checksums)):
        raise ModelError(f"{folder / foreign_files[0]} has no checksum in {FACTS}", hint=HINT)
    lacking = [name for name in LOADED if name not in checksums]
    lacking += [] if WEIGHTS in checksums or INDEX in checksums else [WEIGHTS]
    if lacking:
        raise ModelError(f"{folder / FACTS} has no checksum of {lacking[0]}", hint=HINT)


def _is_inside(path: Path) -> bool:
    """Whether a file is in its folder. In the hub's cache it may be a link to the folder of blobs."""
    target, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return target.parent in (folder, blobs)
