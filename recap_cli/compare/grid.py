"""The grid of a comparison: methods, ratios, learning rates and seeds, with a cell and a recipe for each combination.

A method without a ratio to prune or to freeze by, and without rates of its own, has one cell per seed.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from recap_cli import registry
from recap_cli.compare import rate_axis
from recap_cli.compare.held_out import HeldOut
from recap_cli.compare.schema import LARGEST
from recap_cli.core.method import Method
from recap_cli.errors import MissingExtraError, PluginError, RecipeError, UsageError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import status
from recap_cli.rounds.plans import method_of_name, require_extra, round_plans_for

ORDER = (
    "full-ft",
    "head-ft",
    "lora-ft",
    "pre-ft",
    "post-ft",
    "movement",
    "recap",
    "recap-lora",
)  # third-party methods come after these
SEEDS = (0, 1, 2)
AXES = {"method": "--methods", "seed": "--seeds", "prune.ratio": "--ratios", "mask.ratio": "--mask-ratios"}
OPTIONS = AXES | dict.fromkeys(rate_axis.KEYS, "--lrs")


@dataclass(frozen=True)
class Grid:
    """What the cells vary: methods by name, r_p, r_f, seeds, and learning rates by method.

    Ratios are empty if no method has them, and rates if all methods train at the recipe's. What a user leaves empty is that of
    the recipe, or all methods. Rates under None are those of each method that has none of its own.
    """

    methods: Sequence[str] = ()
    ratios: Sequence[float] = ()
    mask_ratios: Sequence[float] = ()
    seeds: Sequence[int] = ()
    lrs: rate_axis.Lists = field(default_factory=dict)


EVERYTHING = Grid()


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: The method.
        prune_ratio: r_p; None if the method has none.
        mask_ratio: r_f; None if the method has none.
        seed: The seed.
        settings: The settings that differ from the base recipe.
        recipe: The recipe; None if the settings contradict each other.
        error: Why there is no recipe.
        lr: The learning rate that the grid gives it; None if it has that of the recipe.
        rate_key: The key of the learning rate that counts for the method.
    """

    method: str
    prune_ratio: float | None
    mask_ratio: float | None
    seed: int
    settings: Mapping[str, Any]
    recipe: Recipe | None
    error: str | None = None
    lr: float | None = None
    rate_key: str = rate_axis.LR

    @property
    def rate(self) -> float | None:
        """The learning rate that it trains at; None without a recipe, or if results cannot say it."""
        rate = None if self.recipe is None else rate_axis.rate_of(self.recipe, self.rate_key)
        return None if rate is None or rate > LARGEST else rate

    @property
    def name(self) -> str:
        """The name of its files, as in `recap-rp0.333-rf0.875-lr0.0003-s0`."""
        parts = [quote(self.method, safe="")]
        parts += [f"rp{self.prune_ratio:.12g}"] if self.prune_ratio is not None else []
        parts += [f"rf{self.mask_ratio:.12g}"] if self.mask_ratio is not None else []
        parts += [f"lr{self.lr:.12g}"] if self.lr is not None else []
        return "-".join([*parts, f"s{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs.

    Attributes:
        base: The recipe that all cells start from.
        grid: What the cells vary.
        cells: The cells, in the order of the runs.
        notes: Methods that are left out, and parts of the command that have no effect on these cells.
        held_out: The data that every finished cell is scored on, if any.
    """

    base: Recipe
    grid: Grid
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class _Start:
    """What all cells of a method start from: its recipe with ratios of 0, what was set for it, and its rates."""

    recipe: Recipe
    overrides: Sequence[str]
    rate_key: str
    lrs: Sequence[float | None]


def plan(source: str, overrides: Sequence[str] = (), asked: Grid = EVERYTHING) -> Plan:
    """Return the cells of a comparison.

    Overrides for other methods, and ratios that no method has, give a note and no error. So a command can be repeated with
    other seeds and fewer methods.

    Args:
        source: The recipe.
        overrides: Each `key=value` for all cells, or `method:key=value` for those of one method.
        asked: What the cells are to vary; seeds are 0, 1 and 2 by default.

    Raises:
        UsageError: An override sets what the grid varies, or names an unknown method.
        PluginError: A method is unknown or cannot be loaded, or a recipe names an unknown criterion.
        MissingExtraError: A method that was named, or that of the recipe, needs an extra that is not installed.
        RecipeError: The recipe or an override has problems. Ratios that do not fit make a cell impossible instead.
        ModelError: A folder that the recipe names is missing.
        DataError: A file that the recipe names is missing.
    """
    left_out = {} if asked.methods else _left_out(known_methods())
    loaded = {name: method_of_name(name) for name in asked.methods or known_methods() if name not in left_out}
    for_all, by_method = _split(overrides, loaded)
    for name, lrs in asked.lrs.items():
        if name is not None:
            _refuse_unknown(name, loaded, f"--lrs {rate_axis.text(name, lrs)}", f"--lrs {rate_axis.text(None, lrs)}")
    rates = rate_axis.by_method(asked.lrs, [*loaded, *by_method])
    notes = [
        f"--set {name}:{text}: {name} is not compared" for name in by_method if name not in loaded for text in by_method[name]
    ]
    given = {"prune.ratio": asked.ratios, "mask.ratio": asked.mask_ratios, rate_axis.LR: rates.keys() >= loaded.keys()}
    _refuse_axes(for_all, ["method", "seed", *(key for key, values in given.items() if values)])
    base = recipes.read(source, for_all)
    if base.method in left_out:
        require_extra(base.method)
    _refuse_options(for_all, base.method, loaded)
    prunes, masks = (any(getattr(method, does) for method in loaded.values()) for does in ("prunes", "masks"))
    if asked.ratios and not prunes:
        notes.append(f"--ratios {_listed(asked.ratios)}: none of the methods {', '.join(loaded)} prunes by a ratio")
    if asked.mask_ratios and not masks:
        notes.append(f"--mask-ratios {_listed(asked.mask_ratios)}: none of the methods {', '.join(loaded)} freezes by a ratio")
    notes += rate_axis.notes(asked.lrs, list(loaded))
    grid = Grid(
        tuple(loaded),
        tuple(asked.ratios or [base.prune.ratio]) if prunes else (),
        tuple(asked.mask_ratios or [base.mask.ratio]) if masks else (),
        tuple(asked.seeds or SEEDS),
        {name: rates[name] for name in loaded if name in rates},
    )
    starts = {name: _start(base, name, by_method.get(name, ()), rates.get(name, ())) for name in [*loaded, *by_method]}
    cells = tuple(_cells(grid, loaded, starts))
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
    """Return the names of all registered methods: those of RECAP as in the paper's tables, then third-party ones by name."""
    return sorted(registry.names("methods"), key=place)


def place(method: str) -> tuple[int, str]:
    """Return the key by which methods are sorted."""
    return (ORDER.index(method) if method in ORDER else len(ORDER), method)


def _split(overrides: Sequence[str], methods: Mapping[str, Method]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the overrides for all cells, and by method those of the form `method:key=value`."""
    for_all: list[str] = []
    by_method: dict[str, list[str]] = {}
    for given in overrides:
        method, colon, key = given.partition("=")[0].partition(":")
        if not colon:
            for_all.append(given)
            continue
        _refuse_unknown(method, methods, f"--set {given}", f"--set {key}=…")
        override = given.partition(":")[2]
        _refuse_axes([override], list(AXES))
        by_method.setdefault(method, []).append(override)
    return for_all, by_method


def _refuse_unknown(method: str, methods: Mapping[str, Method], given: str, for_all: str) -> None:
    """Refuse what is `given` for a method that does not exist; the option `for_all` is for every method."""
    if method not in methods and method not in registry.names("methods"):
        raise UsageError(
            f"{given}: there is no method {method or repr(method)}; compared are {', '.join(methods)}",
            hint=f"{for_all} sets it for all of them; `recap plugins` lists the methods",
        )


def _refuse_axes(overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse to set what the grid varies."""
    for given in overrides:
        if (key := given.partition("=")[0].strip()) in keys:
            raise UsageError(
                f"--set {given}: the grid varies {key}", hint=f"name its values with {OPTIONS[key]}, as in {OPTIONS[key]} A,B"
            )


def _refuse_options(overrides: Sequence[str], base_method: str, methods: Mapping[str, Method]) -> None:
    """Refuse options that no cell has: those of the recipe's method, if it is not compared."""
    for given in overrides:
        key = given.partition("=")[0].strip()
        if key.partition(".")[0] == "options" and base_method not in methods:
            raise UsageError(
                f"--set {given}: options of {base_method}, the method of the recipe, which is not compared",
                hint=f"name the method that has them, as in --set {shlex.quote(f'{next(iter(methods))}:{given}')}",
            )


def _listed(ratios: Sequence[float]) -> str:
    return ",".join(f"{ratio:g}" for ratio in ratios)


def _start(base: Recipe, method: str, overrides: Sequence[str], lrs: Sequence[float]) -> _Start:
    """Return what a method's cells start from, with ratios of 0, so that only an override can make it wrong.

    The options of the base recipe belong to its method; other methods start with their defaults.
    """
    values: dict[str, Any] = {"method": method, "prune.ratio": 0.0, "mask.ratio": 0.0}
    values |= {} if method == base.method else {"options": {}}
    start = recipes.changed(base, values)
    start = recipes.parse(recipes.dump(start), f"{base.name}, for {method}", overrides) if overrides else start
    key = rate_axis.key_of(start)
    if lrs:
        _refuse_axes(overrides, [rate_axis.LR, key])
    return _Start(start, overrides, key, lrs or (None,))


def _cells(grid: Grid, methods: Mapping[str, Method], starts: Mapping[str, _Start]) -> Iterator[Cell]:
    """Yield the cells seed by seed, so that a stopped comparison has all methods for some seeds."""
    for seed in grid.seeds:
        for name, method in methods.items():
            for ratio in grid.ratios if method.prunes else (None,):
                for mask_ratio in grid.mask_ratios if method.masks else (None,):
                    for lr in starts[name].lrs:
                        yield _cell(name, (ratio, mask_ratio, lr), seed, starts[name])


def _cell(method: str, place: tuple[float | None, float | None, float | None], seed: int, start: _Start) -> Cell:
    """Return the cell of a method at its r_p, its r_f and its learning rate."""
    ratio, mask_ratio, lr = place
    keys = ("prune.ratio", "mask.ratio", start.rate_key)
    varied = {key: value for key, value in zip(keys, place, strict=True) if value is not None}
    values = start.recipe.model_dump(mode="json")
    overridden = {key: _value(values, key) for key in (given.partition("=")[0].strip() for given in start.overrides)}
    options = {"options": start.recipe.options} if start.recipe.options else {}
    settings = {"method": method, **varied, "seed": seed, **options, **overridden}
    try:
        recipe = recipes.changed(start.recipe, {**varied, "seed": seed})
        round_plans_for(recipe)
    except (RecipeError, PluginError) as error:  # the other cells run all the same
        return Cell(method, ratio, mask_ratio, seed, settings, None, _in_a_line(error.message), lr, start.rate_key)
    return Cell(method, ratio, mask_ratio, seed, settings, recipe, None, lr, start.rate_key)


def _value(values: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = values
    for part in key.split("."):
        value = value[part]
    return value


def _in_a_line(message: str) -> str:
    """Return the problems of a recipe's error in one line, without its heading and its places, which no user has written."""
    lines = [re.sub(r"^\s*(--set )?\S+\s+", "", line) for line in message.splitlines()[1:]]
    return "; ".join(" ".join(line.split()) for line in lines) or message
