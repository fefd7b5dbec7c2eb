"""What `doctor` asks the driver: its version, and who holds how much of each CUDA device."""

from typing import Any

import torch

from recap_cli.machine import nvml, threads


def driver() -> dict[str, str | None]:
    """The version of the NVIDIA driver, and `nvml`: "works", or a sentence that says why nothing can be asked."""
    version, why_not = nvml.driver()
    return {"driver": version, "nvml": why_not or "works"}


def computing() -> dict[str, str]:
    """How many threads compute on the CPU, how they wait for each other, and how busy the machine is; each with its reason."""
    return threads.described()


def holders(index: int) -> dict[str, Any]:
    """Bytes that other processes hold on the CUDA device of that number, None where that cannot be seen, and why."""
    seen = nvml.processes(torch.device("cuda", index))
    return {"other_processes_bytes": seen.others_bytes, "not_seen": list(seen.not_seen)}
