"""The grid of a comparison: methods, ratios and seeds, and one cell with a recipe of its own for each that go together.

A method that has no ratio to prune or to freeze by has one cell a seed, whatever ratios there are.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from recap_cli import registry
from recap_cli.core.method import Method
from recap_cli.errors import MissingExtraError, PluginError, RecipeError, UsageError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import status
from recap_cli.rounds.plans import method_of_name, require_extra, round_plans_for

ORDER = ("full-ft", "head-ft", "lora-ft", "pre-ft", "post-ft", "movement", "recap")  # strangers come after these
SEEDS = (0, 1, 2)
AXES = {"method": "--methods", "seed": "--seeds", "prune.ratio": "--ratios", "mask.ratio": "--mask-ratios"}


@dataclass(frozen=True)
class Grid:
    """What is varied: methods by name, r_p, r_f and seeds; ratios are empty where no method has them."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    mask_ratios: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One run: its place in the grid, the settings that make it from the base recipe, and its recipe.

    A ratio is None where the method has none. `recipe` is None where the settings do not go together; `error` says why.
    """

    method: str
    prune_ratio: float | None
    mask_ratio: float | None
    seed: int
    settings: Mapping[str, Any]
    recipe: Recipe | None
    error: str | None = None

    @property
    def name(self) -> str:
        """What its files are called, as in `recap-rp0.333-rf0.875-s0`."""
        parts = [quote(self.method, safe="")]
        parts += [f"rp{self.prune_ratio:.12g}"] if self.prune_ratio is not None else []
        parts += [f"rf{self.mask_ratio:.12g}"] if self.mask_ratio is not None else []
        return "-".join([*parts, f"s{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs: the recipe that all cells begin from, the grid, and the cells in the order they run in.

    `notes` say which methods are left out, and what of the command has no effect on these cells, as where it is that of a
    larger grid.
    """

    base: Recipe
    grid: Grid
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


def plan(
    source: str,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    ratios: Sequence[float] = (),
    mask_ratios: Sequence[float] = (),
    seeds: Sequence[int] = (),
) -> Plan:
    """The cells of a comparison by the recipe `source`; what is left empty is all methods, the recipe's ratios, seeds 0, 1, 2.
    Of all methods, those whose extra is not installed are left out, and a note says so.

    An override is `key=value` for every cell, or `method:key=value` for those of one method.

    An override for a method that is not compared, or ratios that none has, are noted and have no effect: so the command of a
    comparison may be repeated with other seeds and fewer methods.

    Raises:
        UsageError: an override sets what the grid varies, or names what is no method.
        PluginError: a method is unknown or cannot be loaded, or a recipe names an unknown criterion.
        MissingExtraError: a method that was named, or the recipe's own, needs an extra that is not installed.
        RecipeError: the recipe has problems, or an override has; a cell whose ratios do not fit is no error, but impossible.
        ModelError, DataError: a folder or a file that the recipe names is missing.
    """
    left_out = {} if methods else _left_out(known_methods())
    loaded = {name: method_of_name(name) for name in methods or known_methods() if name not in left_out}
    for_all, by_method = _split(overrides, loaded)
    notes = [
        f"--set {name}:{text}: {name} is not compared here"
        for name in by_method
        if name not in loaded
        for text in by_method[name]
    ]
    given = {"prune.ratio": ratios, "mask.ratio": mask_ratios}
    _refuse_axes(for_all, ["method", "seed", *(key for key, values in given.items() if values)])
    base = recipes.read(source, for_all)
    if base.method in left_out:
        require_extra(base.method)
    _refuse_options(for_all, base.method, loaded)
    prunes, masks = (any(getattr(method, does) for method in loaded.values()) for does in ("prunes", "masks"))
    if ratios and not prunes:
        notes.append(f"--ratios {_listed(ratios)}: none of the methods {', '.join(loaded)} prunes by a ratio")
    if mask_ratios and not masks:
        notes.append(f"--mask-ratios {_listed(mask_ratios)}: none of the methods {', '.join(loaded)} freezes by a ratio")
    grid = Grid(
        tuple(loaded),
        tuple(ratios or [base.prune.ratio]) if prunes else (),
        tuple(mask_ratios or [base.mask.ratio]) if masks else (),
        tuple(seeds or SEEDS),
    )
    starts = {name: _start(base, name, by_method.get(name, ())) for name in [*loaded, *by_method]}  # a slip is one anywhere
    cells = tuple(_cells(grid, loaded, starts, by_method))
    for recipe in {cell.method: cell.recipe for cell in cells if cell.recipe is not None}.values():
        status.check(recipe)
    return Plan(base, grid, cells, (*left_out.values(), *(f"{note}, so it has no effect" for note in notes)))


