"""Finetuning of a model that is not pruned: all of it, or its task head alone."""

from recap_cli.api import Method, RoundPlan, Settings


def whole(_: Settings) -> list[RoundPlan]:
    """One round in which everything moves."""
    return [RoundPlan(embeddings=True)]


def head(_: Settings) -> list[RoundPlan]:
    """One round in which the task head moves."""
    return [RoundPlan(trains="head")]


FULL = Method("Full finetuning: every weight moves, nothing is pruned.", whole)
HEAD = Method("Head finetuning: the task head moves, nothing is pruned.", head)
