"""What a round gives back to the full model (paper, sec. 3.3), and whether its small model is the best so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan

from torch import Tensor

from recap_cli.core.axes import Shape, shapes_of
from recap_cli.core.surgery import IndexMap, compose_index_maps, indices, scatter
from recap_cli.core.task import LOSS, Metric
from recap_cli.progress import Track
from recap_cli.rounds.compensation import without_change
from recap_cli.rounds.record import MOMENTS, PLAN, STATES, TARGETS, TEACHER_FOLDER, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import rule_of, trainable_entries
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.teacher import Taught, ask_own_teacher, check_examples, teacher_notes
from recap_cli.rounds.teacher_outputs import Teacher
from recap_cli.state.store import Transaction
from recap_cli.trainable.moments import put_moments


@dataclass(frozen=True)
class Merged:
    """The models after a round.

    Attributes:
        weights: of the full model, with the trained values in their places.
        moments: of the full model; None where they are not carried.
        small: the tensors of the small model, with the trained values.
        trained: how many entries were trained.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] | None
    small: dict[str, Tensor]
    trained: int


def merge_round(context: Context, folder: str) -> Merged:
    """The trained values and moments of a round in full-model coordinates, eq. (5) and (6).

    The change of a compensated cut is taken off the values, so that the full model stays one that is not cut. The small model
    keeps it.
    """
    plan, weights = context.plan(folder), context.full_weights()
    shapes, small = shapes_of(weights), context.small(folder, plan)
    kept = indices(context.layout.axes, plan, shapes)
    in_small = trainable_entries(context.layout, plan, context.mask(folder, plan), small, context.rows(folder))
    in_full, trained = compose_index_maps(kept, in_small), context.trained(folder, plan, in_small)
    scatter(weights, without_change(trained, context.compensation(folder, plan), in_small), in_full)  # eq. (6)
    moments = None
    if context.recipe.finetune.carry_moments:
        kinds = tuple(rule_of(context.recipe.finetune).idle_decay)
        moments = _moments(context, folder, context.tuned_moments(folder, plan, in_small, kinds), in_full, shapes)
    scatter(small, trained, in_small)
    return Merged(weights, moments, small, sum(tensor.numel() for tensor in trained.values()))


def _moments(
    context: Context, folder: str, tuned: Mapping[str, Tensor], in_full: IndexMap, shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Eq. (5): the moments of trained entries, `tuned` in the round, are written back; all others decay once."""
    idle_decay, token_rows = rule_of(context.recipe.finetune).idle_decay, context.token_rows(folder)
    along = context.layout.along | (token_rows.along() if token_rows else {})
    stored = context.full_moments(tuple(idle_decay))
    return put_moments(stored, tuned, in_full, shapes=shapes, along=along, idle_decay=idle_decay)


def copy_the_rest(context: Context, transaction: Transaction, full: str) -> None:
    """The configuration, tokenizer or processor, layout and buffers stand beside every full model."""
    for rel in context.state.manifest.files:
        name = rel.removeprefix(f"{context.full}/")
        if name != rel and name not in (WEIGHTS, MOMENTS):
            transaction.path(f"{full}/{name}").write_bytes(context.state.verified(rel).read_bytes())


def write_taught(transaction: Transaction, taught: Taught) -> None:
    """Write what a teacher has left for the training examples."""
    transaction.save_tensors(f"{TEACHER_FOLDER}/{TARGETS}", taught.targets.to_tensors())
    if taught.states is not None:
        transaction.save_tensors(f"{TEACHER_FOLDER}/{STATES}", taught.states.to_tensors())


def write_teacher(context: Context, transaction: Transaction, weights: dict[str, Tensor], track: Track) -> None:
    """Write what the full model with these weights gives for the training examples, and note it as the teacher.

    Raises:
        DataError: the training examples are not those that it was trained on.
    """
    model, manifest = context.model(context.full_tensors() | weights), context.state.manifest
    teacher = Teacher(model, context.spec, context.layout.axes, context.splits(track))
    trained_on = next(entry["examples"] for entry in reversed(manifest.history) if entry["stage"] == "finetune")
    check_examples(teacher.splits[0], trained_on)
    taught = ask_own_teacher(context.recipe, teacher, context.metrics(f"round-{transaction.round:03d}"), track)
    write_taught(transaction, taught)
    notes = list(teacher_notes(context.recipe.metric, taught, manifest.made["chance"]))
    transaction.facts |= {"metric": context.recipe.metric.name, "teacher": taught.facts, "notes": notes}


def keep_best(context: Context, transaction: Transaction, tuned: dict[str, Tensor], folder: str) -> None:
    """Make the small model of this round the product if no round before has a better metric, or the same and a lower loss.

    Of rounds that are alike in both the later one counts: it has been trained for longer, on more of the full model.
    """
    if not context.round_plans[transaction.round - 1].product:
        return
    metrics, metric, best = context.metrics(folder), context.recipe.metric, transaction.best
    if best is not None:
        before = context.metrics(f"round-{best['round']:03d}")
        if _rank(metrics, metric) < _rank(before, metric):
            return
    place = f"best-{transaction.round:03d}"
    transaction.save_tensors(f"{place}/{WEIGHTS}", tuned)
    transaction.save_tensors(f"{place}/{PLAN}", as_bytes(context.plan(folder)))
    transaction.set_best(
        {
            "round": transaction.round,
            "metric": metric.name,
            "value": metrics[metric.name],
            "loss": metrics["loss"],
            "folder": place,
        }
    )
    if best is not None:
        transaction.drop(best["folder"])


def _rank(metrics: dict[str, float], metric: Metric) -> tuple[float, float]:
    """What rounds are compared by, more being better: the metric, then the loss. A metric that is no number is the worst."""
    value = metric.goodness(metrics[metric.name])
    return -inf if isnan(value) else value, LOSS.goodness(metrics["loss"])
