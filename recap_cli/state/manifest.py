"""The manifest, `state.yaml`: the stage that is done, the current models, and every file that counts, with its checksum.

The last line is a checksum of the lines above it. A truncated or altered file is refused before it is parsed.
"""

import errno
import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recap_cli.errors import CorruptStateError, StateError
from recap_cli.state import files as storage
from recap_cli.state.files import Checksum
from recap_cli.state.names import (
    COMMIT,
    NEXT_STAGE,
    OURS,
    RECIPE,
    RECIPES,
    SCHEMA,
    STAGES,
    UNDER_WAY,
    below,
    is_ours,
    recipe_name,
)

__all__ = [
    "COMMIT",
    "NEXT_STAGE",
    "OURS",
    "RECIPE",
    "RECIPES",
    "SCHEMA",
    "STAGES",
    "UNDER_WAY",
    "Manifest",
    "below",
    "is_ours",
    "manifest_text",
    "quoted",
    "read_manifest",
    "recipe_name",
    "round_of",
]

PREFACE = "# Written by recap, as a whole, when a stage is done. Look at it with `recap status`.\n"
CHECKSUMMED = "# sha256 of all lines above: "
CHECKSUM_LINE = re.compile(rb"# sha256 of all lines above: ([0-9a-f]{64})\n\Z")
CHECKSUM_BYTES = len(CHECKSUMMED) + 65

START_OVER = "restore the file from a copy, or start a new state: recap init RECIPE --state NEW"
LOOK_AT_PERMISSIONS = "check the permissions of the folder and its files; the state is as it was"
ELSEWHERE = "name a state's folder, or make a new one: recap init RECIPE --state NEW"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Manifest:
    """What `state.yaml` holds.

    Attributes:
        round: The round of the last finished stage.
        stage: The last finished stage.
        recipe_digest: The digest of the recipe.
        full: The folder of the current full model.
        small: The folder of the current small model.
        best: The facts of the best small model, as `merge` notes them.
        versions: Versions of recap, Python and the libraries.
        plugins: The plugins that the state was made with.
        history: The facts of each finished stage, oldest first.
        files: All files that count.
        schema: The schema of `state.yaml`.
        recipe: The file of the current recipe.
        changes: The changes of the recipe since `init`, oldest first.
    """

    round: int
    stage: str
    recipe_digest: str
    full: str | None = None
    small: str | None = None
    best: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, Checksum] = field(default_factory=dict)
    schema: int = SCHEMA
    recipe: str = RECIPE
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made(self) -> dict[str, Any]:
        """The facts of `init`; empty before it is done."""
        return next((entry for entry in self.history if entry["stage"] == "init"), {})


# In the order of the file: for readers, the short and important keys stand first.
FIELDS = (
    *("schema", "round", "stage", "full", "small", "best", "recipe_digest", "recipe"),
    *("versions", "plugins", "changes", "history", "files"),
)


def round_of(manifest: Manifest, stage: str) -> int:
    """Return the round of the next stage: `prune` begins a new one."""
    return manifest.round + 1 if stage == "prune" else manifest.round


