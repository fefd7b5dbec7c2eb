"""The folder on disk: which stage is done, which files count, and one commit point.

`state.yaml` names every file that counts, with its size and checksum. A stage writes new files under new names, flushes
them, and then replaces `state.yaml`; so whoever is killed, at any moment, leaves the state before the stage or the one
after it. Whatever else lies in `full-NNN`, `round-NNN` and `best-NNN`, or is called
`recipe-NNN.yaml`, is a leftover, and the next writer removes it.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli import storage
from recap_cli.draft import Draft, drafting
from recap_cli.errors import CorruptStateError, StageOrderError, StateError
from recap_cli.folder import claim, locked, plain, refuse_running, refuse_state, sweep, withdraw
from recap_cli.manifest import (
    COMMIT,
    NEXT_STAGE,
    RECIPE,
    SCHEMA,
    STAGES,
    START_OVER,
    Manifest,
    below,
    quoted,
    read_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCHEMA", "STAGES", "Draft", "Manifest", "State"]


class State:
    """A state folder: open it, ask what comes next, read what was committed, write the next stage."""

    def __init__(self, path: Path, manifest: Manifest, recipe_text: str) -> None:
        self.path = path
        self.manifest = manifest
        self.recipe_text = recipe_text

    @staticmethod
    @contextmanager
    def create(path: str | Path, recipe_text: str, digest: str) -> Iterator[Draft]:
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
                with storage.storage_errors(root):
                    sweep(root, keep=())
                with drafting(root, Manifest(0, "init", digest), "init") as draft:
                    storage.write_text(root / RECIPE, recipe_text)
                    draft.include(RECIPE)
                    yield draft
                with suppress(OSError):  # committed; the next start flushes the same folder
                    storage.flush(root.absolute().parent)
            finally:
                if not (root / COMMIT).exists():
                    withdraw(root, made)

    @classmethod
    def open(cls, path: str | Path) -> "State":
        """The state in a folder, its recipe checked.

        Raises:
            StateError: there is no state, or one of a newer schema.
            StateLockedError: another process is making it.
            CorruptStateError: state.yaml makes no sense, or the recipe was edited.
        """
        root = plain(path)
        try:
            state = cls(root, read_manifest(root), "")
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
    def writing(self, stage: str) -> Iterator[Draft]:
        """The draft of a stage: the end of the `with` block commits it; an error or Ctrl-C leaves the state as it was.

        Raises:
            StageOrderError: another stage is next.
            StateLockedError: another process is writing this state.
            StorageError: the disk is full, or the folder cannot be written.
        """
        with locked(self.path, stage):
            self._catch_up()
            self.check_order(stage)
            with storage.storage_errors(self.path):
                sweep(self.path, self.manifest.files)
            with drafting(self.path, self.manifest, stage) as draft:
                yield draft
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
            with storage.storage_errors(self.path):
                sweep(self.path, self.manifest.files)
            with drafting(self.path, self.manifest, self.manifest.stage) as draft:
                draft.amend(recipe_text, digest, before, after)
            self.manifest = read_manifest(self.path)
            self.recipe_text = recipe_text

    def verified(self, rel: str) -> Path:
        """The path of a committed file, or folder, after a look at size and checksum, once per process and file.

        Raises:
            StateError: the state has no such file, or another process has just moved it on.
            CorruptStateError: the file is missing, truncated or altered.
        """
        seals = below(self.manifest.files, rel)
        if not seals:
            hint = f"recap status {quoted(self.path)}"
            raise StateError(f"{self.path}: {rel} is not part of this state", hint=hint)
        with ThreadPoolExecutor(max_workers=4) as threads:
            found = threads.map(lambda name: storage.difference(self.path / name, seals[name]), seals)
            differences = {name: what for name, what in zip(seals, found, strict=True) if what}
        if differences:
            self._refuse_stale()
            told = "; ".join(f"{self.path / name}: {what}" for name, what in differences.items())
            raise CorruptStateError(told, hint=START_OVER)
        return self.path / rel

    def load_tensors(self, rel: str, device: str = "cpu") -> dict[str, "Tensor"]:
        """The tensors of a committed safetensors file. Raises as `verified`."""
        return storage.load_tensors(self.verified(rel), device)

    def load_metadata(self, rel: str) -> dict[str, str]:
        """The text beside the tensors of a committed safetensors file. Raises as `verified`."""
        return storage.load_metadata(self.verified(rel))

    def load_json(self, rel: str) -> Any:
        """The value in a committed JSON file. Raises as `verified`."""
        return json.loads(self.load_text(rel))

    def load_text(self, rel: str) -> str:
        """A committed text file. Raises as `verified`."""
        return self.verified(rel).read_bytes().decode()

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
