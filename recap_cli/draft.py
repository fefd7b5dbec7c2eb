"""What one stage writes into a state's folder, and the commit that makes it count."""

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
from recap_cli.errors import StateError
from recap_cli.folder import sweep
from recap_cli.manifest import (
    AMENDED,
    COMMIT,
    Manifest,
    amended_name,
    below,
    is_ours,
    manifest_text,
    read_manifest,
    round_of,
)
from recap_cli.storage import Seal

if TYPE_CHECKING:
    from torch import Tensor


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

    def amend(self, text: str, digest: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
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

    def include(self, rel: str) -> None:
        """Makes a file beside the folders, written already, part of the state."""
        self._announced.add(rel)

    def _close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def drafting(root: Path, before: Manifest, stage: str) -> Iterator[Draft]:
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
