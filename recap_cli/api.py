"""All that a plugin may import: the records that plugins are made of, what they are built from, and the errors they may raise.

A name is imported when it is asked for: a plugin that needs no torch, such as a task, imports none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recap_cli.core.adapter import Adapter, Heads, Neurons, find_axes, is_linear, is_transposed
    from recap_cli.core.axes import Axis, Cut, UnitMask, mask_axes
    from recap_cli.core.criterion import Criterion, GroupScores, Losses
    from recap_cli.core.frozen_weight import FrozenWeight
    from recap_cli.core.method import Method, RoundPlan, Settings, TrainContext, TrainerHook
    from recap_cli.core.ragged import Ragged
    from recap_cli.core.rows import rows_of
    from recap_cli.core.surgery import owner_of
    from recap_cli.core.task import IGNORED, Batch, Distillation, LabelColumn, Labels, Metric, Outputs, Target, Task
    from recap_cli.core.ties import names_of
    from recap_cli.errors import DataError, MissingExtraError, ModelError, PluginError
    from recap_cli.tasks.labels import label_numbers, may_be_classes, read_labels, repeats
    from recap_cli.tasks.losses import soft_binary_cross_entropy, soft_cross_entropy, squared_errors

_HOMES = {
    "recap_cli.core.adapter": ("Adapter", "Heads", "Neurons", "find_axes", "is_linear", "is_transposed"),
    "recap_cli.core.axes": ("Axis", "Cut", "UnitMask", "mask_axes"),
    "recap_cli.core.criterion": ("Criterion", "GroupScores", "Losses"),
    "recap_cli.core.frozen_weight": ("FrozenWeight",),
    "recap_cli.core.method": ("Method", "RoundPlan", "Settings", "TrainContext", "TrainerHook"),
    "recap_cli.core.ragged": ("Ragged",),
    "recap_cli.core.rows": ("rows_of",),
    "recap_cli.core.surgery": ("owner_of",),
    "recap_cli.core.task": ("IGNORED", "Batch", "Distillation", "LabelColumn", "Labels", "Metric", "Outputs", "Target", "Task"),
    "recap_cli.core.ties": ("names_of",),
    "recap_cli.errors": ("DataError", "MissingExtraError", "ModelError", "PluginError"),
    "recap_cli.tasks.labels": ("label_numbers", "may_be_classes", "read_labels", "repeats"),
    "recap_cli.tasks.losses": ("soft_binary_cross_entropy", "soft_cross_entropy", "squared_errors"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IGNORED",
    "Adapter",
    "Axis",
    "Batch",
    "Criterion",
    "Cut",
    "DataError",
    "Distillation",
    "FrozenWeight",
    "GroupScores",
    "Heads",
    "LabelColumn",
    "Labels",
    "Losses",
    "Method",
    "Metric",
    "MissingExtraError",
    "ModelError",
    "Neurons",
    "Outputs",
    "PluginError",
    "Ragged",
    "RoundPlan",
    "Settings",
    "Target",
    "Task",
    "TrainContext",
    "TrainerHook",
    "UnitMask",
    "find_axes",
    "is_linear",
    "is_transposed",
    "label_numbers",
    "mask_axes",
    "may_be_classes",
    "names_of",
    "owner_of",
    "read_labels",
    "repeats",
    "rows_of",
    "soft_binary_cross_entropy",
    "soft_cross_entropy",
    "squared_errors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
