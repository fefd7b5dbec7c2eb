"""`merge`: write what moved back into the full model; keep the small model if it is the best so far (paper, sec. 3.3)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recap_cli.core.axes import Shape, shapes_of
from recap_cli.core.surgery import IndexMap, compose_index_maps, gather, indices, scatter
from recap_cli.progress import Track, silent
from recap_cli.rounds.record import MOMENTS, PLAN, SMALL, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import rule_of, trainable_entries
from recap_cli.rounds.status import check_rounds
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State, Transaction
from recap_cli.tasks.task import goodness
from recap_cli.trainable.moments import put_moments


@on_fitting_threads
def merge(state: State, *, track: Track = silent) -> dict[str, Any]:
    """End the round: a new full model and its moments, eq. (5) and (6), and the best small model; return what is best.

    Raises `StageOrderError` if another stage is next.
    """
    context = Context(state)
    with state.writing("merge") as transaction:
        check_rounds(context.recipe, state)
        folder, full = f"round-{transaction.round:03d}", f"full-{transaction.round:03d}"
        plan = context.plan(folder)
        tensors = context.full_weights()
        shapes = shapes_of(tensors)
        small, chosen = context.small(folder, plan), context.mask(folder, plan)
        kept = indices(context.layout.axes, plan, shapes)
        free = trainable_entries(context.layout, plan, chosen, small, context.rows(folder))
        index_map, trained = compose_index_maps(kept, free), context.trained(folder, plan, free)
        scatter(tensors, trained, index_map)  # eq. (6)
        transaction.save_tensors(f"{full}/{WEIGHTS}", tensors)
        if context.recipe.finetune.carry_moments:
            idle_decay = rule_of(context.recipe.finetune).idle_decay
            tuned = context.tuned_moments(folder, plan, free, tuple(idle_decay))
            transaction.save_tensors(f"{full}/{MOMENTS}", _moments(context, folder, tuned, idle_decay, index_map, shapes))
        _copy_the_rest(context, transaction, full)
        if context.round_plans[transaction.round - 1].product:
            _keep_best(
                context, transaction, gather(tensors, kept) | {n: t for n, t in small.items() if n not in tensors}, folder
            )
        transaction.set_full(full)
        transaction.drop(context.full)
        for name in (SMALL, TRAINED, MOMENTS):
            transaction.drop(f"{folder}/{name}")
        transaction.facts |= {
            "trained": sum(t.numel() for t in trained.values()),
            "best_round": (transaction.best or {}).get("round"),
        }
    return state.manifest.history[-1]


def _moments(
    context: Context,
    folder: str,
    found: Mapping[str, Tensor],
    idle_decay: Mapping[str, float],
    index_map: IndexMap,
    shapes: Mapping[str, Shape],
) -> dict[str, Tensor]:
    """Eq. (5): moments of entries that moved, `found` after the round, are written back, all others age once."""
    stored = context.full_moments(tuple(idle_decay))
    token_rows = context.token_rows(folder)
    along = context.layout.along | (token_rows.along() if token_rows else {})
    return put_moments(stored, found, index_map, shapes=shapes, along=along, idle_decay=idle_decay)


def _copy_the_rest(context: Context, transaction: Transaction, full: str) -> None:
    """The configuration, tokenizer or processor, layout and buffers stand beside every full model."""
    for rel in context.state.manifest.files:
        name = rel.removeprefix(f"{context.full}/")
        if name != rel and name not in (WEIGHTS, MOMENTS):
            transaction.path(f"{full}/{name}").write_bytes(context.state.verified(rel).read_bytes())


def _keep_best(context: Context, transaction: Transaction, tuned: dict[str, Tensor], folder: str) -> None:
    """Make the small model of this round the product if no round before has a better metric, or the same and a lower loss.

    Of rounds that are alike in both the later one counts: it has been trained for longer, on more of the full model.
    """
    metrics, metric, best = context.metrics(folder), context.recipe.task.metric, transaction.best
    if best is not None:
        before = context.metrics(f"round-{best['round']:03d}")
        if _rank(metrics, metric) < _rank(before, metric):
            return
    place = f"best-{transaction.round:03d}"
    transaction.save_tensors(f"{place}/{WEIGHTS}", tuned)
    transaction.save_tensors(f"{place}/{PLAN}", as_bytes(context.plan(folder)))
    transaction.set_best(
        {"round": transaction.round, "metric": metric, "value": metrics[metric], "loss": metrics["loss"], "folder": place}
    )
    if best is not None:
        transaction.drop(best["folder"])


def _rank(metrics: dict[str, float], metric: str) -> tuple[float, float]:
    """What rounds are compared by, more being better: the metric, then the loss."""
    return goodness(metric, metrics[metric]), goodness("loss", metrics["loss"])
