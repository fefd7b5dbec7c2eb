"""The state folder: which stage is done, which files count, and one commit point.

`state.yaml` names every file that counts, with its size and checksum. A stage writes new files under new names, flushes them,
and then replaces `state.yaml`. A kill at any moment leaves the state before the stage or the one after it. The next writer
removes the files of a killed one: those that the journal names and `state.yaml` does not.
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
    """A state folder: open it, ask for the next stage, read committed files, write a stage."""

    def __init__(self, path: Path, manifest: Manifest, recipe_text: str) -> None:
        self.path = path
        self.manifest = manifest
        self.recipe_text = recipe_text

    @staticmethod
    @contextmanager
    def create(path: str | Path, recipe_text: str, digest: str) -> Iterator[Transaction]:
        """Open the transaction of `init`, in a new or empty folder or in one that a killed `init` left behind.

        Args:
            path: The folder.
            recipe_text: The recipe as YAML.
            digest: Its digest.

        Raises:
            StateError: The folder is not empty.
            StateLockedError: Another process is making a state there.
            StorageError: The disk is full, or the folder cannot be written.
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
        """Open the state in a folder, and check its manifest and its recipe.

        Raises:
            StateError: There is no state, or its schema is another one.
            StateLockedError: Another process is making it.
            CorruptStateError: `state.yaml` or the recipe is not as it was written.
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
                hint=f"restore {state.manifest.recipe}, or start a new state from the changed one: "
                "recap init RECIPE --state NEW; `recap run --set` changes the execution settings of a state",
            ) from error
        return state

    def next_stage(self) -> str:
        """Return the stage that comes next. The recipe, not the state, ends the rounds."""
        return NEXT_STAGE[self.manifest.stage]

    @contextmanager
    def writing(self, stage: str) -> Iterator[Transaction]:
        """Open the transaction of a stage. The end of the `with` block commits it; an error or Ctrl-C discards it.

        Raises:
            StageOrderError: Another stage is next.
            StateLockedError: Another process is writing this state.
            CorruptStateError: A committed file is now a link, a pipe or a device.
            StorageError: The disk is full, or the folder cannot be written.
        """
        with locked(self.path, stage):
            self._catch_up()
            self.check_order(stage)
            self._make_room()
            with in_transaction(self.path, self.manifest, stage) as transaction:
                yield transaction
            self.manifest = read_manifest(self.path)

    def amend(
        self,
        recipe_text: str,
        digest: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        plugins: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit another recipe. A kill at any moment leaves the old recipe or the new one.

        Args:
            recipe_text: The new recipe as YAML. The caller checks which keys may differ.
            digest: Its digest.
            before: The old values by key, for the record of changes.
            after: The new values by key.
            plugins: Those of the new recipe; None where they stay the same.

        Raises:
            StateError: Another process has changed the recipe in the meantime.
            StateLockedError: Another process is writing this state.
            StorageError: The disk is full, or the folder cannot be written.
        """
        with locked(self.path, "run"):
            self._catch_up()
            self._make_room()
            with in_transaction(self.path, self.manifest, self.manifest.stage) as transaction:
                transaction.amend(recipe_text, digest, before, after)
                transaction.amend_plugins(plugins)
            self.manifest = read_manifest(self.path)
            self.recipe_text = recipe_text

    def tidy(self) -> None:
        """Remove what a stopped writer has left. A finished state has no next writer that would do it.

        If the folder cannot be written, the leftovers stay and do no harm.

        Raises:
            StateLockedError: Another process is writing this state.
        """
        if is_tidy(self.path):
            return
        with suppress(StorageError), locked(self.path, "run"):
            self._catch_up()
            self._make_room()

    def verified(self, rel: str) -> Path:
        """Return the path of a committed file or folder, once its size and checksum are checked. A process hashes a file once.

        Raises:
            StateError: The state has no such file, it cannot be read, or another process has just committed.
            CorruptStateError: The file is missing, truncated, altered, or not a plain file.
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
            message = "; ".join(f"{self.path / name}: {what}" for name, what in differences.items())
            if all(what.startswith(files.DENIED) for what in differences.values()):
                raise StateError(message, hint=LOOK_AT_PERMISSIONS)
            raise CorruptStateError(message, hint=START_OVER)
        return self.path / rel

    def _compared(self, checksums: Mapping[str, files.Checksum]) -> list[str | None]:
        """Return how each committed file differs from its checksum, or None. Several are hashed at once."""

        def compare(name: str) -> str | None:
            return files.difference(self.path / name, checksums[name])

        if len(checksums) == 1:  # the most frequent case, often hashed before: a thread would cost more than it gains
            return [compare(name) for name in checksums]
        with ThreadPoolExecutor(max_workers=4) as threads:
            return list(threads.map(compare, checksums))

    def load_tensors(self, rel: str) -> dict[str, "Tensor"]:
        """Return the tensors of a committed safetensors file, on the CPU. Raises as `verified`."""
        return files.load_tensors(self.verified(rel))

    def load_json(self, rel: str) -> Any:
        """Return the value in a committed JSON file. Raises as `verified`."""
        return json.loads(self.load_text(rel))

    def load_text(self, rel: str) -> str:
        """Return a committed text file. Raises as `verified`, and `CorruptStateError` if it is not UTF-8."""
        path = self.verified(rel)
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CorruptStateError(f"{path}: is no text", hint=START_OVER) from error

    def check_order(self, asked: str) -> None:
        """Check that the stage `asked` is the next one.

        Raises:
            StageOrderError: Another stage is next.
        """
        right = self.next_stage()
        if asked != right:
            done = f"`{self.manifest.stage}` of round {self.manifest.round} is done"
            message = f"{self.path}: {done}, so `{right}` comes next, not `{asked}`"
            raise StageOrderError(message, hint=f"recap {right} {quoted(self.path)}")

    def _make_room(self) -> None:
        """Remove the leftovers of a stopped writer. Refuse first if a committed file is not a plain file."""
        refuse_odd(self.path, self.manifest.files)
        with files.storage_errors(self.path):
            sweep(self.path, self.manifest.files)

    def _catch_up(self) -> None:
        """Read what other processes have committed since. Refuse another recipe: the caller has read the old one."""
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
