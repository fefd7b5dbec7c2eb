"""All that a plugin may import: the records that a criterion or an adapter is made of, and the errors it may raise."""

from recap_cli.core.adapter import Adapter, Heads, Neurons, find_axes, is_transposed
from recap_cli.core.criterion import Criterion, GroupScores
from recap_cli.core.groups import Axis, Choice, Cut, refine
from recap_cli.errors import ModelError, PluginError

__all__ = [
    "Adapter",
    "Axis",
    "Choice",
    "Criterion",
    "Cut",
    "GroupScores",
    "Heads",
    "ModelError",
    "Neurons",
    "PluginError",
    "find_axes",
    "is_transposed",
    "refine",
]
