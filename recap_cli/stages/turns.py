"""What each round of a state does: the turns that its method gave when the state was made, or those of a recipe."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isclose
from typing import Any, cast

from recap_cli import registry
from recap_cli.core.method import Method, Option, Settings, Turn
from recap_cli.errors import PluginError, RecipeError
from recap_cli.recipe import Recipe
from recap_cli.state import Manifest

MOST = 10_000  # turns; what gives more has no end


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe. Raises `PluginError` as `registry.load` does."""
    return method_of_name(recipe.method)


def method_of_name(name: str) -> Method:
    """The method that is registered under a name. Raises `PluginError` as `registry.load` does."""
    return cast(Method, registry.load("methods", name))


def turns_for(recipe: Recipe) -> tuple[Turn, ...]:
    """The turns that a recipe's method plans for it.

    Raises:
        PluginError: there is no such method, or what it gives makes no sense.
        RecipeError: the method takes no option of that name, or not of that value.
    """
    method = method_of(recipe)
    tune, prune = recipe.finetune, recipe.prune
    settings = Settings(
        rounds=recipe.rounds,
        prune_ratio=prune.ratio,
        mask_ratio=recipe.mask.ratio,
        embeddings=recipe.mask.train_embeddings,
        restarts=tune.course == "round",
        settled=int(recipe.rounds * prune.settled + 1e-9),
        ramp=prune.ramp,
        entry_cost=_entry_cost(recipe),
        options=options_of(recipe, method),
    )
    try:
        turns = tuple(turn for turn, _ in zip(method.turns(settings), range(MOST), strict=False))
    except ValueError as error:  # a plugin's way to refuse a value of its options
        raise RecipeError(f"{recipe.name}: {error}", hint=_options_hint(recipe.method, method)) from error
    except Exception as error:  # a method is a stranger's code: it may raise anything
        raise PluginError(
            f"the method {recipe.method!r} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint="its turns(settings) returns the rounds of a run; see docs/plugins.md",
        ) from error
    if problem := _problem(turns, method):
        raise PluginError(f"the method {recipe.method!r}: {problem}", hint="see Turn in docs/plugins.md")
    return turns


def options_of(recipe: Recipe, method: Method) -> dict[str, Option]:
    """The method's options, with the recipe's in the place of the defaults.

    Raises `RecipeError` for a name that the method does not have, and for a value of another type.
    """
    for name, value in recipe.options.items():
        if name not in method.options:
            near = get_close_matches(name, method.options, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"{recipe.name}: options.{name}: the method {recipe.method} has no such option{meant}",
                hint=_options_hint(recipe.method, method),
            )
        if not _alike(value, method.options[name]):
            raise RecipeError(
                f"{recipe.name}: options.{name}: expected something like {_said(method.options[name])}; found {_said(value)}",
                hint=_options_hint(recipe.method, method),
            )
    return {**method.options, **recipe.options}


def turns_of(manifest: Manifest, recipe: Recipe) -> tuple[Turn, ...]:
    """The turns of a state, as they were planned when it was made; one without any is older than methods, and is RECAP's."""
    made = next((entry for entry in manifest.history if entry["stage"] == "init"), {})
    if "turns" in made:
        return tuple(Turn.from_json(turn) for turn in made["turns"])
    embeddings = recipe.mask.train_embeddings
    return (Turn(recipe.prune.ratio, recipe.mask.ratio, share=1 / recipe.rounds, embeddings=embeddings),) * recipe.rounds


def steps_of(turns: Sequence[Turn], total: int) -> list[int]:
    """How many of `total` optimizer steps each turn takes; rounded so that they add up to the total."""
    ends = [round(total * sum(turn.share for turn in turns[: number + 1])) for number in range(len(turns))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _entry_cost(recipe: Recipe) -> float:
    """What a moving entry holds on the device beside its weight, in weights: gradient, moments and, unless fp32, its master."""
    tune = recipe.finetune
    moments = 2 if tune.optimizer == "adamw" else int(tune.momentum > 0)
    gradient = 0 if tune.fused_backward else 1
    weight_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[tune.resident]
    held = gradient + (0 if tune.offload else moments + (tune.resident != "fp32"))
    return 4 * max(held, 1) / weight_bytes


def _problem(turns: Sequence[Turn], method: Method) -> str | None:
    """What is wrong with the turns of a method, or None."""
    if not 0 < len(turns) < MOST:
        return f"gives {'no' if not turns else MOST} turns"
    if not isclose(sum(turn.share for turn in turns), 1.0, rel_tol=1e-6):
        return f"the shares of its turns add up to {sum(turn.share for turn in turns):g}, not to 1"
    if turns[0].plan != "importance":
        return f"its first turn has nothing to take a plan from (plan={turns[0].plan!r})"
    if not any(turn.product for turn in turns):
        return "none of its turns gives the product"
    return next((f"turn {number} {wrong}" for number, turn in enumerate(turns, 1) if (wrong := _wrong(turn, method))), None)


def _wrong(turn: Turn, method: Method) -> str | None:
    start, end = turn.course
    if not (0 <= turn.prune_ratio < 1 and 0 <= turn.mask_ratio < 1 and turn.share > 0 and 0 <= start < end <= 1 + 1e-9):
        return "has a share, a ratio or a course that is out of range"
    if turn.moves == "training" and method.training is None:
        return "moves what a training says, and the method has none"
    return None


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, (tuple, list)):
        return isinstance(value, list)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return default is None or isinstance(value, type(default))


def _said(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)


def _options_hint(name: str, method: Method) -> str:
    known: Mapping[str, Any] = method.options
    if not known:
        return f"the method {name} has no options"
    return f"the options of {name}, with their defaults: {', '.join(f'{key}: {_said(value)}' for key, value in known.items())}"
