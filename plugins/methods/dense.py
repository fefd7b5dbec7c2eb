"""Finetuning of a model that is not pruned: all of it, or its task head alone."""

from recap_cli.api import Method, Settings, Turn


def whole(_: Settings) -> list[Turn]:
    """One round in which everything moves."""
    return [Turn(embeddings=True)]


def head(_: Settings) -> list[Turn]:
    """One round in which the task head moves."""
    return [Turn(moves="head")]


FULL = Method("Full finetuning: every weight moves, nothing is pruned.", whole)
HEAD = Method("Head finetuning: the task head moves, nothing is pruned.", head)
