"""All that a plugin may import: the records that plugins are made of, and the errors they may raise."""

from recap_cli.core.adapter import Adapter, Heads, Neurons, find_axes, is_linear, is_transposed
from recap_cli.core.axes import Axis, Cut, UnitMask, mask_axes
from recap_cli.core.criterion import Criterion, GroupScores
from recap_cli.core.method import Method, RoundPlan, Settings, TrainContext, TrainerHook
from recap_cli.core.surgery import owner_of
from recap_cli.core.ties import names_of
from recap_cli.errors import ModelError, PluginError

__all__ = [
    "Adapter",
    "Axis",
    "Criterion",
    "Cut",
    "GroupScores",
    "Heads",
    "Method",
    "ModelError",
    "Neurons",
    "PluginError",
    "RoundPlan",
    "Settings",
    "TrainContext",
    "TrainerHook",
    "UnitMask",
    "find_axes",
    "is_linear",
    "is_transposed",
    "mask_axes",
    "names_of",
    "owner_of",
]
