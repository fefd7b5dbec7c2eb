"""Whether a run came to anything: its product against chance, and against the head that was warmed up before it."""

from typing import TypedDict

from recap_cli.core.task import Metric
from recap_cli.state.store import Manifest

TRY = (
    "try another --set finetune.lr=…, more steps (--set finetune.epochs=…) or, where it prunes, a lower --set prune.ratio=…, "
    "in a new state"
)
ROUNDING = 1e-5  # share of a loss: a float32 mean over batches is this near to the same mean in float64


class Start(TypedDict):
    """What a run began with."""

    warm_up: float | None
    chance: float | None


def start_of(manifest: Manifest, metric: str) -> Start:
    """A metric of the full model with its head warmed up, and of the best answer that is the same for every example.

    The former is None without a warm-up, the latter for a task that does not say it. The manifest is one that `record.check`
    has passed.
    """
    warmed_up = manifest.made.get("warmed_up")
    chance = manifest.made["chance"]
    return {"warm_up": warmed_up[metric] if warmed_up else None, "chance": chance[metric] if chance else None}


def warning(metric: Metric, value: float, *, warm_up: float | None, chance: float | None) -> str | None:
    """What is to be said of a product with this value of the metric, and what to try; None where it is a gain."""
    rounding = ROUNDING if metric.better == "less" else 0.0  # metrics of counts are computed alike, to the bit
    if chance is not None and not metric.is_better(value, chance * (1 - rounding)):
        return f"{metric.name} {value:.4f} is no better than chance, one answer for every example ({chance:.4f}); {TRY}"
    if warm_up is not None and metric.is_better(warm_up, value):
        return (
            f"{metric.name} {value:.4f} is worse than what the warmed-up head had before the first round ({warm_up:.4f}); {TRY}"
        )
    return None
