"""The axis of learning rates: the rates of each method, and the key of the recipe that they set."""

from collections.abc import Iterable, Mapping, Sequence

from recap_cli.errors import PluginError, RecipeError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.plans import round_plans_for, teaches

LR, HEAD_LR = "finetune.lr", "finetune.head_lr"
KEYS = (LR, HEAD_LR)

Lists = Mapping[str | None, Sequence[float]]  # by method; under None for each method that has no own list


def by_method(asked: Lists, methods: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return the rates of each of the methods that has any."""
    found = {name: tuple(asked.get(name) or asked.get(None) or ()) for name in methods}
    return {name: lrs for name, lrs in found.items() if lrs}


def notes(asked: Lists, methods: Sequence[str]) -> list[str]:
    """Return what of the lists is of no method that is compared."""
    found = [f"--lrs {text(name, lrs)}: {name} is not compared" for name, lrs in asked.items() if name not in (None, *methods)]
    if None in asked and set(methods) <= asked.keys():
        found.append(f"--lrs {text(None, asked[None])}: every method that is compared has rates of its own")
    return found


def text(method: str | None, lrs: Iterable[float]) -> str:
    """Return a list as `--lrs` takes it: `recap:0.0003,0.001`."""
    return f"{'' if method is None else f'{method}:'}{','.join(f'{lr:.12g}' for lr in lrs)}"


def key_of(recipe: Recipe) -> str:
    """Return the key of the rate that counts for a recipe's method: the head's, if its rounds train the head alone.

    A faithful recipe has no rate of the head.
    """
    try:
        round_plans = [one for one in round_plans_for(recipe) if not teaches(one)]
    except (PluginError, RecipeError):  # its cells are impossible, and say why
        return LR
    return HEAD_LR if not recipe.faithful and all(one.trains == "head" for one in round_plans) else LR


def rate_of(recipe: Recipe, key: str) -> float | None:
    """Return the rate of a recipe that has this key; None where it is `auto`, which the model decides."""
    lr = None if recipe.finetune.lr == "auto" else recipe.finetune.lr
    if key == LR:
        return lr
    return recipe.finetune.head_lr if isinstance(recipe.finetune.head_lr, int | float) else lr


def keys_in(settings: Mapping[str, object], lr: float | None) -> tuple[str, ...]:
    """Return the key that the axis has set in the settings of a cell: none, if the cell has no rate of the axis."""
    return () if lr is None else tuple(key for key in KEYS if key in settings)[:1]
