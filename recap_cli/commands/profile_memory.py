"""`recap profile-memory`: what finetuning will hold on its device, predicted or measured, and what fits a budget."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from recap_cli import console, extras
from recap_cli.commands.arguments import JsonOption, SetOption, complete_recipe
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from recap_cli.memory.meta_model import MetaModel
    from recap_cli.recipe.recipe import Recipe
    from recap_cli.state.store import State

Number = TypeVar("Number", int, float)
MOST = 2**31  # examples in a batch: torch's indices go no further

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|STATE",
        help="A YAML file, the name of a shipped recipe, or a state's folder, whose plan and mask are used then.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="LIST",
        help="Methods as `recap plugins` lists them, or full, head, lora for short.",
        show_default="full and the recipe's",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option("--batch-sizes", metavar="LIST", help="Predict for each finetune.batch_size of a list: 1,8,32."),
]
Ratios = Annotated[
    str | None, typer.Option("--ratios", metavar="LIST", help="Predict for each prune.ratio of a list: 0.166,0.333,0.5.")
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE", help="Find settings that fit, as in 2GiB.", show_default="finetune.memory_budget"),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Take real steps too, with random weights, on the recipe's finetune.device.")
]
Snapshot = Annotated[
    Path | None,
    typer.Option("--snapshot", metavar="FILE", help="With --measure on CUDA: write torch's record of the allocator."),
]
ByModule = Annotated[bool, typer.Option("--by-module", help="Show what each block holds at the peak.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture: a .png, .svg or .pdf.")]


class _Subject(NamedTuple):
    """What is profiled: a recipe with the overrides given, its state if it has one, and its meta model."""

    recipe: "Recipe"
    state: "State | None"
    model: "MetaModel"
    notes: list[str]


def profile_memory(
    target: Target,
    methods: Methods = None,
    batch_sizes: BatchSizes = None,
    ratios: Ratios = None,
    budget: Budget = None,
    measure: Measure = False,
    snapshot: Snapshot = None,
    by_module: ByModule = False,
    plot: Plot = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what finetuning holds on its device: from the configuration, without a GPU, weights or data.

    Each figure comes from a training step of the real model on tensors without memory.
    It uses the kernels that CUDA chooses.
    Local texts are read for their tokens: the device holds no rows of other tokens.

    Example: [bold]recap profile-memory quickstart --methods full,lora,recap --batch-sizes 1,8,32[/bold]
    """
    sizes, shares = _numbers("--batch-sizes", batch_sizes, int), _numbers("--ratios", ratios, float)
    from recap_cli.commands import memory_tables as tables
    from recap_cli.memory import measure as measuring
    from recap_cli.memory import plot_files, predict

    asked = [] if methods is None else _methods(methods)
    _require_extras(asked)
    if budget is not None:
        _bytes_of(budget)
    if plot is not None:
        extras.require("plots")
        plot_files.check(plot)
    recipe, state, model, notes = _open(target, overrides or ())
    asked = asked or (["full"] if recipe.method == "full-ft" else ["full", recipe.method])
    _check_ratios(shares, ratios, asked, recipe)
    _check_measure(recipe, measure, snapshot)
    if budget is None and state is None:
        budget = recipe.finetune.memory_budget  # `run` respects it, too
    found: dict[str, Any] = {"target": target, "recipe": recipe.name}
    if budget is not None:
        found["budget"], recipe = _fit(_Subject(recipe, state, model, notes), target, overrides or (), budget)
    predictions = predict.grid(model, recipe, asked, sizes, shares, track=console.track)
    found["predicted"] = [prediction.to_json() for prediction in predictions]
    if by_module:
        for row, prediction in zip(found["predicted"], predictions, strict=True):
            row["by_module"] = predict.by_block(model, prediction.usage)
    found |= _streamed(model, recipe)
    if measure:
        found["measured"] = measuring.measure(model, recipe, asked, track=console.track, snapshot_to=snapshot)
    if plot is not None:
        limit = None if budget is None else _bytes_of(budget)
        given: dict[str, Any] = {"batch_sizes": sizes, "prune_ratios": shares, "budget_bytes": limit}
        found["pictures"] = [str(path) for path in plot_files.draw(found["predicted"], plot, title=recipe.name, **given)]
    if budget is not None and any(given.startswith("model.config") for given in overrides or ()):
        notes = [*notes, "a run with model.config starts from random weights: leave it out there, or --set model.name=DIR"]
    found["notes"] = [*notes, *_assumptions(model, recipe, asked, sizes, shares, measure)]
    if as_json:
        console.emit_json(found | {"not_included": tables.NOT_INCLUDED})
    else:
        tables.show(found)


def _streamed(model: "MetaModel", recipe: "Recipe") -> dict[str, int]:
    """Return the peaks of what runs the full model a block at a time: importance on an accelerator, and a teacher's round."""
    from recap_cli.memory.predict import importance_bytes
    from recap_cli.memory.teacher import teacher_bytes, teacher_scoring_bytes

    peaks = {"importance_peak_bytes": importance_bytes} if recipe.importance.device != "cpu" else {}
    found = {name: peak(model, recipe) for name, peak in peaks.items()}
    if recipe.distill.is_own:
        found["teacher_peak_bytes"] = max(teacher_bytes(model, recipe), teacher_scoring_bytes(model, recipe))
    return found


