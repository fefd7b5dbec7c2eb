"""What `state.yaml` says: the stage that is done, what is current, and every file that counts, with its checksum."""

import errno
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from recap_cli.errors import CorruptStateError, StateError
from recap_cli.storage import Seal

SCHEMA = 2  # the newest there is; a state is of the oldest that can say what it holds, so that older versions read it
AMENDED = 2  # the schema from which on a state may have changed settings
NEXT_STAGE = {"init": "prune", "prune": "mask", "mask": "finetune", "finetune": "merge", "merge": "prune"}
STAGES = tuple(NEXT_STAGE)

COMMIT = "state.yaml"
RECIPE = "recipe.yaml"
RECIPES = re.compile(r"recipe(-\d{3,})?\.yaml")  # of which the manifest names one: `amended_name` says what the next is called
UNDER_WAY = ".recap-init"  # lies in a folder from the first moment of its `init` to the commit
OURS = re.compile(r"(full|round|best)-\d{3,}")

PREFACE = "# Written by recap, as a whole, when a stage is done. Look at it with `recap status`.\n"
START_OVER = "restore the file from a copy, or start a new state: recap init RECIPE --state NEW"
ELSEWHERE = "name a state's folder, or make a new one: recap init RECIPE --state NEW"


@dataclass(frozen=True)
class Manifest:
    """What `state.yaml` says.

    `full` and `small` are the folders (or files) that hold the current models, `best` whatever `merge` notes about the
    best small model; `files` are all files that count; `history` has one entry per finished stage, oldest first.
    `recipe` is the file of the recipe as it is now, `changes` what was changed in it since `init`, oldest first.
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
    files: dict[str, Seal] = field(default_factory=dict)
    schema: int = 1
    recipe: str = RECIPE
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made(self) -> dict[str, Any]:
        """What `init` noted when it made the state; empty if nothing did."""
        return next((entry for entry in self.history if entry["stage"] == "init"), {})


FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "round": int,
    "stage": str,
    "full": (str, type(None)),
    "small": (str, type(None)),
    "best": (dict, type(None)),
    "recipe_digest": str,
    "versions": dict,
    "plugins": dict,
    "history": list,
    "files": dict,
}
AMENDED_FIELDS: dict[str, type | tuple[type, ...]] = {"recipe": str, "changes": list}


def fields_of(schema: int) -> dict[str, type | tuple[type, ...]]:
    """The keys of a state.yaml of that schema, and what each holds; those of the newest schema stand before the long ones."""
    if schema < AMENDED:
        return FIELDS
    last = {name: FIELDS[name] for name in ("history", "files")}
    return {name: kind for name, kind in FIELDS.items() if name not in last} | AMENDED_FIELDS | last


def amended_name(manifest: Manifest) -> str:
    """What the file of the next changed recipe is called: a name that no commit has had."""
    return f"recipe-{len(manifest.changes) + 2:03d}.yaml"


def round_of(manifest: Manifest, stage: str) -> int:
    """The round that the next stage belongs to: `prune` begins a new one."""
    return manifest.round + 1 if stage == "prune" else manifest.round


def is_ours(rel: str) -> bool:
    """Whether `rel` is a plain relative place inside a folder that belongs to the state."""
    parts = PurePosixPath(rel).parts
    plain = rel == "/".join(parts) and ".." not in parts and "\\" not in rel
    return plain and len(parts) > 1 and OURS.fullmatch(parts[0]) is not None


def below(files: Mapping[str, Seal], rel: str) -> dict[str, Seal]:
    """The file `rel`, or all files in the folder `rel`."""
    return {name: seal for name, seal in files.items() if name == rel or name.startswith(f"{rel}/")}


def quoted(path: Path) -> str:
    """The path as a shell needs it, for hints."""
    return shlex.quote(str(path))


def manifest_text(manifest: Manifest) -> str:
    """The text of state.yaml; what a reader looks for first stands first."""
    facts = asdict(manifest)
    ordered = {name: facts[name] for name in fields_of(manifest.schema)}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return PREFACE + str(yaml.dump(ordered, Dumper=dumper, sort_keys=False, allow_unicode=True))


def read_manifest(root: Path) -> Manifest:
    """What state.yaml says now.

    Raises:
        StateError: there is none, it cannot be read, or it is of a newer schema.
        CorruptStateError: it makes no sense.
    """
    place = root / COMMIT
    try:
        text = place.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        free = isinstance(error, FileNotFoundError) and _may_become_one(root)
        hint = f"recap init RECIPE --state {quoted(root)}" if free else ELSEWHERE
        raise StateError(f"{root}: {_why_no_state(root)}", hint=hint) from None
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        hint = "look at the permissions of the folder" if denied else ELSEWHERE
        raise StateError(f"{place}: cannot be read: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise CorruptStateError(f"{place}: is no text", hint=START_OVER) from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise CorruptStateError(f"{place}{line}: is no YAML", hint=START_OVER) from error
    return _manifest(place, found)


def _may_become_one(root: Path) -> bool:
    """Whether `init` would take the folder: it is not there, it is empty, or an `init` was stopped in it."""
    return not root.exists() or (root / UNDER_WAY).exists() or not any(root.iterdir())


def _why_no_state(root: Path) -> str:
    if not root.exists():
        return "there is no such folder"
    if not root.is_dir():
        return "is a file, not a state folder"
    if (root / UNDER_WAY).exists():
        return "its `init` was stopped, or is still running"
    return f"is not a state: it has no {COMMIT}"


def _manifest(place: Path, found: Any) -> Manifest:
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        raise CorruptStateError(f"{place}: has no schema number", hint=START_OVER)
    if found["schema"] > SCHEMA:
        writer = found.get("versions", {}).get("recap") if isinstance(found.get("versions"), dict) else None
        by = f", written by recap {writer}," if writer else ""
        raise StateError(
            f"{place}: has schema {found['schema']}{by} and this recap knows schemas up to {SCHEMA}",
            hint="upgrade recap, or use the version that made the state",
        )
    fields = fields_of(found["schema"])
    for name, kind in fields.items():
        if name not in found or not isinstance(found[name], kind):
            raise CorruptStateError(f"{place}: {name} is missing or not what it should be", hint=START_OVER)
    if found["stage"] not in STAGES:
        raise CorruptStateError(f"{place}: there is no stage {found['stage']!r}", hint=START_OVER)
    if found["schema"] < 1 or found["round"] < 0 or (found["stage"] == "init") != (found["round"] == 0):
        raise CorruptStateError(
            f"{place}: schema {found['schema']}, round {found['round']}, stage {found['stage']} do not go together",
            hint=START_OVER,
        )
    manifest = Manifest(**{**{name: found[name] for name in fields}, "files": _seals(place, found["files"])})
    if not RECIPES.fullmatch(manifest.recipe) or not all(map(_is_change, manifest.changes)):
        raise CorruptStateError(f"{place}: recipe or changes make no sense", hint=START_OVER)
    return manifest


def _is_change(found: Any) -> bool:
    """Whether an entry of `changes` has what is said of it: when, after which stage, and the values before and after."""
    kinds = {"changed": str, "round": int, "stage": str, "before": dict, "after": dict}
    return isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())


def _seals(place: Path, files: Mapping[Any, Any]) -> dict[str, Seal]:
    seals = {}
    for rel, facts in files.items():
        ok = isinstance(rel, str) and (RECIPES.fullmatch(rel) is not None or is_ours(rel)) and isinstance(facts, dict)
        if not ok or not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str):
            raise CorruptStateError(f"{place}: the entry of {rel!r} in files makes no sense", hint=START_OVER)
        seals[rel] = Seal(facts["bytes"], facts["sha256"])
    return seals