def _left_out(methods: Sequence[str]) -> dict[str, str]:
    """The methods whose extra is not installed, each with a note that says so."""
    found = {}
    for name in methods:
        try:
            require_extra(name)
        except MissingExtraError as error:  # nobody has named it
            found[name] = f"{name} is left out: {error.message}; {error.hint}"
    return found


def known_methods() -> list[str]:
    """The names of all methods that are registered: ours in the order of the paper's tables, then strangers by name."""
    return sorted(registry.names("methods"), key=place)


def place(method: str) -> tuple[int, str]:
    """Where a method stands among others, to sort by."""
    return (ORDER.index(method) if method in ORDER else len(ORDER), method)


def _split(overrides: Sequence[str], methods: Mapping[str, Method]) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides for all cells, and by method those of the form `method:key=value`."""
    for_all: list[str] = []
    by_method: dict[str, list[str]] = {}
    for given in overrides:
        method, colon, key = given.partition("=")[0].partition(":")
        if not colon:
            for_all.append(given)
            continue
        if method not in methods and method not in registry.names("methods"):
            raise UsageError(
                f"--set {given}: {method or repr(method)} is no method; compared are {', '.join(methods)}",
                hint=f"--set {key}=… sets it for all of them; `recap plugins` lists the methods",
            )
        override = given.partition(":")[2]
        _refuse_axes([override], list(AXES))
        by_method.setdefault(method, []).append(override)
    return for_all, by_method


def _refuse_axes(overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse to set what the grid varies."""
    for given in overrides:
        if (key := given.partition("=")[0].strip()) in keys:
            raise UsageError(
                f"--set {given}: the grid varies {key}", hint=f"name its values with {AXES[key]}, as in {AXES[key]} A,B"
            )


def _refuse_options(overrides: Sequence[str], own: str, methods: Mapping[str, Method]) -> None:
    """Refuse options that no cell would have: those of a recipe are its own method's, and that is not compared."""
    for given in overrides:
        key = given.partition("=")[0].strip()
        if key.partition(".")[0] == "options" and own not in methods:
            raise UsageError(
                f"--set {given}: options of the recipe's own method, {own}, which is not compared",
                hint=f"name the method that they are of, as in --set {shlex.quote(f'{next(iter(methods))}:{given}')}",
            )


def _listed(ratios: Sequence[float]) -> str:
    return ",".join(f"{ratio:g}" for ratio in ratios)


def _start(base: Recipe, method: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a method's cells, without ratios, so that only what the overrides say can be wrong with it.

    The options of the base recipe are those of its own method; other methods begin with their defaults.
    """
    values: dict[str, Any] = {"method": method, "prune.ratio": 0.0, "mask.ratio": 0.0}
    values |= {} if method == base.method else {"options": {}}
    start = recipes.changed(base, values)
    return recipes.parse(recipes.dump(start), f"{base.name}, for {method}", overrides) if overrides else start


def _cells(
    grid: Grid, methods: Mapping[str, Method], starts: Mapping[str, Recipe], by_method: Mapping[str, Sequence[str]]
) -> Iterator[Cell]:
    """One seed of everything after another, so that a comparison that is stopped early compares what it has."""
    for seed in grid.seeds:
        for name, method in methods.items():
            for ratio in grid.ratios if method.prunes else (None,):
                for mask_ratio in grid.mask_ratios if method.masks else (None,):
                    yield _cell(name, ratio, mask_ratio, seed, starts[name], by_method.get(name, ()))


def _cell(
    method: str, ratio: float | None, mask_ratio: float | None, seed: int, start: Recipe, overrides: Sequence[str]
) -> Cell:
    ratios = {key: value for key, value in (("prune.ratio", ratio), ("mask.ratio", mask_ratio)) if value is not None}
    values = start.model_dump(mode="json")
    own = {key: _value(values, key) for key in (given.partition("=")[0].strip() for given in overrides)}
    settings = {"method": method, **ratios, "seed": seed, **({"options": start.options} if start.options else {}), **own}
    try:
        recipe = recipes.changed(start, {**ratios, "seed": seed})
        round_plans_for(recipe)
    except (RecipeError, PluginError) as error:  # one cell that makes no sense does not keep the others from running
        return Cell(method, ratio, mask_ratio, seed, settings, None, _in_a_line(error.message))
    return Cell(method, ratio, mask_ratio, seed, settings, recipe)


def _value(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def _in_a_line(message: str) -> str:
    """The problems that a recipe's error lists, without the line above them and the places that nobody has written."""
    lines = [re.sub(r"^\s*(--set )?\S+\s+", "", line) for line in message.splitlines()[1:]]
    return "; ".join(" ".join(line.split()) for line in lines) or message
