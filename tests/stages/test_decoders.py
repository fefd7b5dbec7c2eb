"""Decoders through the stages: a cache of keys and values that must stay out, and buffers that are no parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_cli import registry
from recap_cli.core.streaming import streamed
from recap_cli.memory import fake_step, meta_model, predict
from recap_cli.memory.fake_step import Fakes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import blocks_of
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from tests.decoders import ADAPTERS, SIZES
from tests.memory.test_fake_step import real
from tests.pico import LABELS
from tests.stages.test_on_device import decided
from tests.tiny import data_folder, tiny

FROM = {"distribution": "a-strangers", "version": "1.0"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    names, load, used = registry.names, registry.load, registry.used

    def known(of: Callable[..., Any], ours: Callable[[str], Any]) -> Callable[..., Any]:
        return lambda kind, name: ours(name) if kind == "adapters" and name in ADAPTERS else of(kind, name)

    monkeypatch.setattr(registry, "names", lambda kind: [*names(kind), *(ADAPTERS if kind == "adapters" else ())])
    monkeypatch.setattr(registry, "load", known(load, lambda name: ADAPTERS[name]))
    monkeypatch.setattr(registry, "used", known(used, lambda name: {"kind": "adapters", "name": name, **FROM}))


def recipe(name: str, **sections: Any) -> Recipe:
    config = {"model_type": name, **SIZES[name], "tokenizer": str(data_folder() / "tokenizer")}
    return tiny("bert", model={"config": config}, **sections)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_streamed_stages_choose_the_same_plan_and_mask(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = decided(init(recipe(name), tmp_path / "plain"))
    entered: list[list[str]] = []

    def on_cpu(model: Any, axes: Any, device: Any, adapter: str) -> Any:
        entered.append(blocks_of(model, axes, adapter))
        return streamed(model, entered[-1], device)

    for module in ("rounds.warm_up", "rounds.importance", "rounds.scoring"):
        monkeypatch.setattr(f"recap_cli.{module}.on_device", on_cpu)
    found = decided(init(recipe(name), tmp_path / "streamed"))
    assert [len(blocks) for blocks in entered] == [2] * 5  # warm-up, two gradual steps, mask, eval
    assert found.pop("loss") == plain.pop("loss")
    for file, tensors in plain.items():
        assert all(torch.equal(found[file][key], tensor) for key, tensor in tensors.items()), file


def test_a_llama_is_finetuned_in_bf16_with_its_frequencies_in_fp32(tmp_path: Path) -> None:
    state = run(recipe("llama", rounds=1, finetune={"weights": "bf16"}), tmp_path / "state")
    entry = next(entry for entry in state.manifest.history if entry["stage"] == "finetune")
    model = recipe("llama", finetune={"weights": "bf16"})
    step, _ = predict.prepare(meta_model.of_recipe(model, LABELS), model, "recap", real)
    assert entry["loss"] < 10
    assert {buffer.dtype for name, buffer in step.model.named_buffers() if "inv_freq" in name} == {torch.float32}


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_predicted_weights_are_those_that_are_held_to_the_byte(name: str, weights: str) -> None:
    wanted, fakes = recipe(name, finetune={"weights": weights}), Fakes()
    of_recipe = meta_model.of_recipe(wanted, LABELS)
    predicted = fakes.usage(predict.prepare(of_recipe, wanted, "recap", fakes.like)[0], "cpu")
    counted = fake_step.usage(predict.prepare(of_recipe, wanted, "recap", real)[0])
    for kind in ("weights", "gradients", "optimizer"):
        assert predicted.maxima[kind] == counted.maxima[kind], kind  # type: ignore[index]
