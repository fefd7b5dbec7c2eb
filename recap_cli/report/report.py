"""`report`: what a state, or the results of `recap compare`, have to say, on one page. Computes no gradients.

A state keeps the plan and the mask of each round, so how much the plan changes and how much of the full model has been
visited are computed here, afterwards, and exactly: each prunable parameter belongs to one fine group.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recap_cli.compare import schema
from recap_cli.compare.schema import RESULTS
from recap_cli.core.axes import (
    Axis,
    Shape,
    UnitMask,
    chosen_params,
    compose,
    in_mask_units,
    kinds_of,
    mask_axes,
    prunable_params,
)
from recap_cli.errors import CorruptStateError, RecapError, StateError, StorageError, UsageError, lacks_device_memory
from recap_cli.progress import Track, silent
from recap_cli.report import pages
from recap_cli.report.map_examples import MapExamples, map_examples
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.plans import teaches
from recap_cli.rounds.record import WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import summary
from recap_cli.state.manifest import COMMIT, UNDER_WAY, quoted
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named

PAGE = "report.html"
Say = Callable[[str], None]


def report(source: Path, out: Path | None = None, say: Say = lambda _: None, track: Track = silent) -> Path:
    """Write the page of a state's folder, or of results (the file, or the folder it is in); returns where.

    Args:
        source: a state's folder, or results.
        out: the page.
        say: hears what a user should know.
        track: hears of progress, where models are asked for pictures.

    Raises:
        StateError: there is neither, or a state that cannot be used.
        DataError: results that make no sense, or of another schema.
        UsageError: `out` exists already, and is no page of ours.
        StorageError: `out` cannot be written.
    """
    kind = _kind(source)
    place = out if out is not None else (source if source.is_dir() else source.parent) / PAGE
    _check_out(place)
    return _written(place, _state_text(source, say, track) if kind == "state" else pages.results_page(schema.read(source)))


def _state_text(source: Path, say: Say, track: Track) -> str:
    """The page of a state. Without its data or its models it has no pictures, and says why."""
    state = State.open(source)
    found = of_state(state)
    if found["looks_note"] is not None:
        say(f"note: the page has no training loss: {found['looks_note']}")
    maps, why = _map_examples(state, track)
    if why is not None:
        say(f"note: the page has no pictures: {why}")
    return pages.state_page({**found, "maps": maps, "maps_note": why})


def _map_examples(state: State, track: Track) -> tuple[MapExamples | None, str | None]:
    """The examples of a state whose task predicts label maps, once it has a product; or why they cannot be had."""
    if state.manifest.best is None or task_named(Context(state).recipe.task.kind).maps_of is None:
        return None, None
    try:
        return map_examples(state, track), None
    except RecapError as error:  # the rest of the page needs neither data nor models
        why = error.message
    except Exception as error:  # of torch, and of no type of ours
        if not lacks_device_memory(error):
            raise
        why = "the memory of the device is too small to run the models"
    return None, " ".join(why.split())


def report_joined(sources: Sequence[Path], out: Path | None) -> Path:
    """Write one page of the results of several comparisons, each a file or the folder it is in; returns where.

    Raises:
        StateError: one of them does not exist.
        DataError: as in `report`.
        UsageError: as in `report`; one is a state, or named twice, or there is no `out`.
        StorageError: `out` cannot be written.
    """
    files = [source / RESULTS if source.is_dir() else source for source in sources]
    for number, source in enumerate(sources):
        if _kind(source) == "state":
            raise UsageError(
                f"{source}: is a state, and several are joined only if all are comparisons",
                hint=f"recap report {quoted(source)} writes a page of the state alone",
            )
        if any(files[number].samefile(before) for before in files[:number]):
            raise UsageError(f"{source}: is named twice", hint="name each comparison once")
    if out is None:
        raise UsageError(
            "a page of several comparisons belongs to no folder of theirs", hint=f"say where it goes: --out {PAGE}"
        )
    _check_out(out)
    return _written(out, pages.joined_results_page([schema.read(source) for source in sources]))


def _written(place: Path, text: str) -> Path:
    """Write a page and return its place. Raises `StorageError` if it cannot be written."""
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(place, error.strerror or str(error)) from error
    return place


def of_state(state: State) -> dict[str, Any]:
    """All that the page of a state shows, as plain values. Raises `CorruptStateError` if a plan or a mask was altered."""
    context, manifest = Context(state), state.manifest
    found = summary(state)
    changes = list(_changes(context, [row["round"] for row in found["rounds"]]))
    rounds = [row | change for row, change in zip(found["rounds"], changes, strict=True)]
    tuned = {entry["round"]: entry for entry in manifest.history if entry["stage"] == "finetune"}
    product, task = (manifest.best or {}).get("folder"), context.objective.task
    scored = {number: context.metrics(f"round-{number:03d}") for number in tuned}
    declared = {metric.name for metric in task.all_metrics}
    return found | {
        "rounds": rounds,
        "method": context.recipe.method,
        "metric": context.recipe.task.metric,
        "task": context.recipe.task.kind,
        "metrics": {
            at: {name: value for name, value in all_of_it.items() if name in declared} for at, all_of_it in scored.items()
        },
        "label_figures": task.figures_by_label(scored[manifest.best["round"]]) if manifest.best else {},
        "labels": list(context.objective.labels),
        **_looks(context, tuned),
        "memory": {number: context.memory(f"round-{number:03d}") for number in tuned},
        "picture": _picture(context, rounds),
        "full_bytes": _bytes(manifest.files, manifest.full),
        "product_bytes": _bytes(manifest.files, product),
        "recipe_text": state.recipe_text,
        "digest": manifest.recipe_digest,
        "versions": manifest.versions,
        "plugins": manifest.plugins.get("used", []),
        "as_of": manifest.history[-1]["finished"],
    }


def _looks(context: Context, numbers: Iterable[int]) -> dict[str, Any]:
    """The losses of the steps of each round; without a file of them, which nothing else needs, none, and why."""
    try:
        return {"looks": {number: context.looks(f"round-{number:03d}") for number in numbers}, "looks_note": None}
    except CorruptStateError as error:
        return {"looks": {}, "looks_note": error.message}


def overlap(axes: Sequence[Axis], shapes: Mapping[str, Shape], before: UnitMask, now: UnitMask) -> float | None:
    """The share of the prunable parameters kept `now` that were kept `before` too; None if nothing is kept."""
    kept = chosen_params(axes, shapes, now)
    both = {name: chosen & before[name] for name, chosen in now.items()}
    return chosen_params(axes, shapes, both) / kept if kept else None


def visited(axes: Sequence[Axis], plan: UnitMask, mask: UnitMask, whole: Collection[str] = ()) -> UnitMask:
    """The groups of the mask in the full model (of `mask_axes`) that a round trains: `mask` is that of the small one.

    `plan` has a boolean per unit of the full model, `mask` one per hidden dimension that the plan leaves; `whole` are the
    parameters that no unit of a mask owns.
    """
    return compose(in_mask_units(axes, plan, whole), mask)


def _changes(context: Context, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """For each round: `overlap` with the round before, and `coverage`, the share of the full model's prunable parameters that
    updates have visited up to its end.

    None where it is not known: in the first round, before finetuning, and where a method trains what no mask says.
    """
    if not numbers:
        return
    layout: Layout = context.layout
    fine = mask_axes(layout.axes, layout.whole)
    prunable = prunable_params(fine, layout.shapes)
    seen: UnitMask | None = {axis.name: torch.zeros(axis.size, dtype=torch.bool) for axis in fine}
    before: UnitMask | None = None
    for number in numbers:
        if teaches(context.round_plans[number - 1]):  # it prunes and masks nothing
            yield {"overlap": None, "coverage": None}
            continue
        plan = context.plan(f"round-{number:03d}")
        trained = _trained(context, number, plan)
        seen = None if seen is None or trained is None else {name: seen[name] | trained[name] for name in seen}
        share = chosen_params(fine, layout.shapes, seen) / prunable if seen is not None and prunable else None
        same = None if before is None else overlap(layout.axes, layout.shapes, before, plan)
        yield {"overlap": same, "coverage": share}
        before = plan


def _trained(context: Context, number: int, plan: UnitMask) -> UnitMask | None:
    """The fine groups that a round has trained, or None where it has not yet, or where no mask says which."""
    done = {entry["stage"] for entry in context.state.manifest.history if entry["round"] == number}
    if "finetune" not in done or context.round_plans[number - 1].trains == "training":
        return None
    layout = context.layout
    return visited(layout.axes, plan, context.mask(f"round-{number:03d}", plan), layout.whole)


def _picture(context: Context, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The plan of the best round, or of the newest if none is merged: for each kind and layer, which units are kept."""
    if not rounds:
        return None
    number = next((row["round"] for row in rounds if row["best"]), rounds[-1]["round"])
    plan = context.plan(f"round-{number:03d}")
    axes = context.layout.axes
    kept = {kind: [plan[axis.name].tolist() for axis in axes if axis.kind == kind] for kind in kinds_of(axes)}
    return {"round": number, "kept": kept}


