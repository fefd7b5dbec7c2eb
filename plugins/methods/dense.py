"""Finetuning without pruning: of the whole model, or of its task head."""

from recap_cli.api import Method, RoundPlan, Settings


def whole(_: Settings) -> list[RoundPlan]:
    """Return one round in which everything is trainable."""
    return [RoundPlan(embeddings=True)]


def head(_: Settings) -> list[RoundPlan]:
    """Return one round in which only the task head is trainable."""
    return [RoundPlan(trains="head")]


FULL = Method("Full finetuning: every weight is trainable, nothing is pruned.", whole)
HEAD = Method("Head finetuning: only the task head is trainable, nothing is pruned.", head, lr=3e-3)
