"""The schema of `state.yaml`: the type of every value, and what values must agree on. Reads and writes check all of it."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recap_cli.state.names import NEXT_STAGE, SCHEMA, below, folder_of, is_ours, recipe_name

Stage = Literal["init", "prune", "mask", "finetune", "merge"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
STRICT = ConfigDict(strict=True, extra="forbid")
OPEN = ConfigDict(strict=True, extra="allow")


class File(BaseModel):
    """Size and checksum of a file that counts."""

    model_config = STRICT

    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A finished stage; the stage adds further facts."""

    model_config = OPEN

    round: Count
    stage: Stage
    seconds: Seconds
    finished: str


class Best(BaseModel):
    """The best small model; `merge` may add further facts."""

    model_config = OPEN

    round: Count
    metric: str
    value: float
    loss: float
    folder: str


class Used(BaseModel):
    """A plugin that the state was made with."""

    model_config = STRICT

    kind: str
    name: str
    distribution: str
    version: str


class Plugins(BaseModel):
    """The plugins that the state was made with; none before `init` has noted them."""

    model_config = STRICT

    used: list[Used] = []


class Change(BaseModel):
    """A change of settings: when, after which stage, and the values before and after."""

    model_config = STRICT

    changed: str
    round: Count
    stage: Stage
    before: dict[str, Any]
    after: dict[str, Any]


class Contents(BaseModel):
    """All of state.yaml, key by key."""

    model_config = STRICT

    layout: Annotated[int, Field(alias="schema")]
    round: Count
    stage: Stage
    full: str
    small: str | None
    best: Best | None
    recipe_digest: str
    recipe: str
    versions: dict[str, str]
    plugins: Plugins
    changes: list[Change]
    history: list[Entry]
    files: dict[str, File]


def problem_of(facts: Mapping[str, Any]) -> str | None:
    """Return the first problem in the values of a `state.yaml`, in words, or None."""
    try:
        found = Contents.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).removeprefix(".")
        return f"{where} is missing or not what it should be"
    return next(_contradictions(found), None)


def _contradictions(found: Contents) -> Iterator[str]:
    """Yield where values contradict each other, each of which is well-formed by itself."""
    if found.layout != SCHEMA:
        yield f"schema {found.layout} is not the one that this version writes"
    done = [(entry.round, entry.stage) for entry in found.history]
    if not done or done != list(islice(_stages(), len(done))) or done[-1] != (found.round, found.stage):
        yield f"history does not lead to {found.stage} of round {found.round}"
    for name in found.files:
        if not is_ours(name) and name != found.recipe:
            yield f"the entry of {name!r} in files makes no sense"
    if found.recipe != recipe_name(len(found.changes)) or found.recipe not in found.files:
        yield f"recipe {found.recipe!r} is not in files, or does not go with changes"
    places = {"full": found.full, "small": found.small, "best": None if found.best is None else found.best.folder}
    least = {"full": 0, "small": 1, "best": 1}
    for key, place in places.items():
        if place is not None and not _is_current(key, place, least[key], found):
            yield f"{key} is {place!r}, which is no such folder of this state"
    if found.best is not None and found.best.folder != folder_of("best", found.best.round):
        yield f"best is of round {found.best.round}, and its folder is {found.best.folder}"


def _stages() -> Iterator[tuple[int, str]]:
    """Yield (round, stage) in order: `init`, then round after round."""
    number, stage = 0, "init"
    while True:
        yield number, stage
        stage = NEXT_STAGE[stage]
        number += stage == "prune"


def _is_current(key: str, place: str, least: int, found: Contents) -> bool:
    """Whether a folder belongs to a round of this state, and holds files that count."""
    kind = {"small": "round"}.get(key, key)
    number = place.removeprefix(f"{kind}-")
    known = number.isascii() and number.isdigit() and least <= int(number) <= found.round
    return known and place == folder_of(kind, int(number)) and bool(below(found.files, place))
