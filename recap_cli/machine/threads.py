"""How many threads compute on the CPU, so that a run is fast on a busy machine, too.

Threads that share a matrix product wait for each other at a barrier after it. For small products this wait is longer than the
product. On a busy machine it is much longer: a thread spins for another that the system has suspended. Measured on two cores
with a load of 12, a step of the quickstart takes 73 ms with one thread and 1,234 ms with two. The number of threads depends on
the model, not on the load. So the bits of a run do not depend on other programs.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from recap_cli.machine.variables import CORES_DIVIDED, GIVEN, WAITING

SMALL_FLOPS = 32e6  # of the largest product of a step; at 18e6, idle, two threads gain 5 % (the quickstart: 38 s instead of 40)

Forward = Callable[[dict[str, Tensor]], Tensor]


def fitting(model: nn.Module, forward: Forward, batch: dict[str, Tensor], batch_size: int) -> int | None:
    """Return 1 for a model whose products are all small, and None, for all threads, for any other.

    Args:
        model: The model.
        forward: Its forward.
        batch: Some examples.
        batch_size: Examples per step.
    """
    if 2 * batch_size * _largest_weight(model) >= SMALL_FLOPS:  # even with one token per example
        return None
    return 1 if largest_flops(model, forward, batch) * batch_size / len(batch["labels"]) < SMALL_FLOPS else None


def fitting_alone(model: nn.Module) -> int | None:
    """Return the same for a few examples, by the weights alone."""
    return 1 if _largest_weight(model) * 2 * 128 < SMALL_FLOPS else None


def largest_flops(model: nn.Module, forward: Forward, batch: dict[str, Tensor]) -> int:
    """Return the multiplications and additions of the largest matrix product in a forward of `batch`."""
    flops = [0]

    def count(module: nn.Module, _: object, output: object) -> None:
        weight = module.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor):
            width = module.bias.numel() if isinstance(module.bias, Tensor) else weight.shape[0]
            flops.append(2 * weight.numel() * output.numel() // max(1, width))

    hooks = [module.register_forward_hook(count) for module in model.modules() if _multiplies(module)]
    try:
        with torch.inference_mode():
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return max(flops)


@contextmanager
def limited(count: int | None, given: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Limit torch inside to `count` threads, and to the cores of this process's quota.

    A number that the user has set in the environment has priority.
    """
    if is_given(given):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(min(number for number in (count, quota_cores(), before) if number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_given(given: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has set the number of threads."""
    return CORES_DIVIDED not in given and any(given.get(name) for name in GIVEN)


def quota_cores(root: Path = Path("/")) -> int | None:
    """Return how many cores the control group of this process may use, rounded up; None without a limit (Linux).

    Groups above it limit it too: the smallest limit counts.
    """
    limits = [limit for group in _control_groups(root) if (limit := _limit(group)) is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def described(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `threads`, `waiting` and `load` in words, each with its reason."""
    many, quota = torch.get_num_threads(), quota_cores()
    if is_given(given):
        variables = " ".join(f"{name}={given[name]}" for name in GIVEN if given.get(name))
        threads = f"{many} for every model, set by {variables}"
    else:
        most, why = (min(many, quota), f" with a quota of {quota}") if quota else (many, "")
        threads = (
            f"{most} on {_cores()} cores{why}; 1 for models whose largest matrix product has less than "
            f"{SMALL_FLOPS / 1e6:.0f} MFLOP per step: several threads would wait longer than they compute"
        )
    waits = [f"{name}={given[name]}" for name in WAITING if given.get(name)]
    waiting = f"{' '.join(waits)}: how long a thread spins before it sleeps" if waits else "default of the libraries"
    return {"threads": threads, "waiting": waiting, "load": _load()}


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, and of those above them, as far as they are visible.

    In a container, the name may be the one outside, while the visible root is the group itself.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # hidden, or another system
        lines = ["0::/", "1:cpu:/"]
    mount = root / "sys/fs/cgroup"
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if not controllers:  # version 2; `unified` where version 1 has the controllers
            mounts = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [mount / "cpu", mount / controllers]
        else:
            continue
        group = PurePosixPath("" if ".." in name else name.lstrip("/"))
        yield from (place / path for place in mounts for path in (group, *group.parents))


def _limit(group: Path) -> float | None:
    """Return the cores that a control group may use by its own limit, or None."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # not version 2, or not visible
        try:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        except (OSError, ValueError):
            return None
    if not quota.strip().isdigit() or not period.strip().isdigit():  # "max", or −1: no limit
        return None
    return int(quota) / max(1, int(period))


def _largest_weight(model: nn.Module) -> int:
    return max((module.weight.numel() for module in model.modules() if _multiplies(module)), default=0)  # type: ignore[operator]


def _multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: a Linear, or GPT-2's transposed one, but not an embedding."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding) and hasattr(module, "bias")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "not known on this system"
    load, cores = os.getloadavg()[0], _cores()
    busy = "; other programs compute too, and slow down runs" if load > cores else ""
    return f"{load:.1f} processes for {cores} cores (mean of a minute){busy}"
