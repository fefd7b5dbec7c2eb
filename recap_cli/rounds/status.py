"""Which stage comes next, what a recipe would do, and what a state has done so far. Reads no tensor."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from recap_cli import registry
from recap_cli.core.method import RoundPlan
from recap_cli.errors import DataError, ModelError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.distill import OWN_TEACHERS, SELF
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import record
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.rounds.plans import (
    METHOD_OF_TEACHER,
    check_steps,
    method_of_name,
    require_extras,
    round_plans_for,
    round_plans_of,
    teaches,
)
from recap_cli.rounds.rates import WIDTH
from recap_cli.rounds.verdict import start_of, warning
from recap_cli.state.store import Manifest, State

HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def finished(recipe: Recipe, manifest: Manifest) -> str | None:
    """Why no further round is to begin, or None."""
    rounds, planned = manifest.round, len(round_plans_of(manifest))
    if rounds >= planned:
        return f"all {planned} rounds are done" if planned > 1 else "its one round is done"
    if recipe.patience is not None and manifest.best is not None and _rounds_since_better(recipe, manifest) >= recipe.patience:
        return f"{recipe.task.metric} has not improved for {recipe.patience} rounds; {rounds} of {planned} are done"
    return None


def _rounds_since_better(recipe: Recipe, manifest: Manifest) -> int:
    """How many rounds ago the metric was better than ever before. A tie is not: the best round may be a later one."""
    round_plans, metric = round_plans_of(manifest), recipe.metric
    rounds = [entry for entry in manifest.history if entry["stage"] == "finetune" and round_plans[entry["round"] - 1].product]
    best = max((metric.goodness(entry[metric.name]) for entry in rounds), default=None)
    first = next((entry["round"] for entry in rounds if metric.goodness(entry[metric.name]) == best), 0)
    return int(manifest.round - first)


def next_stage(recipe: Recipe, state: State) -> str | None:
    """The stage that comes next, or None if the last round is merged."""
    stage = state.next_stage()
    return None if stage == "prune" and finished(recipe, state.manifest) else stage


def check(recipe: Recipe) -> None:
    """Look, without reading any data, whether what the recipe names is there: criteria, frozen weights, the model's folder,
    local files, the validation data. Plugins that are not ours are imported.

    Raises:
        PluginError: a method, a criterion or a frozen weight is not registered or cannot be imported.
        RecipeError: the method does not have an option.
        MissingExtraError: the method needs an extra that is not installed.
        ModelError, DataError: a folder, or a file, is missing.
    """
    for name in (recipe.prune.criterion, recipe.mask.criterion):
        if registry.used("criteria", name)["distribution"] != registry.OURS:  # ours would only bring torch, which takes seconds
            registry.load("criteria", name)
    frozen_weight_of(recipe.finetune.weights)
    round_plans_for(recipe)
    require_extras(recipe)
    _check_folder(recipe.model.name, "model.name")
    if recipe.distill.teacher not in (SELF, *OWN_TEACHERS):
        _check_folder(recipe.distill.teacher, "distill.teacher")
    data = recipe.data
    for key, place in (("train", data.train), ("validation", data.validation)):
        if place is not None and not Path(place).exists():
            raise DataError(f"there is no file or folder {place}", hint=f"--set data.{key}=FILE")
    if data.train is not None and data.validation is None and data.validation_share is None:
        raise DataError(
            "the recipe names no validation data", hint="--set data.validation=FILE or --set data.validation_share=0.1"
        )


def _check_folder(name: str | None, key: str) -> None:
    """Refuse a model's name that can be nothing but a folder (as `models.checkpoints` has it), and is none."""
    if name is None or Path(name).expanduser().is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(f"there is no folder {name}", hint=f"--set {key}=DIR, with its config.json and safetensors files")


