"""What each round of a state does: the turns that its method gave when the state was made, or those of a recipe."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import ceil, isclose
from typing import Any, cast, get_args

from recap_cli import registry
from recap_cli.core.method import Method, Moves, Option, Plan, Settings, Turn
from recap_cli.errors import PluginError, RecipeError
from recap_cli.recipe.recipe import Recipe
from recap_cli.state.store import Manifest
from recap_cli.untrusted.code import guarded

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
    hint = "its turns(settings) returns the rounds of a run; see docs/plugins.md"
    with guarded(f"the method {recipe.method!r} failed", hint):
        try:
            turns = tuple(turn for turn, _ in zip(method.turns(settings), range(MOST), strict=False))
        except ValueError as error:  # a plugin's way to refuse a value of its options
            raise RecipeError(f"{recipe.name}: {error}", hint=_options_hint(recipe.method, method)) from error
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
    return {**method.options, **cast(dict[str, Option], recipe.options)}


def turns_of(manifest: Manifest) -> tuple[Turn, ...]:
    """The turns of a state, as they were planned when it was made."""
    return tuple(Turn.from_json(turn) for turn in manifest.made["turns"])


def steps_of(turns: Sequence[Turn], total: int) -> list[int]:
    """How many of `total` optimizer steps each turn takes; rounded so that they add up to the total."""
    ends = [round(total * sum(turn.share for turn in turns[: number + 1])) for number in range(len(turns))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _entry_cost(recipe: Recipe) -> float:
    """What a moving entry holds on the device more than a frozen one, in weights of frozen ones: gradient, moments and, unless
    fp32, its master; an int8 code is no longer there.
    """
    tune = recipe.finetune
    moments = 2 if tune.optimizer == "adamw" else int(tune.momentum > 0)
    held_bytes = 0 if tune.fused_backward else 4
    held_bytes += 0 if tune.offload else 4 * moments
    resident_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[tune.resident]
    if not tune.offload and tune.resident != "fp32":
        held_bytes += 4
    if tune.resident == "int8":
        held_bytes += (2 if tune.offload else 0) - 1  # with `offload` the moving entries are resident in bf16
    return held_bytes / resident_bytes


def steps_in_round(recipe: Recipe, examples: int) -> int:
    """N_f: the optimizer steps of a round."""
    settings = recipe.finetune
    if settings.steps is not None:
        return settings.steps
    return max(1, round((settings.epochs or 0) * ceil(examples / settings.batch_size)))


def course_of(turn: Turn, before: int, steps: int, total: int) -> tuple[int, int]:
    """The steps of the whole course of the learning rate that a turn's `steps` are a window of, and its first step there.

    Where the window is the turn's own place among the `total` steps of the run, `before` of which are done, it is that to the
    step.
    """
    start, end = turn.course
    if abs(start * total - before) < 1 and abs(end * total - before - steps) < 1:
        return total, before
    whole = round(steps / (end - start))
    return whole, round(start * whole)


def check_steps(turns: Sequence[Turn], total: int, recipe: Recipe) -> None:
    """Raise `RecipeError` if a turn would take no step of the `total`."""
    if 0 in (each := steps_of(turns, total)):
        count = "1 optimizer step is" if total == 1 else f"{total} optimizer steps are"
        raise RecipeError(
            f"{recipe.name}: {count} too few for the {len(turns)} rounds of {recipe.method}: round {each.index(0) + 1} would "
            "have none",
            hint="raise rounds, finetune.epochs or finetune.steps",
        )


def _problem(turns: Sequence[Turn], method: Method) -> str | None:
    """What is wrong with the turns of a method, or None."""
    if not 0 < len(turns) < MOST:
        return f"gives {'no' if not turns else MOST} turns"
    for number, turn in enumerate(turns, 1):
        if wrong := _malformed(turn) or _wrong(turn, turns[number - 2] if number > 1 else None, method):
            return f"turn {number} {wrong}"
    if not isclose(sum(turn.share for turn in turns), 1.0, rel_tol=1e-6):
        return f"the shares of its turns add up to {sum(turn.share for turn in turns):g}, not to 1"
    return None if any(turn.product for turn in turns) else "none of its turns gives the product"


def _malformed(turn: Any) -> str | None:
    """What of a turn is not what it should be, taken by itself."""
    if not isinstance(turn, Turn):
        return f"is of type {type(turn).__name__}, not Turn"
    numbers = (turn.prune_ratio, turn.mask_ratio, turn.share, *turn.course)
    if len(numbers) != 5 or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        return f"has something else than numbers as ratios, share or course: {numbers}"
    start, end = turn.course
    if not (0 <= turn.prune_ratio < 1 and 0 <= turn.mask_ratio < 1 and turn.share > 0 and 0 <= start < end <= 1 + 1e-9):
        return (
            f"is out of range: prune_ratio {turn.prune_ratio:g}, mask_ratio {turn.mask_ratio:g}, share {turn.share:g}, "
            f"course {start:g} to {end:g}"
        )
    if not isinstance(turn.embeddings, bool) and turn.embeddings != "tokens":
        return f"has embeddings={turn.embeddings!r}, which is none of True, False, 'tokens'"
    for name, value, known in (("plan", turn.plan, get_args(Plan)), ("moves", turn.moves, get_args(Moves))):
        if value not in known:
            return f"has {name}={value!r}, which is none of {', '.join(known)}"
    return None


def _wrong(turn: Turn, before: Turn | None, method: Method) -> str | None:
    """What of a turn does not go with the one `before` it, or with the method."""
    if turn.moves == "training" and method.training is None:
        return "moves what a training says, and the method has none"
    if turn.plan != "importance" and before is None:
        return f"has nothing to take a plan from (plan={turn.plan!r})"
    if turn.plan == "same" and before is not None and turn.prune_ratio != before.prune_ratio:
        return f"keeps the plan and says another prune_ratio: {turn.prune_ratio:g} after {before.prune_ratio:g}"
    if turn.plan == "learned" and before is not None and before.moves != "training":
        return "prunes by scores, and the turn before it has no training that learns any"
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
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)


def _options_hint(name: str, method: Method) -> str:
    known: Mapping[str, Any] = method.options
    if not known:
        return f"the method {name} has no options"
    return f"the options of {name}, with their defaults: {', '.join(f'{key}: {_said(value)}' for key, value in known.items())}"
