"""A model without weights, as a recipe or a state describes it: what a prediction of its memory begins from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from recap_cli.core.adapter import Adapter
from recap_cli.core.axes import UnitMask
from recap_cli.core.method import RoundPlan
from recap_cli.data import sources
from recap_cli.data.images import largest_image
from recap_cli.errors import ConformanceError, DataError, ModelError
from recap_cli.models import build, conformance, create, spec_from_config
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.examples import are_read, read_raw, splits_of
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.recipe_model import source_of
from recap_cli.rounds.record import MASK, PLAN
from recap_cli.rounds.run_context import Context
from recap_cli.tasks.calls import task_named
from recap_cli.trainable.token_rows import TokenRows, used_token_rows


@dataclass(frozen=True)
class MetaModel:
    """A model without weights: its spec, adapter and layout, the tensors' shapes (on the meta device).

    `token_rows` says which rows of the token table the data use; None, where that is not known, stands for all of them.
    `map_size` is the (height, width) of the largest label map that the model is scored by; None where it is not known, or
    labels are no maps. `plan` and `mask` are those of a state's newest round, or None where they are not chosen yet.
    `round_plan` is that round's, and `round_plans` are the state's.
    """

    spec: ModelSpec
    adapter: Adapter
    layout: Layout
    tensors: dict[str, Tensor]
    plan: UnitMask | None = None
    mask: UnitMask | None = None
    round_plan: RoundPlan | None = None
    round_plans: tuple[RoundPlan, ...] = ()
    token_rows: TokenRows | None = None
    map_size: tuple[int, int] | None = None


def of_recipe(recipe: Recipe, label_names: Sequence[str] = ()) -> MetaModel:
    """The meta model of a recipe; reads its configuration and nothing else.

    Raises:
        ModelError: the configuration cannot be read, or does not fit.
        PluginError: its adapter cannot be loaded.
        ConformanceError: the adapter does not describe it.
    """
    spec = spec_from_config.spec_of(source_of(recipe, label_names))
    conformance.check_patches(spec)
    adapter, model = build.adapter_of(spec), build.on_meta(spec)
    try:
        layout = Layout.of_model(adapter, model)
    except LookupError as error:  # the adapter's, as in `conformance`: a model without layers, or of another layout
        raise ConformanceError(
            f"the adapter {spec.model_type!r} does not describe this model ({spec.library}): {error}",
            hint="look at the number of layers in model.config, or in the config.json of the model's folder",
        ) from error
    return MetaModel(spec, adapter, layout, build.tensors_of(model))


def anew(model: MetaModel) -> MetaModel:
    """The same for other ratios than a state's: nothing of it is planned or chosen."""
    return replace(model, plan=None, mask=None, round_plan=None, round_plans=())


def labels_of(recipe: Recipe) -> tuple[list[str], list[str]]:
    """The labels that local data name, and a note where the head is that of the configuration instead."""
    raw, notes = _local_data(recipe)
    return ([] if raw is None else list(raw.label_names)), notes


def of_recipe_with_data(recipe: Recipe, track: Track = silent) -> tuple[MetaModel, list[str]]:
    """The meta model of a recipe as far as local data and a local tokenizer say more of it, and notes where they do not.

    Raises:
        ModelError, PluginError, ConformanceError: as in `of_recipe`.
    """
    raw, notes = _local_data(recipe)
    model = of_recipe(recipe, [] if raw is None else list(raw.label_names))
    if raw is not None and model.spec.image is not None:
        return with_token_rows(model, recipe, raw, track), notes
    if raw is None:
        return model, notes
    folder = recipe.model.name or (recipe.model.config or {}).get("tokenizer")
    if not isinstance(folder, str) or not Path(folder).expanduser().is_dir():
        return model, [*notes, "the tokenizer is not here"]
    try:
        return with_token_rows(model, recipe, raw, track), notes
    except (DataError, ModelError) as error:  # likewise
        return model, [*notes, f"the texts cannot be read: {error.message}"]


def with_token_rows(model: MetaModel, recipe: Recipe, raw: sources.Raw, track: Track = silent) -> MetaModel:
    """The same with the rows of the token table that the data look up; of images, with the size of label maps.

    Raises:
        ModelError: there is no tokenizer.
        DataError: the texts cannot be read.
    """
    if model.spec.image is not None:
        maps = task_named(recipe.task.kind).target.maps
        return replace(model, map_size=largest_image(raw.validation)) if maps else model
    tokenizer = create.tokenizer_of(source_of(recipe), model.spec.config["vocab_size"])
    train, validation = splits_of(recipe, model.spec, tokenizer, track, raw)
    return replace(model, token_rows=used_token_rows(build.on_meta(model.spec), train, validation))


def _is_local(recipe: Recipe) -> bool:
    data = recipe.data
    return data.builtin is not None or (data.train is not None and Path(data.train).exists())


def _local_data(recipe: Recipe) -> tuple[sources.Raw | None, list[str]]:
    """The examples, if they are local, and a note if they are not, or cannot be read."""
    if not _is_local(recipe):
        return None, ["the data are not here, so the head is that of the model's configuration"]
    try:
        return read_raw(recipe), []
    except DataError as error:  # memory does not hang on it, and `init` will say so again
        return None, [f"the data cannot be read, so the head is that of the model's configuration: {error.message}"]


def of_state(context: Context, track: Track = silent) -> MetaModel:
    """The meta model of a state, with the plan and the mask of its newest round as far as they are chosen."""
    state, folder = context.state, context.state.manifest.small
    files = state.manifest.files
    plan = context.plan(folder) if folder and f"{folder}/{PLAN}" in files else None
    mask = None
    if folder and plan is not None and f"{folder}/{MASK}" in files:
        mask = context.mask(folder, plan)
    tensors = build.tensors_of(build.on_meta(context.spec))
    round_plan = context.round_plans[state.manifest.round - 1] if plan is not None else None
    return MetaModel(
        context.spec,
        context.adapter,
        context.layout,
        tensors,
        plan,
        mask,
        round_plan,
        context.round_plans,
        _token_rows_of(context, track),
    )


def _token_rows_of(context: Context, track: Track) -> TokenRows | None:
    """As the last finetuning had it, or as the data say, if they are read already or local."""
    newest = context.state.manifest.round
    for number in range(newest, max(0, newest - 2), -1):
        if found := context.token_rows(f"round-{number:03d}"):
            return found
    if context.spec.image is not None or not (are_read(context.recipe, context.spec) or _is_local(context.recipe)):
        return None
    try:
        return used_token_rows(build.on_meta(context.spec), *context.splits(track))
    except DataError:  # its files are gone, and `finetune` will say so
        return None