def describe(recipe: Recipe) -> list[str]:
    """What a run of the recipe would do, a line each, for `--dry-run`. Raises as `check` does."""
    check(recipe)
    data, tune = recipe.data, recipe.finetune
    source = data.name or data.builtin or data.train
    length = f"{tune.steps} steps" if tune.steps is not None else f"{tune.epochs:g} epochs"
    epochs = recipe.head.warmup_epochs
    warm = f"{epochs} epoch{'s' if epochs > 1 else ''} at {recipe.head.lr:g}" if epochs else "not at all"
    round_plans = round_plans_for(recipe)
    head = _head_text(recipe, alone=all(round_plan.trains == "head" for round_plan in round_plans if not teaches(round_plan)))
    if tune.steps is not None:
        check_steps(round_plans, recipe.rounds * tune.steps, recipe)
    fewer = f", fewer after {recipe.patience} without improvement" if recipe.patience else ""
    return [
        f"{recipe.name}: {recipe.task.kind}, best by {recipe.task.metric}, seed {recipe.seed}",
        f"method: {recipe.method}{', the paper’s plain algorithm' if recipe.faithful and recipe.method == 'recap' else ''}",
        f"model: {recipe.model.name or 'random weights from model.config'} ({recipe.model.library})",
        f"data: {source}{f' ({data.subset})' if data.subset else ''}",
        f"init: check the adapter on the model, warm up the head: {warm}",
        *_teacher_text(recipe),
        f"finetuning in all: {recipe.rounds} x {length} of {tune.batch_size} with {tune.optimizer} at {_lr_text(recipe)}{head} "
        f"({tune.schedule}, over {'the run' if tune.lr_schedule_span == 'run' else 'each round'}), {tune.weights} weights",
        f"{len(round_plans)} rounds{fewer}, each prune, mask, finetune, merge:" if len(round_plans) > 1 else "1 round:",
        *_described(recipe, round_plans),
    ]


def _teacher_text(recipe: Recipe) -> Iterator[str]:
    """A line on the teacher, if there is one."""
    distill = recipe.distill
    if distill.teacher is not None:
        words = {SELF: "the model itself, as it is before the first round", **dict.fromkeys(OWN_TEACHERS, "made in round 1")}
        who = words.get(distill.teacher, distill.teacher)
        hidden = f", and hidden states at weight {distill.hidden_weight:g}" if distill.hidden_weight else ""
        yield f"teacher: {who}; {distill.weight:.0%} of the loss, at temperature {distill.temperature:g}{hidden}"


def _own_teacher_text(recipe: Recipe) -> str:
    teacher = recipe.distill.teacher or ""
    rate = _nominal_lr(recipe.distill.teacher_lr, METHOD_OF_TEACHER.get(teacher, recipe.method))
    how = "by LoRA" if teacher == "lora" else "whole"
    return f"the full model becomes the teacher, finetuned {how} at {rate:g}, a block at a time"


def _lr_text(recipe: Recipe) -> str:
    """The rate of a recipe; of `auto` that of its method, which a wide model has less of."""
    rate = f"{_nominal_lr(recipe.finetune.lr, recipe.method):g}"
    return f"{rate} (auto: less where the model is wider than {WIDTH})" if recipe.finetune.lr == "auto" else rate


def _nominal_lr(given: float | str, method: str) -> float:
    return method_of_name(method).lr if isinstance(given, str) else given


def _head_text(recipe: Recipe, *, alone: bool) -> str:
    """The rate of the head, where it has one of its own; whether a checkpoint has a head shows when it is loaded."""
    lr = _nominal_lr(recipe.finetune.lr, recipe.method)
    rate = recipe.head_lr(lr, new=True, alone=alone)
    if rate == lr:
        return ""
    unsure = recipe.model.name is not None and rate != recipe.head_lr(lr, new=False, alone=alone)
    return f", the head{', if it is new,' if unsure else ''} at {rate:g}"


def _described(recipe: Recipe, round_plans: Sequence[RoundPlan]) -> Iterator[str]:
    """A line for each run of rounds that are alike."""
    number = 1
    for text, alike in groupby(round_plans, key=lambda round_plan: _round_plan_text(recipe, round_plan)):
        count = len(list(alike))
        which = f"round {number}" if count == 1 else f"rounds {number} to {number + count - 1}, each"
        yield f"  {which}: {text}"
        number += count


