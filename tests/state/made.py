"""States made by hand, with texts in the place of tensors, for the tests of the state folder."""

import errno
import os
import sys
import time
from pathlib import Path

import yaml

from recap_cli.state.manifest import checksummed
from recap_cli.state.store import State

RECIPE = "name: test\n"
BEST = {"round": 1, "metric": "accuracy", "value": 0.9, "loss": 0.2, "folder": "best-001", "noted": "by merge"}


def create(path: Path) -> State:
    with State.create(path, RECIPE, "d1") as transaction:
        transaction.save_text("full-000/model.txt", "zero")
        transaction.save_json("full-000/deep/config.json", {"hidden": 32})
        transaction.set_full("full-000")
        transaction.versions["recap"] = "0.1.0"
        transaction.facts["metric"] = 0.5
    return State.open(path)


def advance(state: State, stage: str, text: str = "one") -> None:
    with state.writing(stage) as transaction:
        transaction.save_text(f"round-{transaction.round:03d}/{stage}.txt", text)


def tree(root: Path) -> set[str]:
    """Every file below `root`, but not the lock, which stays between writers."""
    found = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    return found - {".recap-lock"}


def committed(root: Path) -> set[str]:
    return {"state.yaml", *State.open(root).manifest.files}


def alter(path: Path, data: bytes) -> None:
    time.sleep(0.02)  # the clock of file times ticks every few milliseconds
    path.write_bytes(data)


def rewrite(state: State, **changes: object) -> None:
    """Other facts under a checksum that is right: as another program would write them."""
    place = state.path / "state.yaml"
    facts = yaml.safe_load(place.read_text())
    place.write_text(checksummed(yaml.safe_dump({**facts, **changes})))


def script(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "child.py"
    file.write_text(text)
    return [sys.executable, str(file)]


def amend(state: State, value: int = 2, text: str = "name: changed\n") -> None:
    state.amend(text, f"d{value}", {"finetune.micro_batch_size": None}, {"finetune.micro_batch_size": value})


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root` with what it holds, but not the lock, which stays between writers."""
    return {rel: (root / rel).read_bytes() for rel in tree(root)}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