def _bytes(files: Mapping[str, Any], folder: str | None) -> int | None:
    """The size of the weights in a folder of the state."""
    checksum = files.get(f"{folder}/{WEIGHTS}")
    return checksum.bytes if checksum else None


def _kind(source: Path) -> str:
    """Whether a path is a state or results. Raises `StateError` if it is neither."""
    if source.is_dir() and ((source / COMMIT).exists() or (source / UNDER_WAY).exists()):
        return "state"
    if source.is_file() or (source / RESULTS).exists():
        return "results"
    what = f"has neither {COMMIT} nor {RESULTS}" if source.is_dir() else "there is no such file or folder"
    raise StateError(
        f"{source}: {what}",
        hint="name the folder of a state (recap run RECIPE --state DIR makes one), or the results.json of `recap compare`",
    )


def _check_out(place: Path) -> None:
    """Refuse a page's place that holds something else, or that is in no folder."""
    if place.is_dir():
        raise UsageError(f"{place}: is a folder", hint=f"name a file in it: --out {quoted(place / PAGE)}")
    if not place.parent.is_dir():
        raise StorageError(f"{place} cannot be written: there is no folder {place.parent}", hint="make it first")
    if not place.exists():
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise _unwritable(place, f"nothing may be written to {place.parent}")
        return
    if not place.is_file():  # a pipe or a device, which would wait to be read
        raise UsageError(f"{place}: is no plain file", hint="name another file with --out")
    try:
        with place.open("rb") as file:
            ours = pages.MARK.encode() in file.read(pages.MARK_WITHIN_BYTES)
    except OSError as error:
        raise _unwritable(place, error.strerror or str(error)) from error
    if not ours:
        raise UsageError(f"{place} exists already, and `recap report` has not made it", hint="name another file with --out")


def _unwritable(place: Path, why: str) -> StorageError:
    return StorageError(f"{place} cannot be written: {why}", hint="name a file in a folder you may write to: --out FILE")
