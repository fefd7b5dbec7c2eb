"""Configurations that no machine can build: refused by name before memory is asked for, from a recipe and from a folder."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recap_cli.errors import ModelError
from recap_cli.models import build, timm_models, transformers_models
from recap_cli.models.create import Created, create_model
from tests.pico import LABELS, pico, source_for, write_tokenizer
from tests.tiny import model_section


def create(name: str, folder: Path | None = None, **changes: Any) -> Created:
    section = model_section(name)
    source = source_for(
        "text-classification" if "bert" in name else "image-classification",
        section.get("library", "transformers"),
        name=None if folder is None else str(folder),
        config={**section["config"], **changes} if folder is None else None,
        label_names=LABELS,
    )
    return create_model(source)


def refusal(name: str, folder: Path | None = None, **changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        create(name, folder, **changes)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "key", "value", "limit"),
    [
        ("bert", "num_hidden_layers", 10**6, "1,000"),
        ("bert", "vocab_size", 10**12, "100,000,000"),
        ("bert", "num_labels", 10**9, "1,000,000"),
        ("timm-vit", "depth", 10**6, "1,000"),
    ],
)
def test_a_size_beyond_all_models_is_refused_by_its_key(name: str, key: str, value: int, limit: str) -> None:
    assert f"{key} of this" in (shown := refusal(name, **{key: value}))
    assert shown.endswith(f"is {value:,}; expected at most {limit}")


@pytest.mark.parametrize("pad", [999, 10**6])
def test_padding_with_a_token_that_is_not_there_is_refused(pad: int) -> None:
    assert refusal("bert", pad_token_id=pad).startswith(
        f"pad_token_id of this bert is {pad}, and its vocabulary has the tokens"
    )


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made() -> None:
    shown = refusal("bert", vocab_size=99_999_999, hidden_size=10**6)
    weights = r"a bert of this configuration has 4\d\d,\d{3}.\d GB of weights"
    assert re.fullmatch(weights + ", but this machine has .* GB of memory", shown), shown


def test_a_folder_whose_configuration_is_damaged_is_refused_by_the_key(tmp_path: Path) -> None:
    model, spec = pico("bert")
    write_tokenizer(tmp_path / "model")
    for file, content in build.describe(spec, None).items():
        (tmp_path / "model" / file).write_text(str(content))
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = tmp_path / "model" / "config.json"
    written = json.loads(config.read_text())
    for key, value in (("num_hidden_layers", 10**6), ("vocab_size", 10**12), ("num_labels", 10**9)):
        config.write_text(json.dumps({**written, key: value}))
        assert f"{key} of this bert is {value:,}; expected at most" in refusal("bert", tmp_path / "model")
    config.write_text(json.dumps({**written, "pad_token_id": 10**6}))
    assert "pad_token_id of this bert is 1000000" in refusal("bert", tmp_path / "model")


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_the_look_before_takes_no_random_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return build.tensors_of(create(name).model)

    with_look = weights()
    monkeypatch.setattr(transformers_models, "check_size", lambda *_: None)
    monkeypatch.setattr(timm_models, "check_fit", lambda *_: None)
    without = weights()
    assert with_look.keys() == without.keys()
    assert all(torch.equal(with_look[key], without[key]) for key in without)


@pytest.mark.parametrize(("key", "value"), [("window_size", 0), ("num_heads", [0, 8]), ("embed_dim", 0), ("depths", [1, 0])])
def test_a_size_of_a_stage_that_is_none_is_refused_by_its_key(key: str, value: Any) -> None:
    assert f"{key} of this swin is 0; expected 1 or more" in refusal("swin", **{key: value})


def test_a_model_without_positions_has_nothing_resampled_for_another_image_size() -> None:
    section = model_section("swin")
    made = create_model(source_for("image-classification", config=section["config"], label_names=LABELS, image_size=32))
    assert made.notes == ("random weights, from a configuration",)
    assert (made.spec.image or {})["size"] == 32
