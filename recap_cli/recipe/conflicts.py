"""What must hold between the keys of a recipe, each of which is well-formed by itself (`recap_cli.recipe.schema`)."""

import json
from collections.abc import Iterator
from os.path import normpath
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli import registry
from recap_cli.core.task import Task
from recap_cli.recipe.near import did_you_mean, near
from recap_cli.tasks.calls import known, task_named
from recap_cli.untrusted.model_limits import beyond

if TYPE_CHECKING:
    from recap_cli.recipe.schema import Recipe

CONFLICTS = "recipe_conflicts"  # the type of the pydantic error whose context carries `Conflict`s
FLOAT32_MAX = 3.4e38  # rounded down
FLOAT32_MIN = 1.2e-38  # the smallest normal number, rounded up
# Settings that the paper's plain algorithm does not have, with the values that turn them off.
FAITHFUL: dict[str, Any] = {
    "head.warmup_epochs": 0,
    "prune.hold_plan": 0.0,
    "prune.ema": 0.0,
    "prune.ramp": 1.0,
    "prune.compensate": False,
    "mask.random": 0.0,
    "finetune.head_lr": None,
    "finetune.lr_schedule_span": "round",
    "distill.teacher": None,
}
# Defaults of the paper that differ from ours. A recipe may set another value.
FAITHFUL_DEFAULTS: dict[str, Any] = {"mask.scope": "per-kind", "prune.rank_by": "sum", "mask.rank_by": "sum"}
FAITHFUL_IMAGE_DEFAULTS: dict[str, Any] = {"mask.ratio": 0.875}  # for texts the paper has our default
OTHER_KEYS = {  # of `data`, that mean nothing for a task with these inputs
    "text": ("image", "image_size"),
    "words": ("text_pair", "image", "image_size"),
    "image": ("text", "text_pair"),
}
MAP_KEYS = ("label_map", "classes")  # of `data`, that mean nothing where labels are no maps
ALTERNATIVES = (("model.name", "model.config"), ("data.name", "data.builtin", "data.train"))
NEEDS = {  # key: the key that it requires
    "model.revision": "model.name",
    "data.subset": "data.name",
    "data.validation": "data.train",
    "data.text_pair": "data.text",
    "distill.library": "distill.teacher",
    "distill.revision": "distill.teacher",
}
# Fills in missing sections, so that conflicts elsewhere are reported at the same time.
STAND_IN: dict[str, dict[str, Any]] = {"model": {}, "task": {"kind": "text-classification"}, "data": {}}


class Conflict(NamedTuple):
    """Keys that are well-formed and contradict each other. The first is the one to change."""

    keys: tuple[str, ...]
    text: str


def task_of(values: Any) -> Task | None:
    """Return the task that the values of a recipe name; None if they name none that is known."""
    section = values.get("task") if isinstance(values, dict) else None
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    return task_named(kind) if isinstance(kind, str) and known(kind) else None


