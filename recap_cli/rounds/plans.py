"""What each round of a state does: the rounds that its method gave when the state was made, or those of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import ceil, inf, isclose
from typing import Any, cast, get_args

from recap_cli import extras, registry
from recap_cli.core.method import Method, Option, Plan, RoundPlan, Settings, Trains
from recap_cli.errors import PluginError, RecipeError
from recap_cli.recipe.recipe import Distill, Recipe
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.state.store import Manifest
from recap_cli.tasks.calls import task_named
from recap_cli.untrusted.code import guarded

METHOD_OF_TEACHER = {"lora": "lora-ft", "full": "full-ft"}  # whose training a teacher has that the run finetunes itself
MOST = 10_000  # rounds; what gives more has no end


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe. Raises `PluginError` as `registry.load` does."""
    return method_of_name(recipe.method)


def method_of_name(name: str) -> Method:
    """The method that is registered under a name. Raises `PluginError` as `registry.load` does."""
    return cast(Method, registry.load("methods", name))


def require_extras(recipe: Recipe) -> None:
    """Do nothing if what the method, the teacher and the task of a recipe need is installed. A command asks first.

    Raises:
        MissingExtraError: the extra that brings it is not installed.
        PluginError: there is no such method, or one of them names an extra that recap-cli does not have.
    """
    require_extra(recipe.method)
    if recipe.distill.is_own:
        require_extra(METHOD_OF_TEACHER[recipe.distill.teacher or ""])
    require_extra_of_task(recipe)


def require_extra_of_task(recipe: Recipe) -> None:
    """Do nothing if what the metrics of a recipe's task need is installed.

    Raises:
        MissingExtraError, PluginError: as `require_extras`.
    """
    _require(task_named(recipe.task.kind).extra, f"the task {recipe.task.kind!r}")


def require_extra(name: str) -> None:
    """Do nothing if what the training of the method of this name needs is installed.

    Raises:
        MissingExtraError, PluginError: as `require_extras`.
    """
    _require(method_of_name(name).extra, f"the method {name!r}")


def _require(extra: str | None, who: str) -> None:
    if extra is None:
        return
    if extra not in extras.EXTRAS:
        raise PluginError(
            f"{who} needs the extra {extra!r}, which recap-cli does not have",
            hint=f"its extras are {', '.join(extras.EXTRAS)}; what a plugin needs else, its own package depends on",
        )
    extras.require(extra)


def round_plans_for(recipe: Recipe) -> tuple[RoundPlan, ...]:
    """The rounds that a recipe's method plans for it, after that of a teacher which the run finetunes itself.

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
        restarts=tune.lr_schedule_span == "round",
        hold_plan=int(recipe.rounds * prune.hold_plan + 1e-9),
        ramp=prune.ramp,
        entry_cost=_entry_cost(recipe),
        options=options_of(recipe, method),
    )
    hint = "its rounds(settings) returns the rounds of a run; see docs/plugins/method.md"
    with guarded(f"the method {recipe.method!r} failed", hint):
        try:
            round_plans = tuple(round_plan for round_plan, _ in zip(method.round_plans(settings), range(MOST), strict=False))
        except ValueError as error:  # a plugin's way to refuse a value of its options
            raise RecipeError(f"{recipe.name}: {error}", hint=_options_hint(recipe.method, method)) from error
    if problem := _problem(round_plans, method):
        raise PluginError(f"the method {recipe.method!r}: {problem}", hint="see RoundPlan in docs/plugins/method.md")
    return _after_teacher(recipe.distill, round_plans)


def _after_teacher(distill: Distill, round_plans: tuple[RoundPlan, ...]) -> tuple[RoundPlan, ...]:
    """The rounds of a method, after one in which the full model becomes the teacher, if the run finetunes its own."""
    if not distill.is_own:
        return round_plans
    teacher = RoundPlan(trains="teacher", share=distill.steps_share, embeddings=distill.teacher == "full", product=False)
    return (teacher, *(replace(each, share=each.share * (1.0 - distill.steps_share)) for each in round_plans))


def for_teacher(recipe: Recipe) -> Recipe:
    """A recipe whose run finetunes its own teacher, with the method that trains it, at that method's own options."""
    return recipe.model_copy(update={"method": METHOD_OF_TEACHER[recipe.distill.teacher or ""], "options": {}})


def teaches(round_plan: RoundPlan) -> bool:
    """Whether a round makes the teacher of those after it."""
    return round_plan.trains == "teacher"


