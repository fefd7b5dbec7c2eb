"""How many threads compute on the CPU, so that a run goes well beside other programs.

Threads that share a product meet at a barrier after it. Where a product takes less time than the meeting, they gain nothing,
and beside other programs they lose much: one waits, spinning, for another that the system has put aside. Measured on two cores
under a load of 12, a step of a model as small as the quickstart's took 73 ms with one thread and 1,234 ms with two. The number
follows from the model and not from the load, so that the bits of a run do not depend on who else computes.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

SMALL_FLOPS = 32e6  # of the largest product of a step; at 18e6, idle, two threads gain 5 % (the quickstart: 38 s instead of 40)
GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SHARED = "RECAP_SHARED_CORES"  # set beside OMP_NUM_THREADS by `recap compare`, which shares the cores among its runs
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

Forward = Callable[[dict[str, Tensor]], Tensor]


def fitting(model: nn.Module, forward: Forward, batch: dict[str, Tensor], batch_size: int) -> int | None:
    """One thread for a model whose products are all small in a step of `batch_size` examples, of which `batch` has some.

    None for any other: as many as there are.
    """
    if 2 * batch_size * _largest_weight(model) >= SMALL_FLOPS:  # with a single token each
        return None
    return 1 if largest_flops(model, forward, batch) * batch_size / len(batch["labels"]) < SMALL_FLOPS else None


def fitting_alone(model: nn.Module) -> int | None:
    """The same where only a few examples are looked at, by the weights."""
    return 1 if _largest_weight(model) * 2 * 128 < SMALL_FLOPS else None


def largest_flops(model: nn.Module, forward: Forward, batch: dict[str, Tensor]) -> int:
    """The multiplications and additions of the largest matrix product in a forward of `batch`."""
    found = [0]

    def look(module: nn.Module, _: object, output: object) -> None:
        weight = module.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor):
            width = module.bias.numel() if isinstance(module.bias, Tensor) else weight.shape[0]
            found.append(2 * weight.numel() * output.numel() // max(1, width))

    handles = [module.register_forward_hook(look) for module in model.modules() if _multiplies(module)]
    try:
        with torch.inference_mode():
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return max(found)


@contextmanager
def limited(count: int | None, given: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Inside, torch computes with no more threads than `count`, and than the cores that a quota leaves this process.

    A number that the user has given in the environment stands.
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
    """Whether the user has said how many threads there are to be."""
    return SHARED not in given and any(given.get(name) for name in GIVEN)


def quota_cores(root: Path = Path("/")) -> int | None:
    """How many cores' time the control group of this process may use, rounded up; None where there is no limit (Linux).

    A group is limited by those above it, too: the least limit counts.
    """
    limits = [limit for group in _control_groups(root) if (limit := _limit(group)) is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def described(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What was chosen here and why, in words: `threads`, `waiting` and `load`."""
    many, quota = torch.get_num_threads(), quota_cores()
    if is_given(given):
        said = " ".join(f"{name}={given[name]}" for name in GIVEN if given.get(name))
        threads = f"{many} for every model, as {said} says"
    else:
        most, why = (min(many, quota), f", of which the quota leaves {quota}") if quota else (many, "")
        threads = (
            f"{most} on {_cores()} cores{why}; 1 for models whose largest matrix product takes less than "
            f"{SMALL_FLOPS / 1e6:.0f} MFLOP a step, for which several threads wait more than they compute"
        )
    waits = [f"{name}={given[name]}" for name in WAITING if given.get(name)]
    waiting = f"{' '.join(waits)}: how long a thread spins before it sleeps" if waits else "as the libraries have it"
    return {"threads": threads, "waiting": waiting, "load": _load()}


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, and of those above them, as far as they can be seen.

    A container may be told the name that its group has outside, and sees the group itself as the topmost one.
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
    """The cores' time that a control group may use by its own limit, or None."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # not version 2, or no group that can be seen
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
    """Whether a module multiplies by a matrix: a Linear, or GPT-2's transposed one; an embedding looks up."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding) and hasattr(module, "bias")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "not known on this system"
    load, cores = os.getloadavg()[0], _cores()
    busy = "; other programs compute too, and runs take longer" if load > cores else ""
    return f"{load:.1f} processes want {cores} cores (mean of a minute){busy}"
