"""Whether a run came to anything: its product against chance, and against the head that was warmed up before it."""

from collections.abc import Mapping
from typing import Any

from recap_cli.runtime.tasks import is_better
from recap_cli.state import Manifest

TRY = "try another --set finetune.lr=…, a lower --set prune.ratio=…, or more steps (--set finetune.epochs=…), in a new state"


def start_of(manifest: Manifest, metric: str) -> dict[str, float | None]:
    """A metric of the full model with its head warmed up, and of the best answer that is the same for every example.

    None where it is not known: without a warm-up, and in states that are older than these figures.
    """
    return {name: _known(manifest.made.get(key), metric) for name, key in (("warm_up", "warmed_up"), ("chance", "chance"))}


def warning(metric: str, value: float, *, warm_up: float | None, chance: float | None) -> str | None:
    """What is to be said of a product with this value of the metric, and what to try; None where it is a gain."""
    if chance is not None and not is_better(metric, value, chance):
        return f"{metric} {value:.4f} is no better than chance, one answer for every example ({chance:.4f}); {TRY}"
    if warm_up is not None and is_better(metric, warm_up, value):
        return f"{metric} {value:.4f} is worse than what the warmed-up head had before the first round ({warm_up:.4f}); {TRY}"
    return None


def _known(found: Any, metric: str) -> float | None:
    value = found.get(metric) if isinstance(found, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
