"""What NVML, the NVIDIA driver's own library, says of a device: who holds how much of it. A courtesy that never stops a run.

Torch's allocator knows its own bytes. What other processes hold, and what this one holds beside the allocator (the CUDA
context, libraries), only the driver knows; and it may be missing, refuse, or, in a container, count processes of which this one
knows no id. Then the figures are None, and a sentence says why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Processes:
    """Bytes that this process, and that all others together, hold on one device; None where that cannot be known.

    `not_seen` says, in a sentence each, what is not known and why.
    """

    own_bytes: int | None = None
    others_bytes: int | None = None
    not_seen: tuple[str, ...] = ()


def driver() -> tuple[str | None, str | None]:
    """The version of the driver and None, or None and a sentence that says why NVML does not tell."""
    try:
        with _library() as pynvml:
            return str(pynvml.nvmlSystemGetDriverVersion()), None
    except Exception as error:  # noqa: BLE001  (whatever a driver may do, it is no error of ours)
        return None, f"NVML says nothing: {_reason(error)}"


def processes(device: torch.device) -> Processes:
    """Who holds what on a CUDA device, as NVML has it."""
    try:
        with _library() as pynvml:
            handle = _handle(pynvml, device)
            held = _held(pynvml, handle)
        least = torch.cuda.memory_reserved(device)
    except Exception as error:  # noqa: BLE001  (as in `driver`)
        return Processes(not_seen=(f"what processes hold on {device}: NVML says nothing ({_reason(error)})",))
    return _split(device, held, os.getpid(), least)


def _split(device: torch.device, held: dict[int, int | None], own: int, least: int) -> Processes:
    """The bytes of the process `own`, which torch says holds at `least` so many, and those of the others."""
    if own not in held or (held[own] or least) < least:  # with less, it is another process that has the id on the host
        among = f"the {len(held)} processes that NVML lists" if held else "those that NVML lists (none)"
        why = "in a container it counts by ids of the host, or hides other processes"
        return Processes(not_seen=(f"what processes hold on {device}: this one is not among {among}; {why}",))
    others = [count for process, count in held.items() if process != own]
    known = [count for count in others if count is not None]
    not_seen = []
    if held[own] is None:
        not_seen.append(f"what this process holds on {device} in all: NVML lists it without bytes")
    if len(known) < len(others):
        not_seen.append(
            f"what other processes hold on {device}: NVML lists {len(others) - len(known)} of {len(others)} without bytes"
        )
    return Processes(held[own], sum(known) if len(known) == len(others) else None, tuple(not_seen))


def _held(pynvml: Any, handle: Any) -> dict[int, int | None]:
    """Bytes by process id, None where the driver does not say. One that both computes and draws is listed twice."""
    listed = list(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    with suppress(pynvml.NVMLError):  # cards that cannot draw may refuse the question
        listed += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    held: dict[int, int | None] = {}
    for process in listed:
        known = [count for count in (held.get(process.pid), process.usedGpuMemory) if count is not None]
        held[process.pid] = max(known) if known else None
    return held


def _handle(pynvml: Any, device: torch.device) -> Any:
    """NVML's handle of the device that torch means: by UUID, else by its place on the PCI bus.

    Not by number: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER renumber torch's devices, and not NVML's.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types know only some of its attributes
    uuid = str(getattr(properties, "uuid", "") or "").removeprefix("GPU-").removeprefix("MIG-")
    if uuid:
        for prefix in ("GPU-", "MIG-"):  # torch leaves out which of the two it is
            with suppress(pynvml.NVMLError):
                return pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
    if hasattr(properties, "pci_bus_id"):
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return pynvml.nvmlDeviceGetHandleByPciBusId(place)
    raise LookupError("torch gives no UUID and no PCI bus id, by which NVML would know the device")


@contextmanager
def _library() -> Iterator[Any]:
    """The package, with the library of the driver loaded."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "the package nvidia-ml-py is not installed"
    return str(error) or type(error).__name__
