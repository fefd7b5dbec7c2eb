"""Figures of a state: the metric and the plan over the rounds, and which units of each layer are kept."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from recap_cli.memory.picture import PAGE, Picture, picture
from recap_cli.memory.plot_bars import Part, Stack, stack_page
from recap_cli.memory.plot_parts import (
    Marks,
    grid,
    legend,
    legend_below,
    legend_height,
    mark,
    megabytes,
    numbers,
    percent,
    y_label,
)
from recap_cli.memory.plot_style import ACCENT, INK, KINDS, LINE, METHODS, PAPER, SOFT, STAGES
from recap_cli.memory.tracker import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Layers = Sequence[Sequence[bool]]  # for each layer, whether each of its units is kept

HEIGHT = 2.9  # inches, of a figure over the rounds, without its legend
PITCH = 19.0  # points from layer to layer
WIDTH = 72 * PAGE.width  # points
FRAME = 14.0  # points, for the space around the layers and their legend
SQUARE = 18.0  # points from square to square, where there is room
FULL = 0.8  # a share that colours a cell so much that the letters in it are those of the page, on white and on dark
BESIDE: Mapping[str, Any] = {"textcoords": "offset points", "va": "center", "color": SOFT}  # a number beside its marks
MOST_TICKS = 10
MOST_POINTS = 300  # of a curve
HELD_KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer")
CHANGES = {
    "coverage": ("visited by updates so far", METHODS["lora-ft"], "-"),
    "overlap": ("kept in the round before too", METHODS["pre-ft"], "--"),
}


def metric_by_round(rows: Sequence[Row], metric: str) -> Picture:
    """Draw the metric after each round, with a square around the best, which is the product."""
    best = "the best, which is the product"
    with picture(PAGE, HEIGHT + legend_height([metric, best], PAGE.width)) as drawn:
        axes = drawn.figure.add_subplot()
        numbers, values = [row["round"] for row in rows], [row["value"] for row in rows]
        texts = [f"round {row['round']}: {row['value']:.4f}" for row in rows]
        mark(drawn, axes, Marks(numbers, values, (), texts), METHODS["recap"], label=PAGE.text(metric), linestyle="-")
        if chosen := [row for row in rows if row["best"]]:
            ring: dict[str, Any] = {
                "marker": "s",
                "markersize": 13,
                "markerfacecolor": "none",
                "color": INK,
                "markeredgewidth": 1.6,
            }
            places, heights = [row["round"] for row in chosen], [row["value"] for row in chosen]
            axes.plot(places, heights, linestyle="none", label=best, clip_on=False, zorder=4, **ring)
        axes.margins(y=0.12)
        _over_rounds(drawn, axes, [row["round"] for row in rows], metric)
    return drawn


def loss_by_step(looks: Mapping[int, Sequence[Row]]) -> Picture | None:
    """Draw the training loss over the steps of all rounds, with a line where a round ends; None without any step.

    Of more than some hundred looks several are drawn as one, at their mean.
    """
    steps, losses, texts, ends = list[int](), list[float](), list[str](), list[int]()
    each = max(1, math.ceil(sum(map(len, looks.values())) / MOST_POINTS))
    for number, seen in looks.items():
        before = ends[-1] if ends else 0
        for at in range(0, len(seen), each):
            together = seen[at : at + each]
            look = {**together[-1], "loss": sum(one["loss"] for one in together) / len(together)}
            steps.append(before + look["step"])
            losses.append(look["loss"])
            texts.append(f"round {number}, step {look['step']:,}: {look['loss']:.4f} at {look['lr']:.1e}")
        ends += [before + seen[-1]["step"]] if seen else []
    if not steps:
        return None
    with picture(PAGE, HEIGHT) as drawn:
        axes = drawn.figure.add_subplot()
        for end in ends[:-1]:
            axes.axvline(end, color=LINE, linewidth=0.8, zorder=1)
        mark(drawn, axes, Marks(steps, losses, (), texts), METHODS["recap"], label=None, linestyle="-", markersize=3.5)
        axes.margins(x=0.02, y=0.1)
        numbers(axes.xaxis, "optimizer steps")
        y_label(drawn, axes, "training loss")
        grid(axes.yaxis)
    return drawn


def change_by_round(rows: Sequence[Row]) -> Picture | None:
    """Draw how much of the full model has been visited, and how much of a plan the one before had; None before the first."""
    known = {key: [row for row in rows if row[key] is not None] for key in CHANGES}
    labels = [label for key, (label, _, _) in CHANGES.items() if known[key]]
    if not labels:
        return None
    with picture(PAGE, HEIGHT + legend_height(labels, PAGE.width)) as drawn:
        axes = drawn.figure.add_subplot()
        for key, (label, look, dash) in CHANGES.items():
            if mine := known[key]:
                texts = [f"round {row['round']}: {row[key]:.1%} {label}" for row in mine]
                marks = Marks([row["round"] for row in mine], [row[key] for row in mine], (), texts)
                mark(drawn, axes, marks, look, label=label, linestyle=dash)
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(percent)
        _over_rounds(drawn, axes, [row["round"] for row in rows], "share")
    return drawn


def kept_squares(layers: Layers) -> Picture:
    """Draw a square for each unit of each layer, kept or pruned, and the number kept."""
    most = max(map(len, layers))
    pitch = min(SQUARE, (WIDTH - 84) / most)
    with _layers(layers, (-0.6, WIDTH / pitch - 0.6)) as drawn:
        (axes,) = drawn.figure.axes
        square: dict[str, Any] = {"marker": "s", "markersize": 0.8 * pitch, "markeredgewidth": 1.0, "linestyle": "none"}
        for at, units in enumerate(layers):
            for keep, label in ((True, "kept"), (False, "pruned")):
                look: dict[str, Any] = {"color": ACCENT} if keep else {"markerfacecolor": "none", "markeredgecolor": SOFT}
                places = [unit for unit, kept in enumerate(units) if kept == keep]
                name = label if at == 0 else None
                (line,) = axes.plot(places, [at] * len(places), label=name, **square, **look)
                drawn.describe(line, [f"layer {at + 1}: {sum(units)} of {len(units)}"])
            axes.annotate(f"{sum(units)} of {len(units)}", (len(units) - 0.5, at), (5, 0), **BESIDE)
        legend_below(drawn, axes)
    return drawn


def kept_bars(layers: Layers) -> Picture:
    """Draw a bar for each layer: how many of its units are kept, and of how many."""
    whole, kept = [len(units) for units in layers], [sum(units) for units in layers]
    with _layers(layers, (0.0, max(whole) / 0.66)) as drawn:
        (axes,) = drawn.figure.axes
        rows = range(len(layers))
        bars = axes.barh(rows, kept, height=0.68, color=ACCENT, label="kept")
        axes.barh(rows, whole, height=0.68, fill=False, edgecolor=SOFT, label="pruned")
        for at, bar in enumerate(bars):
            text = f"{kept[at]:,} of {whole[at]:,}"
            drawn.describe(bar, [f"layer {at + 1}: {text}"])
            axes.annotate(text, (whole[at], at), (6, 0), **BESIDE)
        legend_below(drawn, axes)
    return drawn


def kept_by_round(rows: Sequence[Row], kind: str) -> Picture:
    """Draw a grid of layers by rounds: the fuller the colour, the larger the share that is kept, with the number in it."""
    kept, whole = ([row[key][kind] for row in rows] for key in ("kept", "of"))
    layers = range(len(kept[0]))
    width = min(44.0, (WIDTH - 28) / len(rows))
    with picture(PAGE, (len(layers) * PITCH + 26) / 72) as drawn:
        axes = drawn.figure.add_subplot()
        for at, row in enumerate(rows):
            shares = [kept[at][layer] / whole[at][layer] for layer in layers]
            look: dict[str, Any] = {"color": [(ACCENT, share) for share in shares], "edgecolor": LINE, "linewidth": 1}
            for layer, bar in enumerate(axes.barh(layers, 1.0, left=at, height=1.0, **look)):
                count, of = kept[at][layer], whole[at][layer]
                drawn.describe(bar, [f"round {row['round']}, layer {layer + 1}: {count} of {of}"])
                if width > 7.5 * len(str(of)):
                    colour = PAPER if shares[layer] > FULL else INK
                    axes.text(at + 0.5, layer, str(count), ha="center", va="center_baseline", color=colour)
        every = max(1, math.ceil(20 / width))
        axes.set_xticks([at + 0.5 for at in range(len(rows))][::every], [str(row["round"]) for row in rows][::every])
        axes.xaxis.tick_top()
        axes.set_xlim(0, (WIDTH - 28) / width)
        _name_layers(axes, len(layers), 0.5)
    return drawn


def memory_by_round(rows: Sequence[Row]) -> Picture:
    """Draw what each round held while finetuning, and below it what full finetuning holds."""
    labels = [*(f"round {row['round']}" for row in rows), "full finetuning"]
    sizes = {kind: [*(row[f"{kind}_bytes"] for row in rows), rows[-1][f"full_{kind}_bytes"]] for kind in HELD_KINDS}
    return stack_page(Stack(labels, [Part(KINDS[kind], sizes[kind]) for kind in HELD_KINDS], megabytes), above=False)


def time_by_round(rows: Sequence[Row], text: Callable[[float], str]) -> Picture:
    """Draw the time of each round by stage, with the sums as `text` says them."""
    parts = [
        Part(fill, [row["seconds"].get(stage) or 0.0 for row in rows]) for stage, fill in STAGES.items() if stage != "init"
    ]
    return stack_page(Stack([f"round {row['round']}" for row in rows], parts, text), above=False)


def _over_rounds(drawn: Picture, axes: "Axes", rounds: Sequence[int], what: str) -> None:
    """Name the axes of a figure over the rounds."""
    axes.set_xticks(rounds[:: math.ceil(len(rounds) / MOST_TICKS)])
    pad = 0.04 * (rounds[-1] - rounds[0]) or 0.5
    axes.set_xlim(rounds[0] - pad, rounds[-1] + pad)
    axes.set_xlabel("round")
    y_label(drawn, axes, what)
    grid(axes.yaxis)
    legend(drawn, axes)


@contextmanager
def _layers(layers: Layers, limits: tuple[float, float]) -> Iterator[Picture]:
    """Lend a figure with a row for each layer, from the input on, and these limits of the amount."""
    with picture(PAGE, (len(layers) * PITCH + FRAME) / 72 + legend_height(["kept", "pruned"], PAGE.width)) as drawn:
        axes = drawn.figure.add_subplot()
        yield drawn
        axes.set_xlim(limits)
        axes.xaxis.set_visible(False)
        _name_layers(axes, len(layers))


def _name_layers(axes: "Axes", count: int, edge: float = 0.55) -> None:
    """Number the layers, the first on top, without a frame."""
    axes.set_yticks(range(count), [str(layer + 1) for layer in range(count)])
    axes.set_ylim(count - 1 + edge, -edge)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
