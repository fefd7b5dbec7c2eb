"""Exported models, loaded again: by RECAP, by their own library, and with the logits that they were exported with."""

import json
import subprocess
import sys

import pytest
import torch

import recap_cli
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import all_units, counts, shapes_of
from recap_cli.core.surgery import gather, indices
from recap_cli.errors import ModelError, StorageError
from recap_cli.models import build, conformance, transformers_models
from recap_cli.models import export as product
from recap_cli.models.checkpoints import read_config
from tests.decoders import decoder
from tests.pico import PICO, logits_for, pico, write_tokenizer

HEADS_SAID_BY_STOCK = {"vit", "deit", "dinov2"}  # in today's layout they obey `head_dim`; the others ignore or refuse it
NEURONS_NOT_SAID_BY_STOCK = {"dinov2-swiglu", "swin"}  # one mlp_ratio for all, or a whole number


class Small:
    """A pico model, a plan, and the tensors that the plan leaves."""

    def __init__(self, name: str, plan=None) -> None:
        self.model, self.spec = pico(name)
        self.adapter = build.adapter_of(self.spec)
        self.axes = find_axes(self.adapter, self.model)
        self.plan = conformance.random_plan(self.axes) if plan is None else plan(self.axes)
        full = build.tensors_of(self.model)
        self.tensors = gather(full, indices(self.axes, self.plan, shapes_of(full)))

    def export(self, out, processor=None, **options):
        return product.export(
            product.Product(self.spec, processor, self.adapter, self.tensors, self.axes, self.plan), out, **options
        )

    def logits(self, model=None):
        model = model or build.assemble(self.spec, self.tensors, self.adapter, counts(self.plan))
        with torch.no_grad():
            return logits_for(self.spec)(model, build.example_batch(self.spec))


def uniform(axes):
    return {axis.name: torch.arange(axis.size) < (2 if axis.kind == "heads" else 32) for axis in axes}


def neurons_only(axes):
    return {axis.name: torch.arange(axis.size) < (4 if axis.kind == "heads" else 32) for axis in axes}


@pytest.mark.parametrize("name", PICO)
def test_a_ragged_model_is_loaded_with_the_same_logits(name, tmp_path):
    small = Small(name)
    facts = small.export(tmp_path / "out", facts={"accuracy": 0.5})
    assert facts["form"] == "ragged"
    assert ("as before the cut" if name == "swin" else "prune.uniform") in facts["reason"]
    assert facts["sizes"] == counts(small.plan)
    loaded = recap_cli.load(tmp_path / "out")
    assert not loaded.training
    assert torch.equal(small.logits(loaded), small.logits())
    about = json.loads((tmp_path / "out" / "recap.json").read_text())
    assert about["facts"] == {"accuracy": 0.5}
    assert about["adapter"]["distribution"] == "recap-cli"


@pytest.mark.parametrize("name", PICO)
def test_a_dense_model_is_opened_by_its_own_library_alone(name, tmp_path):
    import timm
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    small, out = Small(name), tmp_path / "out"
    assert small.export(out, dense=True)["form"] == "dense"
    if small.spec.library == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    else:
        text = small.spec.task_kind == "text-classification"
        model = (AutoModelForSequenceClassification if text else AutoModelForImageClassification).from_pretrained(out)
    torch.testing.assert_close(small.logits(model), small.logits(), rtol=1e-5, atol=1e-5)
    assert shapes_of(model.state_dict()) == shapes_of(small.model.state_dict())
    assert torch.equal(small.logits(recap_cli.load(out)), small.logits(model))


@pytest.mark.parametrize("name", PICO)
def test_the_stock_form_is_used_where_the_library_can_say_it_and_nowhere_else(name, tmp_path):
    small = Small(name, uniform)
    facts = small.export(tmp_path / "out")
    today = any(path.endswith(".o_proj") for path, _ in small.model.named_modules())
    assert facts["form"] == ("stock" if name in HEADS_SAID_BY_STOCK and today else "ragged")
    assert facts["form"] == "stock" or facts["reason"]
    torch.testing.assert_close(small.logits(recap_cli.load(tmp_path / "out")), small.logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PICO)
def test_neurons_alone_are_said_by_most_configurations(name, tmp_path):
    small = Small(name, neurons_only)
    assert small.export(tmp_path / "out")["form"] == ("ragged" if name in NEURONS_NOT_SAID_BY_STOCK else "stock")
    torch.testing.assert_close(small.logits(recap_cli.load(tmp_path / "out")), small.logits(), rtol=1e-5, atol=1e-5)


def test_bert_is_told_why_it_is_not_stock(tmp_path):
    facts = Small("bert", uniform).export(tmp_path / "out")
    assert (
        "a stock bert makes bert.encoder.layer.0.attention.self.query.weight of shape (32, 32), not (16, 32)" in facts["reason"]
    )


def test_an_unpruned_model_is_stock_and_an_empty_plan_prunes_nothing(tmp_path):
    small = Small("bert", all_units)
    assert small.export(tmp_path / "a")["form"] == "stock"
    small.plan = {}
    assert small.export(tmp_path / "b")["form"] == "stock"


def test_a_stock_folder_is_opened_by_its_library_with_the_small_shapes(tmp_path):
    from transformers import AutoModelForImageClassification

    small = Small("vit", uniform)
    small.export(tmp_path / "out")
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert tuple(model.vit.layers[0].attention.q_proj.weight.shape) == (16, 32)
    assert list(model.config.id2label.values()) == small.spec.label_names
    torch.testing.assert_close(small.logits(model), small.logits(), rtol=1e-5, atol=1e-5)