def _value(recipe: "Recipe", key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _shown(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def conflicts_in(recipe: "Recipe") -> Iterator[Conflict]:
    """Yield what is wrong between keys, each of which is well-formed by itself."""
    for keys in ALTERNATIVES:
        given = [key for key in keys if _value(recipe, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            yield Conflict(tuple(given) or keys, f"expected exactly one of {', '.join(keys)}; found {found}")
    for key, needed in NEEDS.items():
        if _value(recipe, key) is not None and _value(recipe, needed) is None:
            yield Conflict((key, needed), f"expected only beside {needed}; found without it")
    for key, value in FAITHFUL.items():
        if recipe.faithful and (found := _value(recipe, key)) != value:
            yield Conflict(
                (key, "faithful"), f"expected {_shown(value)} with faithful: true, as the paper has it; found {_shown(found)}"
            )
    yield from _input_conflicts(recipe)
    yield from _training_conflicts(recipe)
    if recipe.prune.ratio + recipe.prune.floor > 1 + 1e-9:  # the sum of two decimals may round up
        yield Conflict(
            ("prune.ratio", "prune.floor"),
            f"expected at most {1 - recipe.prune.floor:g}, as prune.floor keeps {recipe.prune.floor:g} of each layer; "
            f"found {recipe.prune.ratio:g}",
        )


def _input_conflicts(recipe: "Recipe") -> Iterator[Conflict]:
    data = recipe.data
    if known(recipe.task.kind):
        yield from _task_conflicts(recipe, task_named(recipe.task.kind))
    else:
        kinds = registry.names("tasks")
        meant = did_you_mean(near(recipe.task.kind, kinds))
        yield Conflict(("task.kind",), f"expected one of {', '.join(kinds)}; found {recipe.task.kind}{meant}")
    if data.builtin == "digits" and known(recipe.task.kind) and recipe.task.kind != "image-classification":
        text = f'expected "image-classification", as data.builtin is digits; found "{recipe.task.kind}"'
        yield Conflict(("task.kind", "data.builtin"), text)
    for name, place in (("train", data.train), ("validation", data.validation)):
        if place is not None and normpath(place) in ("/", "//"):  # as an unset variable before a slash gives it
            yield Conflict((f"data.{name}",), f"expected a file or a folder; found {place}, all of the file system")
    if data.validation is not None and data.validation_share is not None:
        keys = ("data.validation_share", "data.validation")
        yield Conflict(keys, "expected only without data.validation; found both")
    key = {"transformers": "model_type", "timm": "architecture"}[recipe.model.library]
    if recipe.model.config is not None and not isinstance(recipe.model.config.get(key), str):
        keys = ("model.config", "model.library")
        yield Conflict(keys, f"expected a key `{key}` in it, for library {recipe.model.library}; found none")
    yield from _config_conflicts(recipe.model.config or {})


def _task_conflicts(recipe: "Recipe", task: Task) -> Iterator[Conflict]:
    """Yield what does not fit the task: its metric, and the columns that its examples are read from."""
    kind, data = recipe.task.kind, recipe.data
    metrics = [metric.name for metric in task.all_metrics]
    if recipe.task.metric not in metrics:
        meant = did_you_mean(near(recipe.task.metric or "", metrics))
        text = f"expected one of {', '.join(metrics)}, for {kind}; found {recipe.task.metric}{meant}"
        yield Conflict(("task.metric", "task.kind"), text)
    if recipe.distill.hidden_weight > 0 and recipe.distill.teacher is None:
        text = f"expected 0 without distill.teacher; found {recipe.distill.hidden_weight:g}"
        yield Conflict(("distill.hidden_weight", "distill.teacher"), text)
    if recipe.distill.teacher is not None and task.distillation is None:
        text = f"expected null, as {kind} does not say how a student learns from a teacher; found {recipe.distill.teacher}"
        yield Conflict(("distill.teacher", "task.kind"), text)
    column = "image" if task.inputs == "image" else "text"
    has_columns = data.builtin is None and (data.train is None or column == "text")  # of images, `train` may be a folder
    if has_columns and getattr(data, column) is None:
        yield Conflict((f"data.{column}", "task.kind"), f"expected the {column} column, for {kind}; found none")
    for name in OTHER_KEYS[task.inputs]:
        if (found := getattr(data, name)) is not None:
            yield Conflict((f"data.{name}", "task.kind"), f"expected null, for {kind}; found {found}")
    yield from _image_conflicts(recipe, task)
    if not isinstance(data.label, str):
        if not task.target.several:
            text = f"expected one column, for {kind}; found {len(data.label)}: {', '.join(data.label)}"
            yield Conflict(("data.label", "task.kind"), text)
        elif len(set(data.label)) < len(data.label):
            yield Conflict(("data.label",), f"expected different columns; found {', '.join(data.label)}")
    if recipe.mask.train_embeddings == "tokens" and column == "image":
        keys = ("mask.train_embeddings", "task.kind")
        yield Conflict(keys, "expected true or false, as images have no tokens; found tokens")


def _image_conflicts(recipe: "Recipe", task: Task) -> Iterator[Conflict]:
    """Yield keys of label maps for a task that has none, and an augmentation that the task, or a teacher, cannot have."""
    kind, data = recipe.task.kind, recipe.data
    for name in () if task.target.maps else MAP_KEYS:
        if (found := getattr(data, name)) is not None:
            yield Conflict((f"data.{name}", "task.kind"), f"expected null, for {kind}; found {found}")
    usual = type(data).model_fields["ignore_index"].default
    if not task.target.maps and data.ignore_index != usual:
        yield Conflict(("data.ignore_index", "task.kind"), f"expected {usual}, for {kind}; found {data.ignore_index}")
    allowed = ["none", *(["flip"] if task.inputs == "image" else []), *(["crop"] if task.target.maps else [])]
    if data.augment not in allowed:
        text = f"expected {' or '.join(allowed)}, for {kind}; found {data.augment}"
        yield Conflict(("data.augment", "task.kind"), text)
    elif data.augment == "crop" and recipe.distill.teacher is not None:
        text = "expected none or flip, as a teacher's outputs for every crop are too many to be kept; found crop"
        yield Conflict(("data.augment", "distill.teacher"), text)


def _config_conflicts(config: dict[str, Any]) -> Iterator[Conflict]:
    """Yield values of a model's configuration that are refused, even if its library accepts them."""
    for key, found, limit in beyond(config):
        yield Conflict((f"model.config.{key}", "model.config"), f"expected at most {limit:,}; found {found:,}")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, "float32"):
            text = "expected float32, the type of the full model (finetune.weights is the type on the device)"
            yield Conflict((f"model.config.{key}", "model.config"), f"{text}; found {config[key]}")


def _training_conflicts(recipe: "Recipe") -> Iterator[Conflict]:
    finetune = recipe.finetune
    batch, micro = finetune.batch_size, finetune.micro_batch_size
    if micro is not None and batch % micro:
        keys = ("finetune.micro_batch_size", "finetune.batch_size")
        yield Conflict(keys, f"expected a divisor of finetune.batch_size ({batch}); found {micro}")
    if finetune.max_grad_norm is not None and finetune.fused_backward:
        yield Conflict(
            ("finetune.max_grad_norm", "finetune.fused_backward"),
            "expected null with finetune.fused_backward, which never holds all gradients at once; "
            f"found {finetune.max_grad_norm:g}",
        )
    if finetune.lr == "auto" and finetune.optimizer != "adamw":
        yield Conflict(("finetune.lr", "finetune.optimizer"), f"expected a number with {finetune.optimizer}; found auto")
    if recipe.distill.is_own and recipe.distill.teacher_lr == "auto" and finetune.optimizer != "adamw":
        keys = ("distill.teacher_lr", "finetune.optimizer")
        yield Conflict(keys, f"expected a number with {finetune.optimizer}; found auto")
    if finetune.epochs is None and finetune.steps is None:
        keys = ("finetune.epochs", "finetune.steps")
        yield Conflict(keys, "expected a number, or one in finetune.steps; found null in both")
    yield from _overflows(recipe)


def _overflows(recipe: "Recipe") -> Iterator[Conflict]:
    """Yield the factors of an update that float32 cannot hold. The first of AdamW is `lr / (1 - beta_1)`."""
    finetune = recipe.finetune
    update = FLOAT32_MAX * (1 - finetune.betas[0]) if finetune.optimizer == "adamw" else FLOAT32_MAX
    lr = 0.0 if finetune.lr == "auto" else finetune.lr  # a method's own is small
    teacher_lr = 0.0 if recipe.distill.teacher_lr == "auto" else recipe.distill.teacher_lr
    limits = {
        "distill.teacher_lr": (teacher_lr, update),
        "head.lr": (recipe.head.lr, FLOAT32_MAX * (1 - 0.9)),
        "finetune.lr": (lr, update),
        "finetune.head_lr": (recipe.head_lr(lr, new=True) if lr <= update else 0.0, update),
        "finetune.weight_decay": (finetune.weight_decay, FLOAT32_MAX),
        "finetune.eps": (finetune.eps, FLOAT32_MAX),
    }
    if finetune.eps < FLOAT32_MIN:
        yield Conflict(
            ("finetune.eps",), f"expected at least {FLOAT32_MIN:g}, below which it is 0 in float32; found {finetune.eps:g}"
        )
    for key, (found, limit) in limits.items():
        if found > limit:
            yield Conflict((key,), f"expected at most {limit:.2g}, beyond which float32 overflows; found {found:g}")
