"""What memory.json says: counted, measured, and what could not be seen."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from recap_cli.errors import StorageError, UsageError
from recap_cli.machine import accounting, nvml, snapshot
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.optim import Optimizer, sgd
from recap_cli.training import loop

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HELD = {"weights_bytes": 500, "gradients_bytes": 60, "optimizer_bytes": 40}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made CUDA device, whose allocator had its peak at 1,000 bytes."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2048)
    properties = SimpleNamespace(name="Made Up 3000", total_memory=8192)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvml, "processes", lambda _: nvml.Processes(3000, 77, ()))


@pytest.mark.usefixtures("card")
def test_on_cuda_the_peak_is_taken_apart_and_the_driver_is_asked() -> None:
    peak = accounting.training_peak(CUDA, HELD)
    assert peak == {"allocated_bytes": 1000, **HELD, "activations_and_temporary_bytes": 400}
    found = accounting.measured(CUDA, peak)
    assert found["training_peak"] == peak
    assert found["process"].items() >= {"cuda_max_allocated_bytes": 1000, "cuda_max_reserved_bytes": 2048}.items()
    assert found["accelerator"] == {
        "name": "Made Up 3000",
        "total_bytes": 8192,
        "nvml_process_bytes": 3000,
        "nvml_other_processes_bytes": 77,
    }
    assert (found["device"], found["not_seen"]) == ("cuda", [])


@pytest.mark.usefixtures("card")
def test_a_peak_below_what_was_counted_leaves_nothing_and_no_less() -> None:
    peak = accounting.training_peak(CUDA, {**HELD, "gradients_bytes": 900})
    assert peak is not None
    assert peak["activations_and_temporary_bytes"] == 0


@pytest.mark.usefixtures("card")
def test_what_the_driver_does_not_tell_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "processes", lambda _: nvml.Processes(not_seen=("the driver is asleep",)))
    found = accounting.measured(CUDA, None)
    assert found["not_seen"] == ["the driver is asleep"]
    assert found["accelerator"]["nvml_process_bytes"] is None


def test_on_the_cpu_the_process_is_measured_and_the_allocator_is_said_to_keep_no_peak() -> None:
    found = accounting.measured(CPU, accounting.training_peak(CPU, HELD))
    assert (found["training_peak"], found["accelerator"], found["device"]) == (None, None, "cpu")
    assert found["process"]["peak_rss_bytes"] >= found["process"]["rss_bytes"] > 1 << 20
    assert ["the CPU's has none" in text for text in found["not_seen"]] == [True]


def test_on_mps_there_are_figures_and_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 11)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 22)
    found = accounting.measured(torch.device("mps"), None)
    assert found["process"].items() >= {"mps_allocated_bytes": 11, "mps_driver_bytes": 22}.items()
    assert "that of MPS has none" in found["not_seen"][0]


def model_and_optimizer() -> tuple[nn.Module, Optimizer]:
    model = nn.Linear(8, 4)
    trainables = make_partial(model, {}, frozen=lambda name: name == "bias")
    return model, Optimizer(trainables, sgd(momentum=0.9))


def test_what_is_held_now_is_counted_by_kind_on_that_device_only() -> None:
    model, optimizer = model_and_optimizer()
    assert accounting.held_now(CPU, model, optimizer) == {"weights_bytes": 144, "gradients_bytes": 0, "optimizer_bytes": 128}
    model(torch.ones(1, 8)).sum().backward()
    assert accounting.held_now(CPU, model, optimizer)["gradients_bytes"] == 128
    assert accounting.held_now(CPU, model, None)["optimizer_bytes"] == 0
    assert accounting.held_now(CPU, None, None) == dict.fromkeys(accounting.KINDS, 0)
    assert accounting.held_now(CUDA, model, optimizer) == dict.fromkeys(accounting.KINDS, 0)


# Snapshots


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch's private functions were called with."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: calls.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    return calls


def test_a_snapshot_is_recorded_and_written_also_when_the_training_fails(recorder: list[Any]) -> None:
    expected = [{"max_entries": snapshot.EVENTS}, "a.pickle", {"enabled": None}]
    with snapshot.recording(Path("a.pickle"), pytest.fail):
        pass
    assert recorder == expected
    with pytest.raises(torch.OutOfMemoryError), snapshot.recording(Path("a.pickle"), pytest.fail):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert recorder == 2 * expected


def test_a_snapshot_that_cannot_be_written_costs_the_training_nothing(
    recorder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    notes: list[str] = []
    with snapshot.recording(Path("a.pickle"), notes.append):
        pass
    assert notes == ["the snapshot a.pickle could not be written: [Errno 28] No space left on device"]
    assert recorder[-1] == {"enabled": None}


def test_without_a_file_nothing_is_recorded(recorder: list[Any]) -> None:
    with snapshot.recording(None, pytest.fail):
        pass
    assert recorder == []


def test_a_snapshot_needs_cuda_and_a_new_file(tmp_path: Path) -> None:
    snapshot.check(tmp_path / "new.pickle", CUDA)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.pickle").touch()
    refusals: list[tuple[Path, torch.device, str]] = [
        (tmp_path / "new.pickle", CPU, "would run on cpu"),
        (tmp_path / "old.pickle", CUDA, "exists already"),
        (tmp_path / "no" / "new.pickle", CUDA, "there is no folder"),
    ]
    for file, device, problem in refusals:
        with pytest.raises(UsageError, match=problem):
            snapshot.check(file, device)


def test_a_snapshot_that_could_not_be_written_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Callable[..., object]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"a\.pickle: cannot be written: Permission denied"):
        snapshot.check(tmp_path / "a.pickle", CUDA)


def test_a_gradient_counts_with_all_that_it_keeps_alive_and_once() -> None:
    whole = torch.zeros(9, 4)
    trainables = [SimpleNamespace(grad_param=SimpleNamespace(grad=whole[at])) for at in (slice(0, 4), slice(4, 8))]
    watch = loop._GradientWatch(cast(Any, trainables))
    watch.all_held()
    assert watch.peak_bytes == whole.nbytes