def test_a_configuration_that_is_obeyed_in_shape_but_not_in_logits_is_not_called_stock(tmp_path, monkeypatch):
    small = Small("vit", uniform)
    monkeypatch.setattr(product, "_prove", lambda *_: (_ for _ in ()).throw(ModelError("the logits differ")))
    facts = small.export(tmp_path / "out")
    assert (facts["form"], facts["reason"]) == ("ragged", "the logits differ")
    assert torch.equal(small.logits(recap_cli.load(tmp_path / "out")), small.logits())


def test_three_lines_of_python_run_the_product_with_its_tokenizer(tmp_path, capfd):
    small, out = Small("bert"), tmp_path / "out"
    small.export(out, write_tokenizer(tmp_path / "tokenizer"))
    capfd.readouterr()
    code = (
        "import recap_cli, transformers\n"
        f"model, tokenizer = recap_cli.load({str(out)!r}), transformers.AutoTokenizer.from_pretrained({str(out)!r})\n"
        "print(tuple(model(**tokenizer(['w1 w2', 'w3'], padding=True, return_tensors='pt')).logits.shape))\n"
    )
    exec(code, {})  # in a process of its own: tests/test_extras.py
    said = capfd.readouterr()
    assert said.out.strip() == "(2, 3)"
    assert "Loading" not in said.err


def test_the_image_processor_does_what_the_model_was_finetuned_with(tmp_path):
    import numpy as np
    from transformers import AutoImageProcessor

    small = Small("vit")
    small.export(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    made = AutoImageProcessor.from_pretrained(tmp_path / "out")(pixels, return_tensors="pt")["pixel_values"]
    wanted = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(made[0], wanted, rtol=1e-5, atol=1e-5)


def test_the_product_has_the_cache_that_its_configuration_asks_for_though_it_was_trained_without(tmp_path):
    model, spec = decoder("llama")
    assert not model.config.use_cache
    transformers_models.save(model, spec, tmp_path)
    assert read_config(tmp_path)["use_cache"] is True


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    small, out = Small("vit"), tmp_path / "out"
    out.mkdir()
    small.export(out)  # empty: taken
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(StorageError, match="exists already and is not empty") as caught:
        small.export(out)
    assert caught.value.hint
    assert sorted(path.name for path in out.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    small = Small("vit")
    monkeypatch.setattr(product, "_compare", lambda *_: (_ for _ in ()).throw(ModelError("they differ")))
    with pytest.raises(ModelError, match="they differ"):
        small.export(tmp_path / "out", dense=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("permissions")
def test_an_unwritable_place_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written"):
        Small("vit").export(tmp_path / "out")


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        Small("vit").export(tmp_path / "file" / "out")


def test_the_place_is_looked_at_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "assemble", lambda *_: pytest.fail("computed first"))
    file = tmp_path / "file"
    file.write_text("x")
    small = Small("vit")
    with pytest.raises(StorageError, match="file is a file, not a folder") as caught:
        small.export(file)
    assert caught.value.exit_code == 12
    assert caught.value.hint == "name a new folder, or remove the file"
    with pytest.raises(StorageError, match=r"out cannot be written: .*file"):
        small.export(file / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["config.json", "spec.json", "model.safetensors"])
def test_a_file_that_was_altered_or_is_missing_is_named(tmp_path, name):
    out = tmp_path / "out"
    files = Small("vit").export(out)["files"]
    assert set(files) == {path.name for path in out.iterdir()} - {"recap.json"}
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[:-2] + b"  ")
    with pytest.raises(ModelError, match=rf"{name}: its sha256") as caught:
        recap_cli.load(out)
    assert caught.value.hint == "export or copy it again"
    (out / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}: it is missing"):
        recap_cli.load(out)


def test_a_recap_json_without_its_files_is_refused(tmp_path):
    Small("vit").export(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "recap.json").read_text())
    del about["files"]
    (tmp_path / "out" / "recap.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match=r"recap\.json has no 'files'"):
        recap_cli.load(tmp_path / "out")


def test_folders_that_are_no_product_are_refused(tmp_path):
    with pytest.raises(ModelError, match="is not a folder that recap export wrote"):
        recap_cli.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"recap\.json does not exist"):
        recap_cli.load(tmp_path)


@pytest.mark.parametrize("dense", [False, True])
def test_whoever_may_read_the_folder_may_read_its_files(tmp_path, dense):
    Small("vit").export(tmp_path / "out", dense=dense)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_newer_schema_and_a_truncated_file_are_refused(tmp_path):
    out = tmp_path / "out"
    Small("vit").export(out)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors: it has [\d,]+ bytes, [\d,]+ were committed"):
        recap_cli.load(out)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"model\.safetensors: its sha256"):
        recap_cli.load(out)
    weights.write_bytes(whole)
    about = json.loads((out / "recap.json").read_text())
    (out / "recap.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(ModelError, match="newer recap"):
        recap_cli.load(out)
    (out / "recap.json").write_text("{")
    with pytest.raises(ModelError, match=r"recap\.json"):
        recap_cli.load(out)


def test_the_package_says_its_version_without_torch():
    code = "import sys, recap_cli; print(recap_cli.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, torch_is_there = done.stdout.split()
    assert version[0].isdigit()
    assert torch_is_there == "False"
