"""Whether a run came to anything: its product against chance, and against the head that was warmed up before it."""

from typing import TypedDict

from recap_cli.core.task import Metric
from recap_cli.rounds.record import teacher_of
from recap_cli.state.store import Manifest

TRY = (
    "try another --set finetune.lr=…, more steps (--set finetune.epochs=…) or, where it prunes, a lower --set prune.ratio=…, "
    "in a new state"
)
ROUNDING = 1e-5  # share of a figure: a float32 mean over batches is this near to the same mean in float64


class Start(TypedDict):
    """What a run began with."""

    warm_up: float | None
    chance: float | None
    teacher: float | None


def start_of(manifest: Manifest, metric: str) -> Start:
    """A metric of the full model with its head warmed up, of the best answer that is the same for every example, and of the
    teacher.

    The first is None without a warm-up, the second for a task that does not say it, the third without a teacher. The manifest
    is one that `record.check` has passed.
    """
    warmed_up, chance, teacher = manifest.made.get("warmed_up"), manifest.made.get("chance"), teacher_of(manifest)
    return {
        "warm_up": warmed_up[metric] if warmed_up else None,
        "chance": chance[metric] if chance else None,
        "teacher": teacher["figures"][metric] if teacher else None,
    }


def warning(
    metric: Metric, value: float, *, warm_up: float | None, chance: float | None, teacher: float | None = None
) -> str | None:
    """What is to be said of a product with this value of the metric, and what to try; None where it is a gain."""
    if chance is not None and not metric.goodness(value) > metric.goodness(chance) + ROUNDING * abs(chance):
        return f"{metric.name} {value:.4f} is no better than chance, one answer for every example ({chance:.4f}); {TRY}"
    if warm_up is not None and metric.is_better(warm_up, value):
        return (
            f"{metric.name} {value:.4f} is worse than what the warmed-up head had before the first round ({warm_up:.4f}); {TRY}"
        )
    if teacher is not None and metric.is_better(value, teacher):
        return (
            f"{metric.name} {value:.4f} is better than the teacher's {teacher:.4f}; try a better one, or a lower "
            "--set distill.weight=…, in a new state"
        )
    return None
