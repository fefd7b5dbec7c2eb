"""A transaction: what one stage writes into a state's folder, and the commit."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.errors import StateError
from recap_cli.process import interrupt
from recap_cli.state import files as storage
from recap_cli.state.files import Checksum
from recap_cli.state.journal import note, open_journal, sweep
from recap_cli.state.manifest import (
    COMMIT,
    RECIPE,
    Manifest,
    below,
    facts_of,
    is_ours,
    manifest_text,
    quoted,
    read_manifest,
    recipe_name,
    round_of,
)
from recap_cli.state.manifest_schema import problem_of

if TYPE_CHECKING:
    from torch import Tensor


class Transaction:
    """What one stage writes. The end of the `with` block commits it; nothing counts before."""

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
        self._work = open_journal(root)
        self._before = before
        self._announced: set[str] = set()
        self._dropped: set[str] = set()
        self._amended: dict[str, Any] = {}  # what a change of the recipe commits instead of a stage
        self._hashing: dict[str, tuple[storage.Fingerprint, Future[None], Future[Checksum]]] = {}
        self._under_way: list[Future[Any]] = []
        self._started = time.monotonic()

    def path(self, rel: str) -> Path:
        """Return where to write the new file `rel`, which the commit makes part of the state. Its folder is made.

        Raises:
            ValueError: `rel` is not in a full-NNN, round-NNN or best-NNN folder, or is committed already.
            StateError: A file that recap has not written is in the way.
        """
        if not is_ours(rel):
            raise ValueError(f"{rel}: not a place in a full-NNN, round-NNN or best-NNN folder")
        return self._announce(rel)

    def save_tensors(self, rel: str, tensors: Mapping[str, "Tensor"]) -> None:
        """Write a safetensors file without copying tensors. Flushing and hashing continue in the background.

        Raises:
            StorageError: The disk is full, or the file cannot be written.
        """
        storage.save_tensors(self.path(rel), tensors, by=self._work)
        self._checksum(rel)

    def save_json(self, rel: str, value: Any) -> None:
        """Write a value as indented JSON.

        Raises:
            StorageError: The disk is full, or the file cannot be written.
        """
        storage.write_text(self.path(rel), json.dumps(value, indent=2) + "\n")

    def save_text(self, rel: str, text: str) -> None:
        """Write a text file in UTF-8.

        Raises:
            StorageError: The disk is full, or the file cannot be written.
        """
        storage.write_text(self.path(rel), text)

    def drop(self, rel: str) -> None:
        """Remove a committed file, or all of a folder, from the state. The commit deletes it.

        Raises:
            ValueError: Nothing of that name is committed, or it is the recipe.
        """
        dropped = below(self._before.files, rel)
        if not dropped or self._before.recipe in dropped:
            raise ValueError(f"{rel}: no file of that name can be dropped")
        self._dropped.update(dropped)

    def set_full(self, name: str) -> None:
        """Make a folder of the state the current full model."""
        self.full = name

    def set_small(self, name: str | None) -> None:
        """Make a folder of the state the current small model; None if there is none."""
        self.small = name

    def set_best(self, best: dict[str, Any] | None) -> None:
        """Set the facts of the best small model: plain values, its folder under the key `folder`."""
        self.best = best

    def amend(self, text: str, digest: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Replace the recipe by another, under a new file name, without finishing a stage.

        Args:
            text: The new recipe as YAML.
            digest: Its digest.
            before: The old values by key.
            after: The new values by key.
        """
        name, old = recipe_name(len(self._before.changes) + 1), self._before
        storage.write_text(self._announce(name), text)
        self._dropped.add(old.recipe)
        change = {"changed": _now(), "round": old.round, "stage": old.stage, "before": dict(before), "after": dict(after)}
        self._amended = {"recipe": name, "recipe_digest": digest, "changes": [*old.changes, change]}

    def amend_plugins(self, plugins: Mapping[str, Any] | None) -> None:
        """Replace the record of plugins in a change of the recipe; None leaves it as it is."""
        if plugins is not None:
            self._amended["plugins"] = dict(plugins)

    def save_recipe(self, text: str) -> None:
        """Write the recipe of a new state."""
        storage.write_text(self._announce(RECIPE), text)

    def _announce(self, rel: str) -> Path:
        """Note a new file in the journal, make its folder, and return its path."""
        path = self._root / rel
        if rel in self._before.files:
            raise ValueError(f"{rel}: is committed; write it under a new name, and drop this one")
        if rel in self._announced:
            return path
        odd = storage.odd_place(self._root, rel)
        if odd or os.path.lexists(path):
            raise self._in_the_way(odd[0] if odd else path)
        note(self._root, [rel])
        with storage.storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._announced.add(rel)
        return path

    def _checksum(self, rel: str) -> None:
        path = self._root / rel
        seen = storage.fingerprint(path)
        self._hashing[rel] = seen, threads().submit(storage.flush, path), threads().submit(storage.checksum, path)
        self._under_way += self._hashing[rel][1:]

    def _in_the_way(self, path: Path) -> StateError:
        return StateError(
            f"{path}: is in the way of `{self.stage}`, and recap has not written it",
            hint=f"move it out of the state, and continue: recap run --state {quoted(self._root)}",
        )

    def _checksummed(self) -> dict[str, Checksum]:
        """Flush and hash the new files, several at a time, and return their checksums."""
        written = sorted(self._announced)
        for rel in written:
            if not (self._root / rel).is_file():
                raise ValueError(f"{rel}: was announced but not written")
            if rel not in self._hashing or self._hashing[rel][0] != storage.fingerprint(self._root / rel):
                self._checksum(rel)
        checksums = {}
        for rel in written:
            seen, flushing, hashing = self._hashing[rel]
            with storage.storage_errors(self._root / rel, seen[2]):
                flushing.result()
                checksums[rel] = hashing.result()
        storage.flush_folders(self._root, written)
        return checksums

    def _commit(self) -> None:
        kept = {rel: checksum for rel, checksum in self._before.files.items() if rel not in self._dropped}
        files = {**kept, **self._checksummed()}
        after = replace(self._before, files=files, **(self._amended or self._stage_done()))
        if problem := problem_of(facts_of(after)):
            raise ValueError(f"{COMMIT}: {problem}")
        note(self._root, sorted(self._dropped))
        storage.replace_text(self._root / COMMIT, manifest_text(after), self._work / COMMIT)

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
        """Wait until no thread looks at the new files any more."""
        wait([future for future in self._under_way if not future.cancel()])


@cache
def threads() -> ThreadPoolExecutor:
    """Return the threads that flush and hash files. They are kept: to start them took a tenth of a stage of a small model."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="recap-state")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # a child has none of its parent's threads


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def in_transaction(root: Path, before: Manifest, stage: str) -> Iterator[Transaction]:
    """Open a transaction and commit it at the end. Then, committed or not, remove what `state.yaml` does not name."""
    interrupt.note_done(None)
    transaction = Transaction(root, before, stage)
    spared = set(before.files)  # if the commit fails late, either manifest may be on the disk: keep the files of both
    try:
        with storage.refused_writes(root):
            yield transaction
            transaction._commit()
        if not transaction._amended:
            interrupt.note_done(
                f"`{stage}` of round {transaction.round} is done: `recap status {quoted(root)}` shows what comes next"
            )
        spared = set()
    finally:
        transaction._close()
        with suppress(OSError, StateError):  # the next writer tries again; this must not hide an error on its way out
            committed = read_manifest(root).files if (root / COMMIT).exists() else {}
            sweep(root, committed, spared)
