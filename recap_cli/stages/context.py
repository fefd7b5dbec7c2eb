"""What the stages of one state share: its recipe, the model's description and layout, and its data, read once per process."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from recap_cli import recipe as recipes
from recap_cli import registry
from recap_cli.core.adapter import Adapter, block_paths, find_axes
from recap_cli.core.criterion import Criterion, Losses
from recap_cli.core.groups import Axis, Choice, Cut, Shape, shapes_of
from recap_cli.core.method import Turn
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import Where
from recap_cli.errors import StageOrderError
from recap_cli.manifest import quoted
from recap_cli.progress import Track
from recap_cli.recipe import Recipe
from recap_cli.runtime import models, sources, tasks
from recap_cli.runtime.data import ImageInputs, Split, TextInputs, make_split
from recap_cli.runtime.labels import check_names
from recap_cli.runtime.models import ModelSpec
from recap_cli.runtime.order import batches, sample
from recap_cli.runtime.tasks import Task
from recap_cli.stages.schedule import finished
from recap_cli.stages.turns import turns_of
from recap_cli.stages.vocabulary import Vocabulary
from recap_cli.state import State

WEIGHTS, BUFFERS, SPEC, LAYOUT, MOMENTS = (
    "model.safetensors",
    "buffers.safetensors",
    "spec.json",
    "layout.json",
    "moments.safetensors",
)
PLAN, IMPORTANCE, MASK, ROWS, SMALL, MOVED, SCORES = (
    "plan.safetensors",
    "importance.safetensors",
    "mask.safetensors",
    "rows.safetensors",
    "small.safetensors",
    "moved.safetensors",
    "scores.safetensors",
)


@dataclass(frozen=True)
class Layout:
    """The axes of the full model, the shapes of what they cut, and the names of its embeddings and of its task head."""

    axes: tuple[Axis, ...]
    shapes: dict[str, Shape]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter, model: nn.Module) -> "Layout":
        head = models.head_names(adapter, model)
        embeddings = [name for name in models.embedding_names(adapter, model) if name not in head]
        axes = tuple(find_axes(adapter, model))
        cut = {cut.param for axis in axes for cut in axis.cuts}
        shapes = {name: shape for name, shape in shapes_of(model.named_parameters()).items() if name in cut}
        return cls(axes, shapes, tuple(embeddings), tuple(head))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Layout":
        axes = (Axis(**{**axis, "cuts": tuple(Cut(**cut) for cut in axis["cuts"])}) for axis in found["axes"])
        shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
        return cls(tuple(axes), shapes, tuple(found["embeddings"]), tuple(found["head"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def along(self) -> dict[str, int]:
        """The dimension that each cut parameter is cut along."""
        return {cut.param: cut.dim for axis in self.axes for cut in axis.cuts}


class Context:
    """A state with what its files mean. Everything is read when it is first asked for."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.recipe: Recipe = recipes.parse(state.recipe_text, str(state.path / state.manifest.recipe))

    @cached_property
    def full(self) -> str:
        """The folder of the full model as it is now."""
        return str(self.state.manifest.full)

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """What each round does."""
        return turns_of(self.state.manifest, self.recipe)

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_json(self.state.load_text(f"{self.full}/{SPEC}"))

    @cached_property
    def adapter(self) -> Adapter:
        return models.adapter_of(self.spec)

    @cached_property
    def layout(self) -> Layout:
        return Layout.from_json(self.state.load_json(f"{self.full}/{LAYOUT}"))

    @cached_property
    def task(self) -> Task:
        return task_of(self.recipe, self.spec)

    def head_lr(self, turn: Turn) -> float:
        """The peak learning rate of the task head in a round.

        A state that does not say whether its head is new is older than `auto`, and goes on without.
        """
        return self.recipe.head_lr(new=self.state.manifest.made.get("head_new", False), alone=turn.moves == "head")

    def splits(self, track: Track) -> tuple[Split, Split]:
        """The training and the validation examples, ready for the model."""
        processor = models.load_processor(self.state.path / self.full, self.spec)
        return splits_of(self.recipe, self.spec, processor, track)

    def full_tensors(self) -> dict[str, Tensor]:
        """The weights and buffers of the full model, on the CPU."""
        tensors = self.state.load_tensors(f"{self.full}/{WEIGHTS}")
        if f"{self.full}/{BUFFERS}" in self.state.manifest.files:
            tensors |= self.state.load_tensors(f"{self.full}/{BUFFERS}")
        return tensors

    def model(self, tensors: dict[str, Tensor], sizes: dict[str, int] | None = None) -> nn.Module:
        """A model in evaluation mode made of `tensors` (no copies); a small one if `sizes` (axis → units) are given."""
        return models.assemble(self.spec, tensors, self.adapter, sizes or {}).eval()

    def plan(self, folder: str) -> Choice:
        """Which groups of the full model the small model in `folder` kept."""
        return {name: kept.bool() for name, kept in self.state.load_tensors(f"{folder}/{PLAN}").items()}

    def vocabulary(self, folder: str) -> Vocabulary | None:
        """Which rows of the token table the finetuning in `folder` held, and which could move; None where that is not known."""
        file = f"{folder}/{ROWS}"
        return Vocabulary.from_tensors(self.state.load_tensors(file)) if file in self.state.manifest.files else None

    def rows(self, folder: str) -> Where:
        """The rows of the token table that the finetuning in `folder` could move, where that is neither all nor none."""
        vocabulary, turn = self.vocabulary(folder), self.turns[int(folder.rpartition("-")[2]) - 1]
        return vocabulary.where(turn) if vocabulary else {}


def load_criterion(name: str) -> Criterion:
    """The criterion plugin of a name."""
    return cast(Criterion, registry.load("criteria", name))


