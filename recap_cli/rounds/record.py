"""What each finished stage has noted in `state.yaml`, and which files it has written: checked as a whole.

`state.yaml` by itself (`manifest_schema`) knows stages and folders; here it is known what is in them. Reads the recipe alone.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from recap_cli.core.method import Embeddings, Plan, Trains
from recap_cli.core.task import LOSS
from recap_cli.errors import CorruptStateError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.state.manifest import COMMIT, START_OVER, Manifest
from recap_cli.state.names import folder_of
from recap_cli.state.store import State

WEIGHTS, BUFFERS, SPEC, LAYOUT, MOMENTS = (
    "model.safetensors",
    "buffers.safetensors",
    "spec.json",
    "layout.json",
    "moments.safetensors",
)
PLAN, IMPORTANCE, COMPENSATION, MASK, ROWS, SMALL, TRAINED, SCORES = (
    "plan.safetensors",
    "importance.safetensors",
    "compensation.safetensors",
    "mask.safetensors",
    "rows.safetensors",
    "small.safetensors",
    "trained.safetensors",
    "scores.safetensors",
)
METRICS, MEMORY, LOOKS = "metrics.json", "memory.json", "steps.jsonl"
TEACHER_FOLDER, TARGETS, STATES = "teacher-000", "targets.safetensors", "states.safetensors"

FULL_FILES = (WEIGHTS, SPEC, LAYOUT)
BEST_FILES = (WEIGHTS, PLAN)
STAGE_FILES = {"prune": (PLAN,), "mask": (MASK,), "finetune": (METRICS, MEMORY)}  # in the folder of the round, from then on
UNTIL_MERGED = {"prune": (SMALL,), "finetune": (TRAINED, MOMENTS)}

OPEN = ConfigDict(strict=True, extra="allow")
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]


class RoundPlanFacts(BaseModel):
    """A planned round, as `RoundPlan.to_json` has it, with nothing that a later version may mean by other keys."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prune_ratio: Annotated[float, Field(ge=0, lt=1)]
    mask_ratio: Annotated[float, Field(ge=0, lt=1)]
    plan: Plan
    trains: Trains
    share: Annotated[float, Field(gt=0)]
    lr_window: Annotated[list[float], Field(min_length=2, max_length=2)]
    embeddings: Embeddings
    batch_parts: Annotated[int, Field(ge=1)] = 1
    product: bool


class Setting(BaseModel):
    """A setting that was found for a memory budget."""

    model_config = OPEN

    key: str
    before: Any
    after: Any


class Budget(BaseModel):
    """What a memory budget made of the recipe."""

    model_config = OPEN

    memory_budget: Any
    changes: list[Setting]


Figures = dict[str, float]  # the loss and all metrics of an evaluation


class TeacherFacts(BaseModel):
    """What is noted of a teacher; `examples` is the fingerprint of those that it has seen."""

    model_config = OPEN

    name: str
    parameters: Size
    examples: str
    figures: Figures


class InitFacts(BaseModel):
    """What `init` notes; `warmed_up` where a head was warmed up."""

    model_config = OPEN

    round_plans: Annotated[list[RoundPlanFacts], Field(min_length=1)]
    adapter: str
    notes: list[str]
    not_pruned: list[str]
    whole_trained: list[str]
    whole_frozen: list[str]
    parameters: Size
    prunable_parameters: Size
    train_examples: Size
    labels: Size
    head_new: bool
    label_places: bool
    label_words: bool
    threads: Size | None
    metric: str
    chance: Figures | None
    warmed_up: Figures | None = None
    teacher: TeacherFacts | None = None
    budget: Budget | None = None


Kinds = Annotated[dict[str, list[Count]], Field(min_length=1)]  # how many groups there are in each layer, by kind


class Compensated(BaseModel):
    """How much of what a cut took its compensation gives back."""

    model_config = OPEN

    given_back_share: float
    left_shares: dict[str, float]
    ridges: dict[str, float | None]


class PruneFacts(BaseModel):
    """What `prune` notes; `compensated` with `prune.compensate`, null where the plan cuts no inputs."""

    model_config = OPEN

    params_full: Size
    params_small: Size
    prunable_full: Size
    prunable_small: Count
    kept_share_of_prunable: float
    kept: Kinds
    of: Kinds
    compensated: Compensated | None = None


class MaskFacts(BaseModel):
    """What `mask` notes."""

    model_config = OPEN

    trains: Trains
    trainable_share_of_prunable: float | None = None


class Held(BaseModel):
    """Bytes by kind."""

    model_config = OPEN

    weights_bytes: Count
    gradients_bytes: Count
    optimizer_bytes: Count


class FinetuneFacts(Held):
    """What `finetune` notes."""

    metric: str
    loss: float
    steps: Count
    trainable: Count
    step_seconds: float
    full_finetuning: Held


class MergeFacts(BaseModel):
    """What `merge` notes; `teacher` after the round that has made one."""

    model_config = OPEN

    trained: Count
    best_round: Size | None
    teacher: TeacherFacts | None = None


FACTS: Mapping[str, type[BaseModel]] = {
    "init": InitFacts,
    "prune": PruneFacts,
    "mask": MaskFacts,
    "finetune": FinetuneFacts,
    "merge": MergeFacts,
}
NUMBER = TypeAdapter(float, config=ConfigDict(strict=True))
_PASSED: list[tuple[Manifest, str]] = []  # the last record that was sound, with its recipe: a stage checks it twice


