"""Every stage of a state computes with the number of threads that `init` has found for its model."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from recap_cli.runtime import threads
from recap_cli.state import State

P = ParamSpec("P")
R = TypeVar("R")


def on_fitting_threads(stage: Callable[Concatenate[State, P], R]) -> Callable[Concatenate[State, P], R]:
    """The stage, run so. A state that notes no number is older, and computes as it did."""

    @wraps(stage)
    def run(state: State, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with threads.limited(state.manifest.made.get("threads")):
            return stage(state, *args, **kwargs)

    return run
