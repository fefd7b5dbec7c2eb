"""`merge`: write what moved back into the full model; keep the small model if it is the best so far (paper, sec. 3.3)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recap_cli.core.axes import Shape, shapes_of
from recap_cli.core.surgery import Where, compose_where, gather, indices, scatter
from recap_cli.progress import Track, silent
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Context
from recap_cli.rounds.small_model import moving, rule_of
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import Draft, State
from recap_cli.tasks.task import goodness
from recap_cli.trainable.moments import COUNT, put_moments


@on_fitting_threads
def merge(state: State, *, track: Track = silent) -> dict[str, Any]:
    """End the round: a new full model and its moments, eq. (5) and (6), and the best small model; return what is best.

    Raises `StageOrderError` if another stage is next.
    """
    here = Context(state)
    with state.writing("merge") as draft:
        shared.check_rounds(here)
        folder, full = f"round-{draft.round:03d}", f"full-{draft.round:03d}"
        plan = here.plan(folder)
        tensors = here.full_weights()
        shapes = shapes_of(tensors)
        small, chosen = here.small(folder, plan), here.mask(folder, plan)
        kept = indices(here.layout.axes, plan, shapes)
        free = moving(here.layout, plan, chosen, small, here.rows(folder))
        where, moved = compose_where(kept, free), here.moved(folder, plan, free)
        scatter(tensors, moved, where)  # eq. (6)
        draft.save_tensors(f"{full}/{shared.WEIGHTS}", tensors)
        if here.recipe.finetune.carry_moments:
            aging = rule_of(here.recipe.finetune).aging
            tuned = here.tuned_moments(folder, plan, free, tuple(aging))
            draft.save_tensors(f"{full}/{shared.MOMENTS}", _moments(here, folder, tuned, aging, where, shapes))
        _copy_the_rest(here, draft, full)
        if here.turns[draft.round - 1].product:
            _keep_best(here, draft, gather(tensors, kept) | {n: t for n, t in small.items() if n not in tensors}, folder)
        draft.set_full(full)
        draft.drop(here.full)
        for name in (shared.SMALL, shared.MOVED, shared.MOMENTS):
            draft.drop(f"{folder}/{name}")
        draft.facts |= {"moved": sum(t.numel() for t in moved.values()), "best_round": (draft.best or {}).get("round")}
    return state.manifest.history[-1]


def _moments(
    here: Context,
    folder: str,
    found: Mapping[str, Tensor],
    aging: Mapping[str, float],
    where: Where,
    shapes: Mapping[str, Shape],
) -> dict[str, Tensor]:
    """Eq. (5): moments of entries that moved, `found` after the round, are written back, all others age once."""
    stored = here.full_moments(tuple(aging))
    tuned: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name, _, moment = key.rpartition("/")
        if moment == COUNT:
            counts[name] = tensor
        else:
            tuned.setdefault(name, {})[moment] = tensor
    vocabulary = here.vocabulary(folder)
    along = here.layout.along | (vocabulary.along() if vocabulary else {})
    return put_moments(stored, tuned, counts, where, shapes=shapes, along=along, aging=aging)


def _copy_the_rest(here: Context, draft: Draft, full: str) -> None:
    """The configuration, tokenizer or processor, layout and buffers stand beside every full model."""
    for rel in here.state.manifest.files:
        name = rel.removeprefix(f"{here.full}/")
        if name != rel and name not in (shared.WEIGHTS, shared.MOMENTS):
            draft.path(f"{full}/{name}").write_bytes(here.state.verified(rel).read_bytes())


def _keep_best(here: Context, draft: Draft, tuned: dict[str, Tensor], folder: str) -> None:
    """Make the small model of this round the product if no round before has a better metric, or the same and a lower loss.

    Of rounds that are alike in both the later one counts: it has been trained for longer, on more of the full model.
    """
    metrics, metric, best = here.metrics(folder), here.recipe.task.metric, draft.best
    if best is not None:
        before = here.metrics(f"round-{best['round']:03d}")
        if _rank(metrics, metric) < _rank(before, metric):
            return
    place = f"best-{draft.round:03d}"
    draft.save_tensors(f"{place}/{shared.WEIGHTS}", tuned)
    draft.save_tensors(f"{place}/{shared.PLAN}", shared.as_bytes(here.plan(folder)))
    draft.set_best({"round": draft.round, "metric": metric, "value": metrics[metric], "loss": metrics["loss"], "folder": place})
    if best is not None:
        draft.drop(best["folder"])


def _rank(metrics: dict[str, float], metric: str) -> tuple[float, float]:
    """What rounds are compared by, more being better: the metric, then the loss."""
    return goodness(metric, metrics[metric]), goodness("loss", metrics["loss"])
