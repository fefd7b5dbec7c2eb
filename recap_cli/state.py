"""The folder on disk: which stage is done, which files count, and one commit point.

`state.yaml` names every file that counts, with its size and checksum. A stage writes new files under new names, flushes
them, and then replaces `state.yaml`; so whoever is killed, at any moment, leaves the state before the stage or the one
after it. Whatever else lies in `full-NNN`, `round-NNN` and `best-NNN`, or is called
`recipe-NNN.yaml`, is a leftover, and the next writer removes it.
"""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli import storage
from recap_cli.errors import CorruptStateError, StageOrderError, StateError
from recap_cli.folder import claim, locked, plain, refuse_running, refuse_state, sweep, withdraw
from recap_cli.manifest import (
    AMENDED,
    COMMIT,
    NEXT_STAGE,
    RECIPE,
    SCHEMA,
    STAGES,
    START_OVER,
    Manifest,
    amended_name,
    below,
    is_ours,
    manifest_text,
    quoted,
    read_manifest,
    round_of,
)
from recap_cli.storage import Seal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCHEMA", "STAGES", "Draft", "Manifest", "State"]


class Draft:
    """What one stage writes. Nothing of it counts before the commit, which the end of the `with` block is."""

    def __init__(self, root: Path, before: Manifest, stage: str) -> None:
        self.stage = stage
        self.round = round_of(before, stage)
        self.facts: dict[str, Any] = {}  # plain values; they become this stage's entry in the history
        self.full = before.full
        self.small = before.small
        self.best = before.best
        self.versions = dict(before.versions)
        self.plugins = dict(before.plugins)
        self._root = root
        self._before = before
        self._announced: set[str] = set()
        self._dropped: set[str] = set()
        self._amended: dict[str, Any] = {}  # what a change of the recipe commits, in place of a stage's facts
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="recap-state")
        self._sealing: dict[str, tuple[storage.Fingerprint, Future[None], Future[Seal]]] = {}
        self._started = time.monotonic()

    def path(self, rel: str) -> Path:
        """Where to write the new file `rel`; its folder is there, and the file will be part of the state.

        Raises:
            ValueError: `rel` is no file in a full-NNN, round-NNN or best-NNN folder, or is committed already.
        """
        return self._announce(rel, rel)

    def folder(self, rel: str) -> Path:
        """A new folder, all files of which will be part of the state: for code that names its files itself.

        Raises:
            ValueError: `rel` is not ours, or holds committed files.
        """
        if below(self._before.files, rel):
            raise ValueError(f"{rel}: holds committed files; write into a new folder, and drop this one")
        return self._announce(f"{rel}/any", rel).parent

    def save_tensors(self, rel: str, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file; flushing and hashing go on in the background. Tensors are not copied.

        Raises:
            StorageError: the disk is full or refuses.
        """
        storage.save_tensors(self.path(rel), tensors, metadata)
        self._seal(rel)

    def save_json(self, rel: str, value: Any) -> None:
        """Writes a value as indented JSON.

        Raises:
            StorageError: the disk is full or refuses.
        """
        storage.write_text(self.path(rel), json.dumps(value, indent=2) + "\n")

    def save_text(self, rel: str, text: str) -> None:
        """Writes a text file in UTF-8.

        Raises:
            StorageError: the disk is full or refuses.
        """
        storage.write_text(self.path(rel), text)

    def drop(self, rel: str) -> None:
        """From the commit on, a committed file, or all of a folder, is no longer part of the state and is deleted.

        Raises:
            ValueError: nothing of that name is committed.
        """
        dropped = below(self._before.files, rel)
        if not dropped or self._before.recipe in dropped:
            raise ValueError(f"{rel}: no file of that name can be dropped")
        self._dropped.update(dropped)

    def set_full(self, name: str) -> None:
        """Makes a file or folder of the state the current full model."""
        self.full = name

    def set_small(self, name: str | None) -> None:
        """Makes a file or folder of the state the current small model; None where there is none."""
        self.small = name

    def set_best(self, best: dict[str, Any] | None) -> None:
        """Notes what is known of the best small model; plain values, its place under the key `folder`."""
        self.best = best

    def _amend(self, text: str, digest: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Puts another recipe, under a name of its own, in the place of the one there is; no stage is done by that."""
        name, old = amended_name(self._before), self._before
        storage.write_text(self._root / name, text)
        self._announced.add(name)
        self._dropped.add(old.recipe)
        change = {"changed": _now(), "round": old.round, "stage": old.stage, "before": dict(before), "after": dict(after)}
        self._amended = {"schema": AMENDED, "recipe": name, "recipe_digest": digest, "changes": [*old.changes, change]}

    def _announce(self, rel: str, announced: str) -> Path:
        if not is_ours(rel):
            raise ValueError(f"{rel}: not a place in a full-NNN, round-NNN or best-NNN folder")
        if rel in self._before.files:
            raise ValueError(f"{rel}: is committed; write it under a new name, and drop this one")
        path = self._root / rel
        with storage.storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._announced.add(announced)
        return path

    def _seal(self, rel: str) -> None:
        path = self._root / rel
        seen = storage.fingerprint(path)
        self._sealing[rel] = seen, self._threads.submit(storage.flush, path), self._threads.submit(storage.seal, path)

    def _written(self) -> list[str]:
        """The new files, those in announced folders included."""
        written: set[str] = set()
        for announced in self._announced:
            path = self._root / announced
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            if not files:
                raise ValueError(f"{announced}: was announced but not written")
            written.update(file.relative_to(self._root).as_posix() for file in files)
        return sorted(written - self._before.files.keys())

    def _sealed(self) -> dict[str, Seal]:
        """The new files, flushed and hashed, several at a time."""
        written = self._written()
        for rel in written:
            if rel not in self._sealing or self._sealing[rel][0] != storage.fingerprint(self._root / rel):
                self._seal(rel)
        seals = {}
        for rel in written:
            seen, flushing, sealing = self._sealing[rel]
            with storage.storage_errors(self._root / rel, seen[2]):
                flushing.result()
                seals[rel] = sealing.result()
        storage.flush_folders(self._root, written)
        return seals

    def _commit(self) -> None:
        kept = {rel: seal for rel, seal in self._before.files.items() if rel not in self._dropped}
        files = {**kept, **self._sealed()}
        for name in (self.full, self.small, (self.best or {}).get("folder")):
            if name is not None and not below(files, name):
                raise ValueError(f"{name}: is to be current, but no file of it is part of the state")
        after = replace(self._before, files=files, **(self._amended or self._stage_done()))
        storage.replace_text(self._root / COMMIT, manifest_text(after))

    def _stage_done(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "stage": self.stage,
            "full": self.full,
            "small": self.small,
            "best": self.best,
            "versions": self.versions,
            "plugins": self.plugins,
            "history": [*self._before.history, self._entry()],
        }

    def _entry(self) -> dict[str, Any]:
        entry = {
            "round": self.round,
            "stage": self.stage,
            "seconds": round(time.monotonic() - self._started, 3),
            "finished": _now(),
        }
        if clash := entry.keys() & self.facts.keys():
            raise ValueError(f"facts may not be named {', '.join(sorted(clash))}")
        return {**entry, **self.facts}

    def _close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


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
                with _drafting(root, Manifest(0, "init", digest), "init") as draft:
                    storage.write_text(root / RECIPE, recipe_text)
                    draft._announced.add(RECIPE)
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
            with _drafting(self.path, self.manifest, stage) as draft:
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
            with _drafting(self.path, self.manifest, self.manifest.stage) as draft:
                draft._amend(recipe_text, digest, before, after)
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _drafting(root: Path, before: Manifest, stage: str) -> Iterator[Draft]:
    """A draft that is committed at the end; afterwards, done or not, removes what the commit on disk does not name."""
    draft = Draft(root, before, stage)
    keep = set(before.files)  # also where the commit went wrong so late that nobody can say if it will last
    try:
        with storage.refused_writes(root):
            yield draft
            draft._commit()
        keep = set()
    finally:
        draft._close()
        with suppress(OSError, StateError):  # the next writer tries again; an error under way must not be hidden
            committed = read_manifest(root).files if (root / COMMIT).exists() else {}
            sweep(root, keep | committed.keys())
