"""Real steps beside their predictions, and what is refused before anything is made."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from recap_cli.errors import DeviceMemoryError, RecipeError, StorageError
from recap_cli.memory import measure, meta_model
from recap_cli.memory.tracker import KINDS, Usage
from tests.pico import LABELS
from tests.tiny import tiny

METHODS = ("full", "head", "lora", "pre-ft", "post-ft", "movement", "recap")


def none_made(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be made")


def test_on_the_cpu_every_method_holds_what_was_predicted() -> None:
    recipe = tiny("bert", finetune={"device": "cpu"})
    rows = measure.measure(meta_model.of_recipe(recipe, LABELS), recipe, METHODS)
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert abs(row["error_share"]) < 0.01
        assert row["measured_bytes"] == row["counted_bytes"] == sum(row["at_peak"].values()) > 0
        assert row["device"] == "cpu"
        assert row["batch_size"] == 8
        assert {f"{kind}_bytes" for kind in KINDS} <= set(row)
        assert row["process"]["peak_rss_bytes"] > 0
        assert any("a peak of the allocator" in sentence for sentence in row["not_seen"])
        assert any("CUDA's kernels" in sentence for sentence in row["not_seen"])
        assert "max_allocated_bytes" not in row


def test_a_step_that_the_machine_cannot_hold_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("vit")
    model = meta_model.of_recipe(recipe, LABELS)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr(measure, "random_tensors", none_made)
    with pytest.raises(StorageError, match="a real step of full holds about 0 MB, and this machine has 0 MB free") as caught:
        measure.measure(model, recipe, ["full"])
    assert "leave out --measure" in str(caught.value.hint)


def usage(**kinds: int) -> Usage:
    found: Any = {kind: kinds.get(kind, 0) for kind in KINDS}
    return Usage(found, found)


def test_a_step_that_a_gpu_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 10**9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**9, 4 * 10**9))
    measure._check_room(usage(weights=10**9, activations=9 * 10**8), "recap", torch.device("cuda:0"))
    with pytest.raises(DeviceMemoryError, match="a real step of recap holds about 4,000 MB, and cuda:0 has 2,000 MB free"):
        measure._check_room(usage(weights=10**9, activations=3 * 10**9), "recap", torch.device("cuda:0"))
    with pytest.raises(StorageError, match="holds about 6,000 MB, and this machine has 5,000 MB free"):
        measure._check_room(usage(weights=6 * 10**9), "full", torch.device("cuda:0"))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="there is no device 'cuda:99'"):
        measure.check(tiny("vit", finetune={"device": "cuda:99"}))
    measure.check(tiny("vit", finetune={"device": "auto"}))
