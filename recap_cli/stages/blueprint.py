"""A model without weights, as a recipe or a state describes it: what a prediction of its memory begins from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from recap_cli.core.adapter import Adapter
from recap_cli.core.groups import Choice
from recap_cli.core.method import Turn
from recap_cli.errors import ConformanceError, DataError
from recap_cli.recipe import Recipe
from recap_cli.runtime import models, outlines
from recap_cli.runtime.models import ModelSpec
from recap_cli.stages import context as shared
from recap_cli.stages.context import Context, Layout


@dataclass(frozen=True)
class Outline:
    """A model without weights: its spec, adapter and layout, the tensors' shapes (on the meta device).

    `plan` and `mask` are those of a state's newest round, or None where they are not chosen yet; `turn` is that round's, and
    `turns` are the state's.
    """

    spec: ModelSpec
    adapter: Adapter
    layout: Layout
    tensors: dict[str, Tensor]
    plan: Choice | None = None
    mask: Choice | None = None
    turn: Turn | None = None
    turns: tuple[Turn, ...] = ()


def outline(recipe: Recipe, label_names: Sequence[str] = ()) -> Outline:
    """The outline of a recipe's model; reads its configuration and nothing else. Raises `ModelError`, `PluginError`."""
    spec = outlines.outline(**shared.source_of(recipe), label_names=label_names)
    adapter, skeleton = models.adapter_of(spec), models.skeleton(spec)
    try:
        layout = Layout.of(adapter, skeleton)
    except LookupError as error:  # the adapter's, as in `conformance`: a model without layers, or of another layout
        raise ConformanceError(
            f"the adapter {spec.model_type!r} does not describe this model ({spec.library}): {error}",
            hint="look at the number of layers in model.config, or in the config.json of the model's folder",
        ) from error
    return Outline(spec, adapter, layout, models.tensors_of(skeleton))


def anew(model: Outline) -> Outline:
    """The same for other ratios than a state's: nothing of it is planned or chosen."""
    return replace(model, plan=None, mask=None, turn=None, turns=())


def labels_of(recipe: Recipe) -> tuple[list[str], list[str]]:
    """The labels that local data name, and a note where the head is that of the configuration instead."""
    data = recipe.data
    local = data.builtin or (data.train is not None and Path(data.train).exists())
    if not local:
        return [], ["the data are not here, so the head is that of the model's configuration"]
    try:
        return list(shared.read_raw(recipe).label_names), []
    except DataError as error:  # memory does not hang on it, and `init` will say so again
        return [], [f"the data cannot be read, so the head is that of the model's configuration: {error.message}"]


def outline_of(here: Context) -> Outline:
    """The outline of a state's model, with the plan and the mask of its newest round as far as they are chosen."""
    state, folder = here.state, here.state.manifest.small
    files = state.manifest.files
    plan = here.plan(folder) if folder and f"{folder}/{shared.PLAN}" in files else None
    mask = None
    if folder and plan is not None and f"{folder}/{shared.MASK}" in files:
        mask = {name: chosen.bool() for name, chosen in state.load_tensors(f"{folder}/{shared.MASK}").items()}
    tensors = models.tensors_of(models.skeleton(here.spec))
    turn = here.turns[state.manifest.round - 1] if plan is not None else None
    return Outline(here.spec, here.adapter, here.layout, tensors, plan, mask, turn, here.turns)
