"""Which processes hold how much of a device, from NVML, the library of the NVIDIA driver. It never stops a run.

Only the driver knows what other processes hold, and what this one holds outside torch's allocator (the CUDA context,
libraries). NVML may be missing or refuse. In a container it may list processes with ids of the host. Figures that are unknown
are None, with a sentence that gives the reason.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Processes:
    """Bytes that this process, and all others together, hold on one device; None if unknown.

    `not_seen` has a sentence for each unknown figure.
    """

    process_bytes: int | None = None
    others_bytes: int | None = None
    not_seen: tuple[str, ...] = ()


def driver() -> tuple[str | None, str | None]:
    """Return the version of the driver and None, or None and why NVML does not answer."""
    try:
        with _library() as pynvml:
            return str(pynvml.nvmlSystemGetDriverVersion()), None
    except Exception as error:  # noqa: BLE001  (a run does not need the driver's facts)
        return None, f"NVML does not answer: {_reason(error)}"


def processes(device: torch.device) -> Processes:
    """Return what processes hold on a CUDA device, by NVML."""
    try:
        with _library() as pynvml:
            handle = _handle(pynvml, device)
            held = _held(pynvml, handle)
        least = torch.cuda.memory_reserved(device)
    except Exception as error:  # noqa: BLE001  (as in `driver`)
        return Processes(not_seen=(f"what processes hold on {device}: NVML does not answer ({_reason(error)})",))
    return _split(device, held, os.getpid(), least)


def _split(device: torch.device, held: dict[int, int | None], pid: int, least: int) -> Processes:
    """Return the bytes of this process, whose id is `pid`, and those of all others.

    Args:
        device: The device, for messages.
        held: The bytes by process id.
        pid: The id of this process.
        least: The bytes that torch has reserved for this process. A process with fewer is another one, with an id of the host.
    """
    if pid not in held or (held[pid] or least) < least:
        among = f"the {len(held)} processes that NVML lists" if held else "those that NVML lists (none)"
        why = "in a container it counts by ids of the host, or hides other processes"
        return Processes(not_seen=(f"what processes hold on {device}: this one is not among {among}; {why}",))
    others = [count for process, count in held.items() if process != pid]
    known = [count for count in others if count is not None]
    not_seen = []
    if held[pid] is None:
        not_seen.append(f"what this process holds on {device} in total: NVML lists it without bytes")
    if len(known) < len(others):
        not_seen.append(
            f"what other processes hold on {device}: NVML lists {len(others) - len(known)} of {len(others)} without bytes"
        )
    return Processes(held[pid], sum(known) if len(known) == len(others) else None, tuple(not_seen))


def _held(pynvml: Any, handle: Any) -> dict[int, int | None]:
    """Return the bytes by process id, None if the driver gives none. NVML lists a process that computes and draws twice."""
    listed = list(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    with suppress(pynvml.NVMLError):  # cards without graphics may refuse
        listed += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    held: dict[int, int | None] = {}
    for process in listed:
        known = [count for count in (held.get(process.pid), process.usedGpuMemory) if count is not None]
        held[process.pid] = max(known) if known else None
    return held


def _handle(pynvml: Any, device: torch.device) -> Any:
    """Return NVML's handle of a device of torch, by UUID or else by PCI bus id.

    Its number does not identify it: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER renumber torch's devices, but not NVML's.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types know only some of its attributes
    uuid = str(getattr(properties, "uuid", "") or "").removeprefix("GPU-").removeprefix("MIG-")
    if uuid:
        for prefix in ("GPU-", "MIG-"):  # torch's UUID has no prefix
            with suppress(pynvml.NVMLError):
                return pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
    if hasattr(properties, "pci_bus_id"):
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return pynvml.nvmlDeviceGetHandleByPciBusId(place)
    raise LookupError("torch gives no UUID and no PCI bus id, by which NVML would know the device")


@contextmanager
def _library() -> Iterator[Any]:
    """Yield the package pynvml, with the library of the driver loaded."""
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
