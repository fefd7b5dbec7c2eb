"""Where the full model runs: the stages with streamed blocks decide what they decide without."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.blocks import block_paths
from recap_cli.core.streaming import streamed
from recap_cli.errors import PluginError
from recap_cli.memory import meta_model, predict
from recap_cli.rounds.device_policy import importance_batch_size, on_device
from recap_cli.rounds.record import MASK, PLAN, SMALL
from recap_cli.rounds.run_context import Context
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from tests.pico import pico
from tests.tiny import tiny


def decided(state: State) -> dict[str, Any]:
    """A round up to its mask, and a score of the full model."""
    prune(state)
    mask(state)
    (row,) = evaluate(state, which=["full"])
    files = {name: state.load_tensors(f"round-001/{name}") for name in (PLAN, MASK, SMALL)}
    return {**files, "full": Context(state).full_tensors(), "loss": row["loss"]}


@pytest.mark.parametrize(
    ("name", "blocks", "times"),
    [
        *((name, 2, 5) for name in ("bert", "vit", "timm-vit-packed-glu")),  # warm-up, two gradual steps, mask, eval
        ("segformer", 3, 6),  # and the statistics of its new batch norm
        ("mask2former", 7, 5),
        ("oneformer", 8, 5),
    ],
)
def test_streamed_stages_choose_the_same_plan_and_mask(
    name: str, blocks: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = decided(init(tiny(name), tmp_path / "plain"))
    entered: list[list[str]] = []

    def on_cpu(model: nn.Module, axes: Sequence[Axis], device: torch.device, adapter: str) -> AbstractContextManager[None]:
        entered.append(block_paths(model, axes))
        return streamed(model, entered[-1], device)

    for module in ("rounds.warm_up", "rounds.importance", "rounds.scoring"):
        monkeypatch.setattr(f"recap_cli.{module}.on_device", on_cpu)
    found = decided(init(tiny(name), tmp_path / "streamed"))
    assert [len(paths) for paths in entered] == [blocks] * times
    assert found.pop("loss") == plain.pop("loss")
    for file, tensors in plain.items():
        assert tensors.keys() == found[file].keys()
        assert all(torch.equal(found[file][key], tensor) for key, tensor in tensors.items()), file


def test_on_the_cpu_the_model_is_not_touched() -> None:
    model, _ = pico("vit")
    with on_device(model, [], torch.device("cpu"), "vit"):
        assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_whose_axes_say_no_block_is_named_before_anything_goes_to_a_device() -> None:
    model, spec = pico("vit")
    whole = [Axis("width", "widths", 0, 32, (Cut("vit.embeddings.cls_token", 2), Cut("classifier.weight", 1)))]
    with pytest.raises(PluginError, match=r"the adapter 'mine' does not say which blocks .* the axis 'width'") as caught:
        on_device(model, whole, torch.device("cuda"), "mine")
    assert "importance.device=cpu" in str(caught.value.hint)
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    of_recipe = meta_model.of_recipe(tiny("vit"))
    unsaid = replace(of_recipe, layout=replace(of_recipe.layout, axes=tuple(whole)))
    with pytest.raises(PluginError, match=f"the adapter '{spec.model_type}'"):
        predict.importance_bytes(unsaid, tiny("vit"))


@pytest.mark.parametrize(
    ("device", "finetune", "expected"),
    [
        ("cpu", {"batch_size": 4, "micro_batch_size": 2}, 8),
        ("cuda", {"batch_size": 4, "micro_batch_size": 2}, 2),
        ("cuda", {"batch_size": 4}, 4),
        ("cuda", {"batch_size": 16}, 8),
    ],
)
def test_on_an_accelerator_importance_takes_no_more_examples_than_finetuning(
    device: str, finetune: dict[str, int], expected: int
) -> None:
    assert importance_batch_size(tiny("vit", finetune=finetune), torch.device(device)) == expected