def options_of(recipe: Recipe, method: Method) -> dict[str, Option]:
    """The method's options, with the recipe's in the place of the defaults.

    Raises:
        RecipeError: the method has no option of that name, or one of another type.
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


def round_plans_of(manifest: Manifest) -> tuple[RoundPlan, ...]:
    """The rounds of a state, as they were planned when it was made."""
    return tuple(RoundPlan.from_json(round_plan) for round_plan in manifest.made["round_plans"])


def steps_of(round_plans: Sequence[RoundPlan], total: int) -> list[int]:
    """How many of `total` optimizer steps each round takes; rounded so that they add up to the total."""
    ends = [
        round(total * sum(round_plan.share for round_plan in round_plans[: number + 1])) for number in range(len(round_plans))
    ]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _entry_cost(recipe: Recipe) -> float:
    """What a trainable entry holds on the device more than a frozen one, in weights of frozen ones.

    That is its gradient, its moments and, unless the weight is fp32, its master; a code of a quantized one is no longer there.
    """
    tune, weights = recipe.finetune, frozen_weight_of(recipe.finetune.weights)
    moments = 2 if tune.optimizer == "adamw" else int(tune.momentum > 0)
    held_bytes = 0 if tune.fused_backward else 4
    held_bytes += 0 if tune.offload else 4 * moments
    if weights.quantizes:  # with `offload` the trainable entries are on the device in the type of the forward
        return (held_bytes + (weights.dtype.itemsize if tune.offload else 4) - weights.entry_bytes) / weights.entry_bytes
    if not tune.offload and weights.dtype.itemsize < 4:
        held_bytes += 4
    return held_bytes / weights.entry_bytes


def steps_in_round(recipe: Recipe, examples: int) -> int:
    """N_f: the optimizer steps of a round."""
    settings = recipe.finetune
    if settings.steps is not None:
        return settings.steps
    return max(1, round((settings.epochs or 0) * ceil(examples / settings.batch_size)))


def lr_window_of(round_plan: RoundPlan, before: int, steps: int, total: int) -> tuple[int, int]:
    """The steps of the whole learning-rate schedule that a round's `steps` are a window of, and its first step there.

    Where the window is the round's own place among the `total` steps of the run, `before` of which are done, it is that to the
    step.
    """
    start, end = round_plan.lr_window
    if abs(start * total - before) < 1 and abs(end * total - before - steps) < 1:
        return total, before
    whole = round(steps / (end - start))
    return whole, round(start * whole)


def check_steps(round_plans: Sequence[RoundPlan], total: int, recipe: Recipe) -> None:
    """Raise `RecipeError` if a round would take no step of the `total`."""
    if 0 in (each := steps_of(round_plans, total)):
        count = "1 optimizer step is" if total == 1 else f"{total} optimizer steps are"
        raise RecipeError(
            f"{recipe.name}: {count} too few for the {len(round_plans)} rounds of {recipe.method}: round {each.index(0) + 1} "
            "would have none",
            hint="raise rounds, finetune.epochs or finetune.steps",
        )


def _problem(round_plans: Sequence[RoundPlan], method: Method) -> str | None:
    """What is wrong with the rounds of a method, or with its learning rate, or None."""
    if isinstance(method.lr, bool) or not isinstance(method.lr, (int, float)) or not 0 < method.lr < inf:
        return f"has the learning rate {method.lr!r}, which is no number above 0"
    if not 0 < len(round_plans) < MOST:
        return f"gives {'no' if not round_plans else MOST} rounds"
    for number, round_plan in enumerate(round_plans, 1):
        if wrong := _malformed(round_plan) or _wrong(round_plan, round_plans[number - 2] if number > 1 else None, method):
            return f"round {number} {wrong}"
    if not isclose(sum(round_plan.share for round_plan in round_plans), 1.0, rel_tol=1e-6):
        return f"the shares of its rounds add up to {sum(round_plan.share for round_plan in round_plans):g}, not to 1"
    return None if any(round_plan.product for round_plan in round_plans) else "none of its rounds gives the product"


def _malformed(round_plan: Any) -> str | None:
    """What of a round is not what it should be, taken by itself."""
    if not isinstance(round_plan, RoundPlan):
        return f"is of type {type(round_plan).__name__}, not RoundPlan"
    numbers = (round_plan.prune_ratio, round_plan.mask_ratio, round_plan.share, *round_plan.lr_window, round_plan.batch_parts)
    if len(numbers) != 6 or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        return f"has something else than numbers as ratios, share, lr_window or batch_parts: {numbers}"
    start, end = round_plan.lr_window
    if not (
        0 <= round_plan.prune_ratio < 1
        and 0 <= round_plan.mask_ratio < 1
        and round_plan.share > 0
        and type(round_plan.batch_parts) is int
        and 1 <= round_plan.batch_parts < MOST
        and 0 <= start < end <= 1 + 1e-9
    ):
        return (
            f"is out of range: prune_ratio {round_plan.prune_ratio:g}, mask_ratio {round_plan.mask_ratio:g}, "
            f"share {round_plan.share:g}, lr_window {start:g} to {end:g}, batch_parts {round_plan.batch_parts}"
        )
    if not isinstance(round_plan.embeddings, bool) and round_plan.embeddings != "tokens":
        return f"has embeddings={round_plan.embeddings!r}, which is none of True, False, 'tokens'"
    trains = [word for word in get_args(Trains) if word != "teacher"]
    for name, value, known in (("plan", round_plan.plan, get_args(Plan)), ("trains", round_plan.trains, trains)):
        if value not in known:
            return f"has {name}={value!r}, which is none of {', '.join(known)}"
    return None


def _wrong(round_plan: RoundPlan, before: RoundPlan | None, method: Method) -> str | None:
    """What of a round does not go with the one `before` it, or with the method."""
    if round_plan.trains == "training" and method.training is None:
        return "trains what a training says, and the method has none"
    if round_plan.plan != "importance" and before is None:
        return f"has nothing to take a plan from (plan={round_plan.plan!r})"
    if round_plan.plan == "same" and before is not None and round_plan.prune_ratio != before.prune_ratio:
        return f"keeps the plan and says another prune_ratio: {round_plan.prune_ratio:g} after {before.prune_ratio:g}"
    if round_plan.plan == "learned" and before is not None and before.trains != "training":
        return "prunes by scores, and the round before it has no training that learns any"
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
