"""The facts that `doctor` asks of the driver: its version, and how much other processes hold of each CUDA device."""

from typing import Any

import torch

from recap_cli.machine import nvml, threads


def driver() -> dict[str, str | None]:
    """Return the version of the NVIDIA driver, and `nvml`: "works", or why it does not."""
    version, why_not = nvml.driver()
    return {"driver": version, "nvml": why_not or "works"}


def computing() -> dict[str, str]:
    """Return how many threads compute on the CPU, how they wait for each other, and how busy the machine is, with reasons."""
    return threads.described()


def holders(index: int) -> dict[str, Any]:
    """Return the bytes that other processes hold on a CUDA device, or None and the reason."""
    seen = nvml.processes(torch.device("cuda", index))
    return {"other_processes_bytes": seen.others_bytes, "not_seen": list(seen.not_seen)}