def quoted(path: Path) -> str:
    """Return the path as a shell needs it, for hints."""
    return shlex.quote(str(path))


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as plain values, in the order of `state.yaml`."""
    return {name: _copied(getattr(manifest, name), None) for name in FIELDS}


def _copied(value: Any, seen: dict[int, Any] | None) -> Any:
    """Return a copy of plain values. `seen` keeps those that are held twice, as YAML's aliases are, one.

    `copy.deepcopy` and `dataclasses.asdict` do the same, and took a tenth of the time of a stage on a small model.
    """
    if isinstance(value, Checksum):
        return {"bytes": value.bytes, "sha256": value.sha256}
    if not isinstance(value, (dict, list)):
        return value
    if seen is not None and id(value) in seen:
        return seen[id(value)]
    copied: Any = {} if isinstance(value, dict) else []
    if seen is not None:
        seen[id(value)] = copied
    if isinstance(value, dict):
        copied.update((key, _copied(held, seen)) for key, held in value.items())
    else:
        copied.extend(_copied(held, seen) for held in value)
    return copied


def manifest_text(manifest: Manifest) -> str:
    """Return the text of `state.yaml`, its checksum last."""
    return checksummed(PREFACE + str(yaml.dump(facts_of(manifest), Dumper=DUMPER, sort_keys=False, allow_unicode=True)))


def checksummed(body: str) -> str:
    """Return a text with its checksum as the last line."""
    return f"{body}{CHECKSUMMED}{hashlib.sha256(body.encode()).hexdigest()}\n"


def read_manifest(root: Path) -> Manifest:
    """Read `state.yaml` as it is now.

    Raises:
        StateError: There is none, it cannot be read, or its schema is another one.
        CorruptStateError: It is not as it was written, or its values contradict each other.
    """
    place = root / COMMIT
    try:
        if odd := storage.oddity(place):
            raise CorruptStateError(f"{place}: is {odd}, not a plain file", hint=START_OVER)
        body = _body(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        free = isinstance(error, FileNotFoundError) and _may_become_one(root)
        hint = f"recap init RECIPE --state {quoted(root)}" if free else ELSEWHERE
        raise StateError(f"{root}: {_why_no_state(root)}", hint=hint) from None
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        hint = LOOK_AT_PERMISSIONS if denied else ELSEWHERE
        raise StateError(f"{place}: cannot be read: {error.strerror}", hint=hint) from error
    return _manifest(place, _copied(_parsed(place, body), {}))


def _body(place: Path) -> bytes:
    """Return the lines above the checksum. A file without a checksum is not read, whatever its size.

    Raises:
        OSError: The file cannot be read.
        CorruptStateError: There is no checksum, or it is not that of the lines above it.
    """
    with place.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - CHECKSUM_BYTES))
        checksum = CHECKSUM_LINE.search(file.read(CHECKSUM_BYTES))
        if checksum is None:
            raise _altered(place, "its last line, a checksum of all others, is missing: it was cut off or edited")
        file.seek(0)
        body = file.read(max(0, size - CHECKSUM_BYTES))
    if hashlib.sha256(body).hexdigest() != checksum.group(1).decode():
        raise _altered(place, "it is not as recap wrote it: its last line is a checksum of other lines")
    return body


def _altered(place: Path, what: str) -> CorruptStateError:
    return CorruptStateError(f"{place}: {what}", hint=START_OVER)


def _other_schema(place: Path, schema: object, by: str) -> StateError:
    return StateError(
        f"{place}: has schema {schema}{by} and this recap reads only schema {SCHEMA}",
        hint="use the version of recap that made the state, or start a new one: recap init RECIPE --state NEW",
    )


def _may_become_one(root: Path) -> bool:
    """Whether `init` accepts the folder: it does not exist, it is empty, or an `init` was stopped in it."""
    return not root.exists() or (root / UNDER_WAY).exists() or not any(root.iterdir())


def _why_no_state(root: Path) -> str:
    if not root.exists():
        return "there is no such folder"
    if not root.is_dir():
        return "is a file, not a state folder"
    if (root / UNDER_WAY).exists():
        return "its `init` was stopped, or is still running"
    return f"is not a state: it has no {COMMIT}"


@lru_cache(maxsize=2)
def _parsed(place: Path, body: bytes) -> Any:
    """Return the parsed text, which callers must not change. Cached: a stage reads `state.yaml` three times."""
    try:
        loader = LOADER(body.decode())
        try:
            node = loader.get_single_node()
            if key := _doubled(node):
                raise _altered(place, f"{key} stands in it twice")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise CorruptStateError(f"{place}: is no text", hint=START_OVER) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)  # PyYAML's constructors raise other types too
        line = f", line {where.line + 1}" if where else ""
        raise CorruptStateError(f"{place}{line}: is no YAML", hint=START_OVER) from error


def _doubled(node: yaml.Node | None) -> str | None:
    """Return a key that a mapping has twice, or None. YAML would silently keep the last one."""
    pending, seen = [node], set[int]()
    while pending:
        now = pending.pop()
        if id(now) in seen:  # an alias
            continue
        seen.add(id(now))
        if isinstance(now, yaml.MappingNode):
            keys = [str(key.value) for key, _ in now.value if isinstance(key, yaml.ScalarNode)]
            if len(keys) != len(set(keys)):
                return next(key for key in keys if keys.count(key) > 1)
            pending.extend(value for _, value in now.value)
        elif isinstance(now, yaml.SequenceNode):
            pending.extend(now.value)
    return None


def _manifest(place: Path, found: Any) -> Manifest:
    from recap_cli.state.manifest_schema import problem_of

    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        raise CorruptStateError(f"{place}: has no schema number", hint=START_OVER)
    if found["schema"] != SCHEMA:
        writer = found.get("versions", {}).get("recap") if isinstance(found.get("versions"), dict) else None
        raise _other_schema(place, found["schema"], f", written by recap {writer}," if writer else "")
    if problem := problem_of(found):
        raise CorruptStateError(f"{place}: {problem}", hint=START_OVER)
    return Manifest(**{**found, "files": _checksums(found["files"])})


def _checksums(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Checksum]:
    return {rel: Checksum(facts["bytes"], facts["sha256"]) for rel, facts in files.items()}
