"""The folder on disk: which stage is done, which files count, and one commit point.

`state.yaml` names every file that counts, with its size and checksum. A stage writes new files under new names, flushes
them, and then replaces `state.yaml`; so whoever is killed, at any moment, leaves the state before the stage or the one
after it. What it had noted in its journal, and `state.yaml` does not name, the next writer removes; nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.errors import CorruptStateError, StageOrderError, StateError, StorageError
from recap_cli.state import files
from recap_cli.state.journal import sweep
from recap_cli.state.lock import (
    claim,
    is_tidy,
    locked,
    plain,
    refuse_odd,
    refuse_odd_place,
    refuse_running,
    refuse_state,
    withdraw,
)
from recap_cli.state.manifest import (
    COMMIT,
    LOOK_AT_PERMISSIONS,
    NEXT_STAGE,
    SCHEMA,
    STAGES,
    START_OVER,
    Manifest,
    below,
    quoted,
    read_manifest,
)
from recap_cli.state.transaction import Transaction, in_transaction

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCHEMA", "STAGES", "Manifest", "State", "Transaction"]


class State:
    """A state folder: open it, ask what comes next, read what was committed, write the next stage."""

    def __init__(self, path: Path, manifest: Manifest, recipe_text: str) -> None:
        self.path = path
        self.manifest = manifest
        self.recipe_text = recipe_text

    @staticmethod
    @contextmanager
    def create(path: str | Path, recipe_text: str, digest: str) -> Iterator[Transaction]:
        """The draft of `init`, in a new or empty folder, or in one that a killed `init` left behind.

        Raises:
            StateError: the folder holds a state, or anything else.
            StateLockedError: another process is making a state there.
            StorageError: the disk is full, or the folder cannot be made or written.
        """
        root = plain(path)
        made = claim(root)
        with locked(root, "init"):
            refuse_state(root)  # again: another `init` may just have finished
            try:
                with files.storage_errors(root):
                    sweep(root, committed=())
                with in_transaction(root, Manifest(0, "init", digest), "init") as transaction:
                    transaction.save_recipe(recipe_text)
                    yield transaction
                with suppress(OSError):  # committed; the next start flushes the same folder
                    files.flush(root.absolute().parent)
            finally:
                if not (root / COMMIT).exists():
                    withdraw(root, made)

    @classmethod
    def open(cls, path: str | Path) -> "State":
        """The state in a folder, its recipe checked.

        Raises:
            StateError: there is no state, or one of another schema.
            StateLockedError: another process is making it.
            CorruptStateError: state.yaml is not as it was written, or makes no sense; or the recipe was edited.
        """
        root = plain(path)
        try:
            state = cls(root, read_manifest(root), "")
        except CorruptStateError:
            raise
        except StateError:
            refuse_running(root)
            raise
        try:
            state.recipe_text = state.load_text(state.manifest.recipe)
        except CorruptStateError as error:
            raise CorruptStateError(
                f"{error.message}; the recipe of a state is not edited by hand",
                hint=f"put {state.manifest.recipe} back, or start a new state from the changed one: "
                "recap init RECIPE --state NEW; --set of `recap run` changes what may be changed in a state",
            ) from error
        return state

    def next_stage(self) -> str:
        """The stage that comes next. How many rounds there are to be is the recipe's business."""
        return NEXT_STAGE[self.manifest.stage]

    @contextmanager
    def writing(self, stage: str) -> Iterator[Transaction]:
        """The draft of a stage: the end of the `with` block commits it; an error or Ctrl-C leaves the state as it was.

        Raises:
            StageOrderError: another stage is next.
            StateLockedError: another process is writing this state.
            CorruptStateError: a link, a pipe or a device stands in the place of what was committed.
            StorageError: the disk is full, or the folder cannot be written.
        """
        with locked(self.path, stage):
            self._catch_up()
            self.check_order(stage)
            self._make_room()
            with in_transaction(self.path, self.manifest, stage) as transaction:
                yield transaction
            self.manifest = read_manifest(self.path)

    def amend(self, recipe_text: str, digest: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Commits another recipe in the place of the one there is, and notes the values `before` and `after` by key.

        What may differ is the caller's business. Whoever is killed leaves the old recipe or the new one.

        Raises:
            StateError: another process has changed the recipe in the meantime.
            StateLockedError: another process is writing this state.
            StorageError: the disk is full, or the folder cannot be written.
        """
        with locked(self.path, "run"):
            self._catch_up()
            self._make_room()
            with in_transaction(self.path, self.manifest, self.manifest.stage) as transaction:
                transaction.amend(recipe_text, digest, before, after)
            self.manifest = read_manifest(self.path)
            self.recipe_text = recipe_text

    def tidy(self) -> None:
        """Removes what a writer that was stopped has left: of a finished state, nobody else would.

        Where the folder cannot be written it stays, and does no harm.

        Raises:
            StateLockedError: another process is writing this state.
        """
        if is_tidy(self.path):
            return
        with suppress(StorageError), locked(self.path, "run"):
            self._catch_up()
            self._make_room()

    def verified(self, rel: str) -> Path:
        """The path of a committed file, or folder, after a look at size and checksum, once per process and file.

        Raises:
            StateError: the state has no such file, it may not be read, or another process has just moved it on.
            CorruptStateError: the file is missing, truncated or altered, or is none.
        """
        checksums = below(self.manifest.files, rel)
        if not checksums:
            hint = f"recap status {quoted(self.path)}"
            raise StateError(f"{self.path}: {rel} is not part of this state", hint=hint)
        for name in checksums:
            refuse_odd_place(self.path, name)
        differences = {name: what for name, what in zip(checksums, self._compared(checksums), strict=True) if what}
        if differences:
            self._refuse_stale()
            told = "; ".join(f"{self.path / name}: {what}" for name, what in differences.items())
            if all(what.startswith(files.DENIED) for what in differences.values()):
                raise StateError(told, hint=LOOK_AT_PERMISSIONS)
            raise CorruptStateError(told, hint=START_OVER)
        return self.path / rel

    def _compared(self, checksums: Mapping[str, files.Checksum]) -> list[str | None]:
        """How each committed file differs from its seal; several are hashed at once."""

        def compare(name: str) -> str | None:
            return files.difference(self.path / name, checksums[name])

        if len(checksums) == 1:  # most are asked for one by one, and were hashed before: a thread would cost more than it gains
            return [compare(name) for name in checksums]
        with ThreadPoolExecutor(max_workers=4) as threads:
            return list(threads.map(compare, checksums))

    def load_tensors(self, rel: str) -> dict[str, "Tensor"]:
        """The tensors of a committed safetensors file, on the CPU. Raises as `verified`."""
        return files.load_tensors(self.verified(rel))

    def load_json(self, rel: str) -> Any:
        """The value in a committed JSON file. Raises as `verified`."""
        return json.loads(self.load_text(rel))

    def load_text(self, rel: str) -> str:
        """A committed text file. Raises as `verified`, and `CorruptStateError` for one that is no UTF-8."""
        path = self.verified(rel)
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CorruptStateError(f"{path}: is no text", hint=START_OVER) from error

    def check_order(self, asked: str) -> None:
        """Passes where the stage `asked` is the next one.

        Raises:
            StageOrderError: another stage is next.
        """
        right = self.next_stage()
        if asked != right:
            done = f"`{self.manifest.stage}` of round {self.manifest.round} is done"
            message = f"{self.path}: {done}, so `{right}` comes next, not `{asked}`"
            raise StageOrderError(message, hint=f"recap {right} {quoted(self.path)}")

    def _make_room(self) -> None:
        """Removes the leftovers of a writer that was stopped, if everything that was committed is in a place of its own."""
        refuse_odd(self.path, self.manifest.files)
        with files.storage_errors(self.path):
            sweep(self.path, self.manifest.files)

    def _catch_up(self) -> None:
        """Takes over what other processes have committed since; but not another recipe, which the caller has read."""
        now = read_manifest(self.path)
        if now.recipe != self.manifest.recipe:
            message = f"{self.path}: another process changed settings of this state in the meantime"
            raise StateError(message, hint="run the same command again")
        self.manifest = now

    def _refuse_stale(self) -> None:
        now = read_manifest(self.path)
        if now != self.manifest:
            changed = now.recipe != self.manifest.recipe
            what = "changed settings of this state" if changed else f"finished `{now.stage}` of round {now.round}"
            raise StateError(f"{self.path}: another process {what} in the meantime", hint="run the same command again")
