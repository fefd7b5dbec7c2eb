"""How long a model of a state takes for a forward, measured on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from recap_cli.core.task import Batch
from recap_cli.models.build import ModelSpec
from recap_cli.rounds.recipe_model import forward_of

WARM_UPS, TIMINGS = 2, 7


def forward_seconds(spec: ModelSpec, models: Sequence[nn.Module], batch: Batch, device: torch.device) -> list[float]:
    """The median seconds of a forward of a batch by each model. They take turns, so that a busy machine is busy for all.

    On a CPU it uses one thread: on a busy machine, several wait for each other (measured: 600 ms instead of 12).
    """
    forwards = [forward_of(spec, model) for model in models]
    with torch.inference_mode(), _one_thread():
        turns = [[_timed(forward, batch, device) for forward in forwards] for _ in range(WARM_UPS + TIMINGS)]
    return [median(of_one) for of_one in zip(*turns[WARM_UPS:], strict=True)]


def measured_on(device: torch.device) -> str:
    """What a latency was measured on, as tables name it."""
    return f"{device}, 1 thread" if device.type == "cpu" else str(device)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timed(forward: Any, batch: Mapping[str, Any], device: torch.device) -> float:
    _wait(device)
    started = perf_counter()
    forward(batch)
    _wait(device)
    return perf_counter() - started


def _wait(device: torch.device) -> None:
    """Return when the device has finished its work."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()
