"""Every stage of a state computes with the number of threads that `init` has found for its model."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from recap_cli.machine import threads
from recap_cli.rounds import record
from recap_cli.state.store import State

P = ParamSpec("P")
R = TypeVar("R")


def on_fitting_threads(stage: Callable[Concatenate[State, P], R]) -> Callable[Concatenate[State, P], R]:
    """The stage, run so. Raises `CorruptStateError`, as every stage, where the record of the state is none of ours."""

    @wraps(stage)
    def run(state: State, /, *args: P.args, **kwargs: P.kwargs) -> R:
        record.check(state)
        with threads.limited(state.manifest.made["threads"]):
            return stage(state, *args, **kwargs)

    return run