def _methods(text: str) -> list[str]:
    from recap_cli import registry
    from recap_cli.memory.predict import SHORT

    known = registry.names("methods")
    given = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in given if name not in known and name not in SHORT]
    if unknown or not given:
        what = f"there is no method {unknown[0]!r}" if unknown else "no method was named"
        short = ", ".join(f"{a} for {b}" for a, b in SHORT.items())
        raise UsageError(f"--methods {text or repr(text)}: {what}", hint=f"choose among {', '.join(known)} ({short})")
    return list(dict.fromkeys(given))


def _require_extras(methods: Sequence[str]) -> None:
    """Raise `MissingExtraError` if one of these methods, by its name or short name, needs an extra that is not installed."""
    from recap_cli.memory.predict import SHORT
    from recap_cli.rounds.plans import require_extra

    for method in methods:
        require_extra(SHORT.get(method, method))


def _numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers of a list such as 1,8,32, each once."""
    if text is None:
        return []
    is_share = kind is float
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < 1 if is_share else 0 < number < MOST for number in found):
        wanted = "shares from 0 to below 1" if is_share else f"whole numbers from 1 to {MOST - 1:,}"
        example = "0.166,0.333,0.5" if is_share else "1,8,32"
        raise UsageError(
            f"{option} {text or repr(text)}: expected {wanted}, with commas between them", hint=f"as in {option} {example}"
        )
    return list(dict.fromkeys(found))


def _bytes_of(budget: str) -> int:
    from recap_cli.recipe.recipe import bytes_of

    try:
        return bytes_of(budget)
    except ValueError as error:
        hint = "units are B, KB, MB, GB and TB, and KiB, MiB, GiB and TiB"
        raise UsageError(f"--budget {budget or repr(budget)}: {error}", hint=hint) from None


def _check_measure(recipe: "Recipe", measure: bool, snapshot: Path | None) -> None:
    from recap_cli.memory import measure as measuring

    if snapshot is not None and not measure:
        raise UsageError(f"--snapshot {snapshot}: expected only with --measure", hint="a prediction allocates nothing")
    if measure:
        measuring.check(recipe, snapshot)


def _check_ratios(shares: Sequence[float], text: str | None, methods: Sequence[str], recipe: "Recipe") -> None:
    from recap_cli.memory.predict import prunes

    if shares and not any(prunes(method) for method in methods):
        raise UsageError(f"--ratios {text}: none of the methods {', '.join(methods)} prunes", hint="--methods pre-ft,recap")
    floor = recipe.prune.floor
    if any(share + floor > 1 + 1e-9 for share in shares):
        raise UsageError(
            f"--ratios {text}: expected at most {1 - floor:g}, as prune.floor keeps {floor:g} of each layer",
            hint=f"with --set prune.floor={1 - max(shares):.3g} it can",
        )


def _open(target: str, overrides: Sequence[str]) -> _Subject:
    """Open what `target` names, a recipe or a state, and make its meta model."""
    from recap_cli.memory import meta_model
    from recap_cli.recipe import recipe as recipes
    from recap_cli.state.manifest import COMMIT, quoted

    if Path(target).name == COMMIT:
        raise UsageError(f"{target} is the record of a state", hint=f"name its folder: {quoted(Path(target).parent)}")
    if not Path(target).is_dir():
        recipe = recipes.read(target, overrides)
        _require_extras([recipe.method])
        model, notes = meta_model.of_recipe_with_data(recipe, console.track)
        return _Subject(recipe, None, model, notes)
    from recap_cli.rounds.run_context import Context
    from recap_cli.rounds.settings import recipe_of
    from recap_cli.state.store import State

    state = State.open(target)
    recipe = recipe_of(state, overrides)
    _require_extras([recipe.method])
    overridden = recipes.differences(recipe_of(state), recipe)
    model, notes = _as_overridden(meta_model.of_state(Context(state), console.track), state, overridden)
    return _Subject(recipe, state, model, notes)


def _as_overridden(model: "MetaModel", state: "State", overridden: Sequence[str]) -> "tuple[MetaModel, list[str]]":
    """Return the meta model of a state without what the overridden keys make invalid, and a note for each of these.

    Args:
        model: The meta model of the state, with its plan, mask and token rows.
        state: The state, for messages.
        overridden: The keys whose values differ from those of the state's recipe.

    Raises:
        UsageError: An overridden key would change the model itself.
    """
    from dataclasses import replace

    from recap_cli.memory.meta_model import anew
    from recap_cli.state.manifest import quoted

    fixed = [key for key in overridden if key.startswith(("model.", "task.")) or key == "data.image_size"]
    if fixed:
        raise UsageError(
            f"--set {fixed[0]}: the model of the state {state.path} cannot change",
            hint=f"ask with a recipe: recap profile-memory {quoted(state.path / state.manifest.recipe)} --set {fixed[0]}=…",
        )
    pruned = [key for key in overridden if key.startswith("prune.")]
    masked = [key for key in overridden if key.startswith("mask.") and key != "mask.train_embeddings"]
    notes = []
    data_keys = [key for key in overridden if key.startswith("data.") and key != "data.workers"]
    if data_keys and model.token_rows is not None:
        notes.append(f"{', '.join(data_keys)} differs from the state's recipe: the texts were not read")
        model = replace(model, token_rows=None)
    if model.plan is not None and pruned:
        notes.append(f"{', '.join(pruned)} differs from the state's recipe: its plan and mask are ignored")
    elif model.mask is not None and masked:
        notes.append(f"{', '.join(masked)} differs from the state's recipe: its mask is ignored")
    if pruned:
        return anew(model), notes
    if masked:
        return replace(model, mask=None, round_plans=()), notes
    return (replace(model, round_plans=()) if "mask.train_embeddings" in overridden else model), notes


def _fit(subject: _Subject, target: str, overrides: Sequence[str], text: str) -> "tuple[dict[str, Any], Recipe]":
    """Return the changes for a budget and the commands that run with them, as plain values, and the changed recipe."""
    from dataclasses import asdict

    from recap_cli.memory import budget, changes
    from recap_cli.recipe import recipe as recipes
    from recap_cli.rounds.settings import EXECUTION, recipe_of

    recipe, state, model, _ = subject
    if state is not None:
        fixed = [key for key in recipes.differences(recipe_of(state), recipe) if key not in EXECUTION]
        if fixed:
            raise UsageError(
                f"--budget {text} --set {fixed[0]}: in a state only execution settings can change, and {fixed[0]} is none",
                hint=f"leave it out, or ask with a recipe; execution settings are {', '.join(EXECUTION)}",
            )
    may_change = (lambda _: True) if state is None else EXECUTION.__contains__
    fit = budget.fit(model, recipe, _bytes_of(text), may_change=may_change, track=console.track)
    found = {
        "memory_budget": text,
        "budget_bytes": _bytes_of(text),
        "workspace_bytes": changes.WORKSPACE_BYTES,
        "training_peak_bytes": fit.prediction.usage.peak_bytes,
        "evaluation_peak_bytes": fit.prediction.evaluation_bytes,
        "changes": [asdict(change) for change in fit.changes],
        "commands": list(_commands(subject, target, overrides, text, fit.changes)),
    }
    return found, fit.recipe


def _commands(subject: _Subject, target: str, overrides: Sequence[str], text: str, changes: "Sequence[Any]") -> Iterator[str]:
    """Yield the command lines that run with the changes; none for a state that has no stage left to run."""
    import shlex

    from recap_cli.memory.budget import value_text
    from recap_cli.rounds.status import next_stage

    recipe, state = subject.recipe, subject.state
    if state is not None and next_stage(recipe, state) is None:
        return
    overrides = [given for given in overrides if not given.startswith("finetune.memory_budget=")]
    values = {change.key: value_text(change.after) for change in changes}
    sets = [given for given in overrides if given.partition("=")[0].strip() not in values]
    sets += [f"{key}={value}" for key, value in values.items()]
    if state is None and recipe.finetune.memory_budget is not None:
        sets.append("finetune.memory_budget=null")  # a budget would change the settings again
    place = [target] if state is None else ["--state", target]
    for given in (sets, [*overrides, f"finetune.memory_budget={text}"]) if state is None else (sets,):
        yield shlex.join(["recap", "run", *place, *(word for value in given for word in ("--set", value))])


def _assumptions(
    model: "MetaModel",
    recipe: "Recipe",
    methods: Sequence[str],
    sizes: Sequence[int],
    shares: Sequence[float],
    measure: bool,
) -> Iterator[str]:
    """Yield what the prediction assumes beyond the recipe."""
    from recap_cli.memory.predict import prunes

    if any(prunes(method) for method in methods):
        if model.plan is None or shares:
            yield "assumes that every layer keeps and trains the same share of its groups; a run differs a little"
        elif model.mask is None:
            yield "recap and pre-ft use the plan of the state; assumes that the same share of every layer is trainable"
        else:
            yield "recap and pre-ft use the plan of the state, and recap its mask"
    if model.token_rows is None and model.spec.image is None:
        trainable = ", and that recap trains all of them" if recipe.mask.train_embeddings == "tokens" else ""
        yield f"the tokens that the data use are unknown: assumes that all rows of the token table are held{trainable}"
    if (rows := model.token_rows) is not None:
        yield f"the data use {len(rows.held):,} of {rows.size:,} tokens; other rows are held only if all are trainable"
    if sizes and recipe.finetune.micro_batch_size is not None:
        yield f"--batch-sizes ignore finetune.micro_batch_size={recipe.finetune.micro_batch_size}"
    if measure and (sizes or shares):
        yield "the measured step uses the batch size and ratio of the recipe"
