"""`recap profile-memory`: what finetuning will hold on its device, predicted or measured, and what fits a budget."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, SetOption, complete_recipe
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from recap_cli.recipe import Recipe
    from recap_cli.stages.budget import Fit
    from recap_cli.stages.profile import Method, Outline
    from recap_cli.state import State

Number = TypeVar("Number", int, float)

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|STATE",
        help="A YAML file, the name of a shipped recipe, or a state's folder, whose own plan and mask count then.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Methods = Annotated[str, typer.Option("--methods", metavar="LIST", help="Of full, head, lora, pre-ft and recap.")]
BatchSizes = Annotated[str | None, typer.Option("--batch-sizes", metavar="LIST", help="A row for each batch size: 1,8,32.")]
Ratios = Annotated[str | None, typer.Option("--ratios", metavar="LIST", help="A row for each r_p: 0.166,0.333,0.5.")]
Budget = Annotated[str | None, typer.Option("--budget", metavar="SIZE", help="Find settings that fit, as in 2GiB.")]
Measure = Annotated[bool, typer.Option("--measure", help="Take a few real steps too, on the recipe's finetune.device.")]
ByModule = Annotated[bool, typer.Option("--by-module", help="What is held at the peak, block by block.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write pictures: a .png, .svg or .pdf.")]


def profile_memory(
    target: Target,
    methods: Methods = "full,recap",
    batch_sizes: BatchSizes = None,
    ratios: Ratios = None,
    budget: Budget = None,
    measure: Measure = False,
    by_module: ByModule = False,
    plot: Plot = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what finetuning holds on its device: from the configuration alone, without a GPU, weights or data.

    Each figure is one real training step of the real model on tensors without memory, with the kernels that CUDA would choose.

    Example: [bold]recap profile-memory quickstart --methods full,lora,recap --batch-sizes 1,8,32[/bold]
    """
    sizes, shares = _numbers("--batch-sizes", batch_sizes, int), _numbers("--ratios", ratios, float)
    recipe, state = _open(target, overrides or ())
    from recap_cli.commands import memory_tables as tables
    from recap_cli.stages import measure as measuring
    from recap_cli.stages import pictures, profile

    asked = _methods(methods)
    if plot is not None:
        pictures.check(plot)
    model, notes = _outline(recipe, state)
    found: dict[str, Any] = {"target": target, "recipe": recipe.name, "notes": notes}
    if budget is not None:
        fit = _fit(model, recipe, state, budget)
        recipe, found["budget"] = fit.recipe, tables.budget_json(fit, budget)
    predictions = profile.grid(model, recipe, asked, sizes, shares, track=console.track)
    found["predicted"] = [prediction.to_json() for prediction in predictions]
    if recipe.importance.device not in ("cpu", "auto"):
        found["importance_peak_bytes"] = profile.importance_bytes(model, recipe)
    if by_module:
        found["by_module"] = {p.method: profile.by_block(model, p.usage) for p in predictions}
    if measure:
        found["measured"] = measuring.measure(model, recipe, asked, track=console.track)
    if plot is not None:
        found["pictures"] = [str(path) for path in pictures.draw(found["predicted"], plot, recipe, sizes, shares)]
    if as_json:
        console.emit_json(found)
    else:
        tables.show(found, state)


def _open(target: str, overrides: Sequence[str]) -> "tuple[Recipe, State | None]":
    """The recipe that was named, or the state and its recipe."""
    from recap_cli import recipe as recipes

    if not Path(target).is_dir():
        return recipes.read(target, overrides), None
    from recap_cli.stages.settings import recipe_of
    from recap_cli.state import State

    state = State.open(target)
    return recipe_of(state, overrides), state


def _methods(text: str) -> "list[Method]":
    from recap_cli.stages.profile import METHODS

    given = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in given if name not in METHODS]
    if unknown or not given:
        what = f"there is no method {unknown[0]!r}" if unknown else "no method was named"
        hint = f"choose among {', '.join(METHODS)} (post-ft and movement hold at their peak what full does)"
        raise UsageError(f"--methods {text}: {what}", hint=hint)
    return list(dict.fromkeys(cast("list[Method]", given)))


def _numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a list such as 1,8,32, each once."""
    try:
        found = [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: numbers with commas between them are wanted, as in 1,8,32") from None
    if any(not 0 < number < (1 if kind is float else 2**20) for number in found):
        limits = "between 0 and 1" if kind is float else "from 1 on"
        raise UsageError(f"{option} {text}: each must be {limits}", hint="see recap profile-memory --help")
    return list(dict.fromkeys(found))


def _outline(recipe: "Recipe", state: "State | None") -> "tuple[Outline, list[str]]":
    """The model's outline, and what to tell of how it was come by."""
    from recap_cli.stages import profile

    if state is None:
        labels, notes = profile.labels_of(recipe)
        return profile.outline(recipe, labels), notes
    from recap_cli.stages.context import Context

    model = profile.outline_of(Context(state))
    known = " and mask" if model.mask is not None else ""
    return model, [f"the plan{known} of round {state.manifest.round} count"] if model.plan is not None else []


def _fit(model: "Outline", recipe: "Recipe", state: "State | None", text: str) -> "Fit":
    from recap_cli.recipe import bytes_of
    from recap_cli.stages import budget
    from recap_cli.stages.settings import EXECUTION

    try:
        amount = bytes_of(text)
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from None
    may_change = (lambda _: True) if state is None else EXECUTION.__contains__
    return budget.fit(model, recipe, amount, may_change=may_change, track=console.track)