def source_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its model, as `models.create` and `outlines.outline` take it."""
    return {
        **recipe.model.model_dump(),
        "task_kind": recipe.task.kind,
        "image_size": recipe.data.image_size,
    }


def task_of(recipe: Recipe, spec: ModelSpec) -> Task:
    """What the model is trained for."""
    return Task(recipe.task.kind, recipe.task.metric, spec.num_labels)


def forward_of(spec: ModelSpec, model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function from a batch to logits, (batch, labels)."""
    call = models.forward(spec)
    return lambda batch: call(model, batch)


def read_raw(recipe: Recipe) -> sources.Raw:
    """The examples of a recipe as its source holds them."""
    data = recipe.data
    return sources.read_splits(
        recipe.task.kind,
        seed=recipe.seed,
        **data.model_dump(exclude={"max_length", "image_size", "augment", "workers"}),
    )


def inputs_of(recipe: Recipe, spec: ModelSpec, processor: Any) -> TextInputs | ImageInputs:
    """How the examples of a recipe become the inputs of a model."""
    image = spec.image
    if image is None:
        return TextInputs(processor, recipe.data.max_length, models.positions(spec))
    return ImageInputs(
        size=(image["size"], image["size"]),
        channels=image["channels"],
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        interpolation=image["interpolation"],
        augment=recipe.data.augment,
    )


_SPLITS: dict[str, tuple[Split, Split]] = {}  # of the last recipe: the stages of a run read their data once


def _split_key(recipe: Recipe, spec: ModelSpec) -> str:
    """What examples as tensors hang on: the data, and what the model takes and how it is preprocessed."""
    sections = [section.model_dump(mode="json") for section in (recipe.data, recipe.model, recipe.task)]
    return json.dumps([*sections, recipe.seed, spec.image, spec.label_names, models.positions(spec)], sort_keys=True)


def are_read(recipe: Recipe, spec: ModelSpec) -> bool:
    """Whether this process has the examples of a recipe already, so that `splits_of` reads nothing."""
    return _split_key(recipe, spec) in _SPLITS


def splits_of(
    recipe: Recipe, spec: ModelSpec, processor: Any, track: Track, raw: sources.Raw | None = None
) -> tuple[Split, Split]:
    """The training and the validation examples of a recipe, as tensors for a model; kept for the next call with the same
    data.

    Raises `DataError` if their labels are not those of the model, in its order.
    """
    key = _split_key(recipe, spec)
    if key not in _SPLITS:
        raw = raw or read_raw(recipe)
        check_names(raw.label_names, spec.label_names, raw.train_origin)
        inputs = inputs_of(recipe, spec, processor)
        made = (
            make_split(raw.train, inputs, origin=raw.train_origin, workers=recipe.data.workers, track=track),
            make_split(raw.validation, inputs, origin=raw.validation_origin, workers=recipe.data.workers, track=track),
        )
        _SPLITS.clear()
        _SPLITS[key] = made
    return _SPLITS[key]


def on_device(model: nn.Module, axes: Sequence[Axis], device: torch.device) -> AbstractContextManager[None]:
    """Inside, a model on the CPU runs on `device`, a block at a time; on the CPU it runs as it is, and is not touched."""
    return nullcontext() if device.type == "cpu" else streamed(model, block_paths(model, axes), device)


def importance_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Examples at a time; on an accelerator so many that importance fits into the memory that finetuning takes there.

    Importance is computed in fp32, and each of its blocks holds all of its activations: half as many examples where finetuning
    has bf16 activations, and half again where it has checkpoints.
    """
    if device.type == "cpu":
        return recipe.importance.batch_size
    tune = recipe.finetune
    size = (tune.micro_batch_size or tune.batch_size) // (1 + (tune.resident != "fp32")) // (1 + tune.checkpointing)
    return min(recipe.importance.batch_size, max(1, size))


def losses_over(
    forward: Callable[[dict[str, Tensor]], Tensor],
    split: Split,
    indices: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    track: Track,
    label: str,
) -> Losses:
    """The losses over D_s, the examples at `indices`: per batch, or per example, each with its share of D_s."""

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        size = 1 if each else batch_size
        steps = -(-len(indices) // size)
        for batch in track(batches(split, indices, size, device=device), label, steps):
            labels = batch["labels"]
            yield tasks.loss(forward(batch), labels), len(labels) / len(indices)

    return losses


def draw(recipe: Recipe, split: Split, round: int, stage: str) -> Tensor:
    """D_s: the examples on which a stage of a round estimates importance."""
    size = recipe.importance.batches * recipe.importance.batch_size
    return sample(len(split), size, seed=recipe.seed, round=round, stage=stage)


def check_rounds(context: Context) -> None:
    """Raise `StageOrderError` if the last round is merged: K are done, or the metric has not improved for `patience`."""
    state, recipe = context.state, context.recipe
    if state.next_stage() != "prune":
        return
    path = quoted(state.path)
    if reason := finished(recipe, state.manifest):
        raise StageOrderError(
            f"{state.path}: {reason}",
            hint=f"recap export {path} OUT writes the best small model; recap status {path} shows the rounds",
        )


def as_bytes(choice: Choice) -> dict[str, Tensor]:
    """A choice as it is stored: booleans of one byte."""
    return {name: chosen.to(torch.uint8) for name, chosen in choice.items()}


def kept_per_layer(axes: Sequence[Axis], sizes: dict[str, int]) -> dict[str, list[int]]:
    """How many heads, and how many neurons, each layer has; by kind, in the order of the layers."""
    return {kind: [sizes[axis.name] for axis in axes if axis.kind == kind] for kind in ("heads", "neurons")}