def teacher_of(manifest: Manifest) -> dict[str, Any] | None:
    """What was noted of the teacher: by `init`, or by the `merge` of the round that has made it; None before, without one."""
    return next((entry["teacher"] for entry in manifest.history if entry.get("teacher")), None)


def check(state: State) -> None:
    """Passes where the record of a state is one that the stages have written.

    Raises:
        CorruptStateError: a stage's facts, or a file that it must have written, are missing or not what they should be.
    """
    if (state.manifest, state.recipe_text) in _PASSED:
        return
    recipe = recipes.parse(state.recipe_text, str(state.path / state.manifest.recipe))
    if problem := next(_problems(state.manifest, recipe), None):
        raise CorruptStateError(f"{state.path / COMMIT}: {problem}", hint=START_OVER)
    _PASSED[:] = [(state.manifest, state.recipe_text)]


def _problems(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    metric = recipe.metric.name
    for number, entry in enumerate(manifest.history):
        if wrong := _wrong_facts(entry, recipe, metric):
            yield f"history[{number}].{wrong} is missing or not what it should be"
    if (manifest.made.get("teacher") is None) != (recipe.distill.teacher is None or recipe.distill.is_own):
        yield "history[0].teacher is not that of the recipe"
    own = [number for number, plan in enumerate(manifest.history[0]["round_plans"], 1) if plan["trains"] == "teacher"]
    if own != [1] * recipe.distill.is_own:
        yield "history[0].round_plans are not those of the recipe's teacher"
    for number, entry in enumerate(manifest.history):  # of the teacher's round `merge` asks on which examples it was trained
        if entry["stage"] == "finetune" and entry["round"] in own and not isinstance(entry.get("examples"), str):
            yield f"history[{number}].examples is missing or not what it should be"
    merges = [entry for entry in manifest.history if entry["stage"] == "merge"]
    if [entry["round"] for entry in merges if entry.get("teacher")] != own[: len(merges)]:
        yield "the teacher that `merge` has noted is not that of the recipe"
    if manifest.round > len(manifest.history[0]["round_plans"]):
        yield f"round {manifest.round} is more than were planned"
    merged = manifest.round if manifest.stage in ("init", "merge") else manifest.round - 1
    current = {"full": folder_of("full", merged), "small": folder_of("round", manifest.round) if manifest.round else None}
    for key, place in current.items():
        if (found := getattr(manifest, key)) != place:
            yield f"{key} is {found!r}, and after {manifest.stage} of round {manifest.round} it is {place!r}"
    needed = set(_needed(manifest, recipe))
    for file in sorted(needed - manifest.files.keys()):
        yield f"{file} is not in files"
    change = f"{current['small']}/{COMPENSATION}"
    if change in manifest.files.keys() - needed:
        yield f"{change} is in files, and `prune` of round {manifest.round} has noted no change"


def _wrong_facts(entry: Mapping[str, Any], recipe: Recipe, metric: str) -> str | None:
    """The place of the first fact of a stage that is not what it should be, or None."""
    try:
        FACTS[entry["stage"]].model_validate(entry)
        if entry["stage"] == "finetune":
            NUMBER.validate_python(entry.get(entry["metric"]))
        if entry.get("metric", metric) != metric:
            return "metric"
        if entry["stage"] == "prune" and not _are_counts_of(entry["kept"], entry["of"]):
            return "of"
        if ("compensated" in entry) != (entry["stage"] == "prune" and recipe.prune.compensate is not False):
            return "compensated"
        for name, figures in _figures(entry):
            if lacking := [of for of in (LOSS.name, metric) if figures is not None and of not in figures]:
                return f"{name}.{lacking[0]}"
    except ValidationError as error:
        where = error.errors(include_url=False)[0]["loc"] or (entry.get("metric"),)
        return ".".join(map(str, where))
    return None


def _are_counts_of(kept: Mapping[str, list[int]], there: Mapping[str, list[int]]) -> bool:
    """Whether what is kept, by kind and layer, is of what was there."""
    return kept.keys() == there.keys() and all(
        len(layers) == len(there[kind]) and all(few <= many for few, many in zip(layers, there[kind], strict=True))
        for kind, layers in kept.items()
    )


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float] | None]]:
    """The figures of other models than the small ones, by their place."""
    if entry["stage"] == "init":
        yield from ((name, entry.get(name)) for name in ("chance", "warmed_up"))
    if entry["stage"] in ("init", "merge"):
        yield "teacher.figures", (entry.get("teacher") or {}).get("figures")


def _needed(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """The files that the finished stages must have left."""
    if teacher_of(manifest) is not None and manifest.stage != "merge":  # the last merge drops them
        yield f"{TEACHER_FOLDER}/{TARGETS}"
        if recipe.distill.hidden_weight:
            yield f"{TEACHER_FOLDER}/{STATES}"
    yield from (f"{manifest.full}/{name}" for name in FULL_FILES)
    if manifest.best is not None:
        yield from (f"{manifest.best['folder']}/{name}" for name in BEST_FILES)
    for entry in manifest.history:
        number, stage = entry["round"], entry["stage"]
        folder = folder_of("round", number)
        yield from (f"{folder}/{name}" for name in STAGE_FILES.get(stage, ()))
        if stage == "prune" and number == manifest.round and entry.get("compensated") is not None:
            yield f"{folder}/{COMPENSATION}"
        if number == manifest.round and manifest.stage != "merge":
            yield from (f"{folder}/{name}" for name in UNTIL_MERGED.get(stage, ()))
