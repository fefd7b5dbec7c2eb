"""What NVML is asked, and the notes if it is missing, refuses, or counts other processes."""

import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from recap_cli.machine import nvml

CUDA = torch.device("cuda", 1)
UUID = "5a1b2c3d-0000-1111-2222-333344445555"
Install = Callable[..., ModuleType]


class NVMLError(Exception):
    """As the package's own: every refusal is one."""


def process(pid: int, count: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=count)


def refusing(*_: object) -> Any:
    raise NVMLError("Not Supported")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a made `pynvml` in the place of the package, and a made device in that of torch's; both may be changed by name."""

    def put(
        compute: list[SimpleNamespace] | None = None, *, properties: object = None, reserved: int = 0, **functions: object
    ) -> ModuleType:
        module: Any = ModuleType("pynvml")
        module.NVMLError = NVMLError
        module.calls = []
        made = {
            "nvmlInit": lambda: module.calls.append("init"),
            "nvmlShutdown": lambda: module.calls.append("shutdown"),
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetHandleByUUID": lambda uuid: module.calls.append(uuid) or uuid,
            "nvmlDeviceGetHandleByPciBusId": lambda place: module.calls.append(place) or place,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: compute or [],
            "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [],
            **functions,
        }
        for name, function in made.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties or SimpleNamespace(uuid=UUID))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
        return module

    return put


def test_own_bytes_and_those_of_all_others_are_told_apart(install: Install) -> None:
    module = install([process(os.getpid(), 700), process(1, 20), process(2, 3)])
    assert nvml.processes(CUDA) == nvml.Processes(700, 23, ())
    assert module.calls == ["init", f"GPU-{UUID}", "shutdown"]


def test_a_process_that_computes_and_draws_counts_once(install: Install) -> None:
    drawn = [process(os.getpid(), 700), process(1, 5), process(3, 100)]
    install([process(os.getpid(), 700), process(1, 20)], nvmlDeviceGetGraphicsRunningProcesses=lambda _: drawn)
    assert nvml.processes(CUDA) == nvml.Processes(700, 120, ())


def test_a_card_that_cannot_draw_still_says_who_computes(install: Install) -> None:
    install([process(os.getpid(), 700)], nvmlDeviceGetGraphicsRunningProcesses=refusing)
    assert nvml.processes(CUDA) == nvml.Processes(700, 0, ())


def test_the_device_is_found_by_uuid_whatever_its_number(install: Install) -> None:
    def by_uuid(uuid: str) -> str:
        if not uuid.startswith("MIG-"):
            raise NVMLError("Not Found")
        return uuid

    install([process(os.getpid(), 1)], nvmlDeviceGetHandleByUUID=by_uuid)
    assert nvml.processes(CUDA).process_bytes == 1


def test_without_a_uuid_the_device_is_found_on_the_bus(install: Install) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x65, pci_device_id=0)
    module = install([process(os.getpid(), 1)], properties=properties)
    assert nvml.processes(CUDA).process_bytes == 1
    assert "00000000:65:00.0" in module.calls


def test_a_device_that_nvml_cannot_be_asked_for_is_not_seen(install: Install) -> None:
    install([process(os.getpid(), 1)], properties=SimpleNamespace())
    seen = nvml.processes(CUDA)
    assert (seen.process_bytes, seen.others_bytes) == (None, None)
    assert seen.not_seen == (
        "what processes hold on cuda:1: NVML does not answer "
        "(torch gives no UUID and no PCI bus id, by which NVML would know the device)",
    )


@pytest.mark.parametrize(
    ("listed", "problem"),
    [([], "those that NVML lists (none)"), ([process(0, 5), process(-1, 7)], "the 2 processes that NVML lists")],
)
def test_in_a_container_that_hides_its_ids_nothing_is_guessed(
    install: Install, listed: list[SimpleNamespace], problem: str
) -> None:
    install(listed)
    seen = nvml.processes(CUDA)
    assert (seen.process_bytes, seen.others_bytes) == (None, None)
    assert problem in seen.not_seen[0]
    assert "in a container" in seen.not_seen[0]


def test_another_process_of_the_host_with_our_id_is_not_taken_for_us(install: Install) -> None:
    install([process(os.getpid(), 700)], reserved=701)
    assert nvml.processes(CUDA).process_bytes is None


def test_processes_listed_without_bytes_are_said_to_be(install: Install) -> None:
    install([process(os.getpid(), None), process(1, 20), process(2, None)], reserved=100)
    seen = nvml.processes(CUDA)
    assert (seen.process_bytes, seen.others_bytes) == (None, None)
    assert seen.not_seen == (
        "what this process holds on cuda:1 in total: NVML lists it without bytes",
        "what other processes hold on cuda:1: NVML lists 1 of 2 without bytes",
    )


@pytest.mark.parametrize("refuses", ["nvmlInit", "nvmlDeviceGetComputeRunningProcesses"])
@pytest.mark.parametrize(
    "error", [NVMLError("Driver/library version mismatch"), OSError("libnvidia-ml.so.1"), AttributeError("x")]
)
def test_a_driver_that_fails_stops_nothing(install: Install, refuses: str, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    install(**{refuses: fail})
    (problem,) = nvml.processes(CUDA).not_seen
    assert problem == f"what processes hold on cuda:1: NVML does not answer ({error})"


def test_the_version_of_the_driver_or_why_it_is_not_known(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    assert nvml.driver() == ("580.65.06", None)
    install(nvmlInit=refusing)
    assert nvml.driver() == (None, "NVML does not answer: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert nvml.driver() == (None, "NVML does not answer: the package nvidia-ml-py is not installed")
    assert nvml.processes(CUDA).not_seen[0].endswith("(the package nvidia-ml-py is not installed)")