def _round_plan_text(recipe: Recipe, round_plan: RoundPlan) -> str:
    prune, mask = recipe.prune, recipe.mask
    if round_plan.plan == "same":
        pruned = "the same groups as in the round before"
    elif round_plan.plan == "learned":
        pruned = f"prune {round_plan.prune_ratio:.1%} of the prunable parameters by the scores learned"
    elif round_plan.prune_ratio == 0:
        pruned = "prune nothing"
    else:
        averaged = f", averaged over rounds ({prune.ema:g})" if prune.ema else ""
        how = f"{prune.criterion}{averaged}, {prune.scope}, in {prune.steps} steps"
        pruned = f"prune {round_plan.prune_ratio:.1%} of the prunable parameters by {how}"
    if round_plan.prune_ratio > 0 and prune.compensate is not False and round_plan.plan != "learned":
        pruned += ", compensated"
    trains = {
        "head": "the task head is trained",
        "teacher": _own_teacher_text(recipe),
        "training": f"what {recipe.method} names is trained",
        "mask": "everything is trained",
    }[round_plan.trains]
    if round_plan.trains == "mask" and round_plan.mask_ratio > 0:
        drawn = f", {mask.random:.0%} of what is trained at random" if mask.random else ""
        trains = f"{round_plan.mask_ratio:.1%} of what is left frozen by {mask.criterion}, {mask.scope}{drawn}"
    kept = "" if round_plan.product else "; not the product"
    return f"{pruned}; {trains}; {round_plan.share:.1%} of the steps{kept}"


def summary(state: State) -> dict[str, Any]:
    """Where a state stands, as plain values: a row per round, the product, the next stage."""
    record.check(state)
    manifest = state.manifest
    recipe = recipes.parse(state.recipe_text, str(state.path / manifest.recipe))
    start, following = start_of(manifest, recipe.metric.name), next_stage(recipe, state)
    own = recipe.distill.teacher == SELF or recipe.distill.is_own
    judged = {**start, "teacher": None} if own else start  # to be better than oneself is no fault
    ended = manifest.best if following is None else None
    return {
        "recipe": recipe.name,
        "state": str(state.path),
        "stage": manifest.stage,
        "round": manifest.round,
        "method": recipe.method,
        "rounds_planned": len(round_plans_of(manifest)),
        "next": following,
        "finished": finished(recipe, manifest) if manifest.stage == "merge" else None,
        "product": str(state.path / manifest.best["folder"]) if manifest.best else None,
        "best": manifest.best,
        **start,
        "warning": warning(recipe.metric, ended["value"], **judged) if ended else None,
        "seconds": sum(entry["seconds"] for entry in manifest.history),
        "init": manifest.made or None,
        "changes": manifest.changes,
        "rounds": list(_rows(state)),
    }


def _rows(state: State) -> Iterator[dict[str, Any]]:
    by_round: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in state.manifest.history:
        by_round.setdefault(entry["round"], {})[entry["stage"]] = entry
    best, round_plans = (state.manifest.best or {}).get("round"), round_plans_of(state.manifest)
    for number, stages in by_round.items():
        if "prune" in stages:
            yield _row(number, stages, best=number == best) | {"teaches": teaches(round_plans[number - 1])}


def _row(number: int, stages: Mapping[str, Mapping[str, Any]], *, best: bool) -> dict[str, Any]:
    """One round; what belongs to stages that are not done yet is left out."""
    pruned = stages["prune"]
    row: dict[str, Any] = {
        "round": number,
        "best": best,
        "full_parameters": pruned["params_full"],
        "small_parameters": pruned["params_small"],
        "full_prunable": pruned["prunable_full"],
        "small_prunable": pruned["prunable_small"],
        "kept_share": pruned["kept_share_of_prunable"],
        "kept_share_of_all": pruned["params_small"] / pruned["params_full"],
        "kept": pruned["kept"],
        "of": pruned["of"],
        **{kind: pruned["kept"].get(kind, []) for kind in ("heads", "neurons")},
        **{f"full_{kind}": pruned["of"].get(kind, []) for kind in ("heads", "neurons")},
        "seconds": {name: entry["seconds"] for name, entry in stages.items()},
    }
    if found := pruned.get("compensated"):
        row["given_back_share"] = found["given_back_share"]
    if masked := stages.get("mask"):
        row["trainable_share_of_prunable"] = masked.get("trainable_share_of_prunable")
    if tuned := stages.get("finetune"):
        row |= {
            "metric": tuned["metric"],
            "value": tuned[tuned["metric"]],
            "trainable_entries": tuned["trainable"],
            "trainable_share": tuned["trainable"] / pruned["params_small"],
            "steps": tuned["steps"],
            **{name: tuned[name] for name in HELD},
            **{f"full_{name}": tuned["full_finetuning"][name] for name in HELD},
        }
    return row
