"""Models from folders and configurations, taken apart and put together; and what does not fit, refused by name."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recap_cli.core.adapter import find_axes
from recap_cli.errors import ModelError
from recap_cli.models import build, checkpoints, preprocessing, transformers_models, unexpected_weights
from recap_cli.models.build import ModelSpec
from recap_cli.models.create import Created, create_model
from recap_cli.models.pos_embed import resample
from recap_cli.models.recomputing import enable_checkpointing, recompute_attention
from tests.pico import LABELS, PICO, WORDS, logits_for, pico, source_for, write_tokenizer

VISION = {"kind": "image-classification", "label_names": LABELS}
TEXT = {"kind": "text-classification", "label_names": LABELS}


def made(**source) -> Created:
    return create_model(source_for(**source))


@pytest.fixture
def saved(tmp_path):
    """Writes a pico model (and a tokenizer for text) as its library does; returns the folder."""

    def save(name: str) -> Path:
        model, spec = pico(name)
        folder = tmp_path / name
        folder.mkdir()
        processor = write_tokenizer(tmp_path / "tokenizer") if spec.image is None else None
        for file, content in build.describe(spec, processor).items():
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return folder

    return save


def logits(model, spec, batch=None):
    with torch.no_grad():
        return logits_for(spec)(model, batch or build.example_batch(spec))


@pytest.mark.parametrize("name", PICO)
def test_a_spec_survives_json_and_a_model_survives_being_taken_apart(name):
    model, spec = pico(name)
    assert ModelSpec.from_json(spec.to_json()) == spec
    tensors = build.tensors_of(model)
    again = build.assemble(spec, tensors, build.adapter_of(spec), {})
    assert torch.equal(logits(again, spec), logits(model, spec))
    assert not again.training
    assert {name: t.data_ptr() for name, t in build.tensors_of(again).items()} == {n: t.data_ptr() for n, t in tensors.items()}
    assert all(param.requires_grad for param in again.parameters())


@pytest.mark.parametrize("name", PICO)
def test_head_and_embeddings_are_found_and_apart(name):
    model, spec = pico(name)
    adapter = build.adapter_of(spec)
    head, embeddings = build.head_names(adapter, model), build.embedding_names(adapter, model)
    assert head
    assert embeddings
    assert not set(head) & set(embeddings)
    assert not any(".layer." in name or "blocks." in name for name in head + embeddings)


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_checkpointing_leaves_the_gradients_as_they_are(name):
    gradients = []
    for checkpointed in (False, True):
        model, spec = pico(name)
        if checkpointed:
            enable_checkpointing(model)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        logits_for(spec)(model, build.example_batch(spec)).square().sum().backward()
        gradients.append({name: param.grad for name, param in model.named_parameters()})
    for param, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][param])


@pytest.mark.parametrize("name", PICO)
def test_attention_alone_can_be_recomputed(name):
    found = []
    for recomputed in (False, True):
        model, spec = pico(name)
        if recomputed:
            recompute_attention(model, find_axes(build.adapter_of(spec), model))
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        kept = {}
        pack = lambda tensor, kept=kept: (kept.update({tensor.untyped_storage().data_ptr(): tensor.nbytes}), tensor)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = logits_for(spec)(model, build.example_batch(spec)).square().sum()
        loss.backward()
        found.append(({name: param.grad for name, param in model.named_parameters()}, sum(kept.values())))
    (plain, all_bytes), (again, fewer_bytes) = found
    for param, grad in plain.items():
        torch.testing.assert_close(again[param], grad)
    assert fewer_bytes < all_bytes


def test_a_model_whose_attention_no_module_holds_is_refused():
    model, spec = pico("vit")
    neurons = [axis for axis in find_axes(build.adapter_of(spec), model) if axis.kind != "heads"]
    with pytest.raises(ModelError, match="no module of ViTForImageClassification is the attention of a block") as caught:
        recompute_attention(model, neurons)
    assert caught.value.hint == "--set finetune.checkpointing=true"


def test_tensors_hold_buffers_that_no_checkpoint_has():
    model, _ = pico("bert")
    assert "bert.embeddings.position_ids" in build.tensors_of(model)
    assert "bert.embeddings.position_ids" not in model.state_dict()


def test_tensors_that_are_shared_stay_shared():
    model, spec = pico("vit")
    layers = model.vit.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    tensors = build.tensors_of(model)
    assert "vit.layers.1.mlp.fc1.weight" not in tensors
    with pytest.raises(ModelError, match=r"lack vit\.layers\.1\.mlp\.fc1\.weight"):
        build.assemble(spec, tensors, build.adapter_of(spec), {})


def test_a_missing_and_a_foreign_tensor_are_named():
    model, spec = pico("vit")
    tensors = build.tensors_of(model)
    foreign = {**tensors, "vit.encoder.layer.0.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"hold vit\.encoder\.layer\.0\.weight, which the model does not have"):
        build.assemble(spec, foreign, build.adapter_of(spec), {})
    del tensors["classifier.bias"]
    with pytest.raises(ModelError, match=r"lack classifier\.bias") as caught:
        build.assemble(spec, tensors, build.adapter_of(spec), {})
    assert "another version of transformers" in str(caught.value.hint)


def test_forward_ignores_labels_and_inputs_that_the_model_has_not():
    model, spec = pico("distilbert")
    batch = build.example_batch(spec)
    more = {**batch, "labels": torch.zeros(2, dtype=torch.long), "token_type_ids": torch.zeros_like(batch["input_ids"])}
    assert torch.equal(logits(model, spec, more), logits(model, spec, batch))


def test_a_checkpoint_with_the_same_labels_keeps_its_head(saved):
    folder = saved("vit")
    created = made(library="transformers", name=str(folder), **VISION)
    model, spec = pico("vit")
    assert torch.equal(logits(created.model, created.spec), logits(model, spec))
    assert created.new == ()
    assert created.notes == ("the head of the checkpoint is kept",)
    assert created.processor is None
    assert "_name_or_path" not in created.spec.config


@pytest.mark.parametrize("name", ["vit", "bert", "timm-vit", "timm-vit-distilled"])
def test_a_head_for_the_same_labels_in_another_order_is_kept(saved, name):
    library, kind = ("timm" if name.startswith("timm") else "transformers"), (TEXT if name == "bert" else VISION)
    labels = ["Dog", "Newt", "cat"]
    created = made(library=library, name=str(saved(name)), **{**kind, "label_names": labels})
    model, spec = pico(name)
    assert created.new == ()
    assert created.notes == ("the head of the checkpoint is kept, its labels in the order of the data: Dog, Newt, cat",)
    assert created.spec.label_names == labels
    expected = logits(model, spec)[:, [LABELS.index(label.lower()) for label in labels]]
    assert torch.equal(logits(created.model, created.spec), expected)


@pytest.mark.parametrize(
    ("kind", "said", "new"),
    [
        ("token-classification", {}, "BertForSequenceClassification"),
        ("token-classification", {"architectures": None}, None),  # nothing is known of it
        ("text-multi-label", {"problem_type": "single_label_classification"}, "single_label_classification"),
        ("text-multi-label", {"problem_type": "multi_label_classification"}, None),
        ("text-multi-label", {}, None),
        ("text-classification", {"problem_type": "regression"}, "regression"),
    ],
)
@pytest.mark.parametrize("meaningless", [True, False])
def test_a_head_that_says_it_is_for_another_task_is_new(saved, kind, said, new, meaningless):
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": {str(i): f"LABEL_{i}" for i in range(len(LABELS))}} if meaningless else {}
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": None, **names, **said}))
    created = made(library="transformers", name=str(folder), kind=kind, label_names=LABELS)
    kept = load_file(folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(created.model.classifier.weight, kept) == (new is None)
    assert created.new == (() if new is None else ("classifier.bias", "classifier.weight"))
    note = f"for another task ({new}): classifier.bias, classifier.weight is new" if new else "kept"
    assert created.notes[0] == f"the head of the checkpoint is {note}"


@pytest.mark.parametrize("labels", [["a", "b"], ["dog", "cat", "bird"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("name", ["vit", "timm-vit", "timm-vit-distilled"])
def test_other_labels_get_a_new_head_and_only_that(saved, name, labels):
    library = "timm" if name.startswith("timm") else "transformers"
    created = made(library=library, name=str(saved(name)), **{**VISION, "label_names": labels})
    old = build.tensors_of(pico(name)[0])
    new = build.tensors_of(created.model)
    assert set(created.new) == {
        n for n, t in new.items() if not torch.equal(t, old[n]) or n in ("head.bias", "head_dist.bias", "classifier.bias")
    }
    assert set(created.new) == {n for n in new if n.startswith(("head", "classifier"))}
    assert logits(created.model, created.spec).shape == (2, len(labels))
    if library == "transformers":
        assert list(created.model.config.id2label.values()) == labels


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
def test_a_bare_encoder_gets_a_head(saved, name):
    folder = saved(name)
    head = build.head_names(build.adapter_of(pico(name)[1]), pico(name)[0])
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in head}
    save_file({n.split(".", 1)[1]: t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    created = made(library="transformers", name=str(folder), **TEXT)
    assert sorted(created.new) == sorted(head)
    assert created.processor("w1 w2")["input_ids"] == [2, 6, 7, 3]


def test_a_text_model_from_a_configuration_borrows_a_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    created = made(library="transformers", config={**config, "tokenizer": str(tmp_path)}, **TEXT)
    assert "tokenizer" not in created.spec.config
    assert created.notes == ("random weights, from a configuration",)
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        made(library="transformers", config=config, **TEXT)
    assert "--set model.config.tokenizer=DIR" in str(caught.value.hint)
    with pytest.raises(ModelError, match=f"has {len(WORDS)} tokens, but the model embeds 10"):
        made(library="transformers", config={**config, "vocab_size": 10, "tokenizer": str(tmp_path)}, **TEXT)


def test_the_seed_decides_random_weights():
    config = {"architecture": "vit_tiny_patch16_224", **PICO["timm-vit"]().config["args"]}
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(made(library="timm", config=config, **VISION).model.head.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize("size", [8, 24, 40])
def test_another_image_size_gives_what_interpolation_at_every_call_gives(saved, name, size):
    folder = saved(name)
    created = made(library="transformers", name=str(folder), image_size=size, **VISION)
    batch = build.example_batch(created.spec)
    assert batch["pixel_values"].shape[-1] == size
    whole, _ = pico(name)
    arguments = {} if name == "dinov2" else {"interpolate_pos_encoding": True}  # DINOv2 always does
    with torch.no_grad():
        wanted = whole(**batch, **arguments).logits
        torch.testing.assert_close(created.model(**batch).logits, wanted, rtol=1e-5, atol=1e-6)
    assert created.model.config.image_size == created.spec.config["image_size"] == size
    assert created.notes[-1] == f"position embeddings resampled from 16 to {size} pixels"


def test_timm_is_given_the_image_size_as_it_likes_it(saved):
    import timm

    folder = saved("timm-vit")
    created = made(library="timm", name=str(folder), image_size=24, **VISION)
    wanted = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=24).eval()
    assert torch.equal(logits(created.model, created.spec), logits(wanted, created.spec))


def test_positions_of_the_same_grid_are_the_same_tensor():
    positions = torch.randn(1, 6, 4)  # class and distillation token, 2 × 2 patches
    assert resample(positions, (2, 2)) is positions
    assert torch.equal(resample(positions, (3, 5))[:, :2], positions[:, :2])
    assert resample(positions, (3, 5)).shape == (1, 17, 4)
    with pytest.raises(ModelError, match="cannot be resampled"):
        resample(torch.zeros(4, 4), (2, 2))


def test_an_image_smaller_than_a_patch_is_refused(saved):
    with pytest.raises(ModelError, match="images of 4 pixels hold no patch of 8 × 8"):
        made(library="transformers", name=str(saved("vit")), image_size=4, **VISION)


def test_the_preprocessing_of_a_checkpoint_is_taken_over(saved):
    folder = saved("vit")
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    image = made(library="transformers", name=str(folder), **VISION).spec.image
    assert image == {"size": 16, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    assert json.loads(preprocessing.preprocessor_json(image, "vit"))["resample"] == 3
    (folder / "preprocessor_config.json").unlink()
    assert made(library="transformers", name=str(folder), **VISION).notes[-1].endswith("a mean and std of 0.5")


def test_loading_says_nothing_by_itself(saved, capfd):
    made(library="transformers", name=str(saved("vit")), **{**VISION, "label_names": ["a", "b"]})
    made(library="timm", name=str(saved("timm-vit")), **{**VISION, "label_names": ["a", "b"]})
    assert capfd.readouterr() == ("", "")


def refused(match: str, **arguments) -> ModelError:
    with pytest.raises(ModelError, match=match) as caught:
        made(**{"library": "transformers", "config": None, **VISION, **arguments})
    return caught.value


def test_a_missing_folder_is_named_with_what_to_do(tmp_path):
    error = refused(f"there is no folder {tmp_path}/nowhere", name=f"{tmp_path}/nowhere")
    assert "--set model.name=DIR" in str(error.hint)


def test_a_truncated_file_is_named(saved):
    folder = saved("vit")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(r"model\.safetensors is truncated or damaged", name=str(folder))
    weights.unlink()
    refused(r"has no model\.safetensors", name=str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(r"model-00001-of-00002\.safetensors is missing", name=str(folder))


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_the_pointer_of_git_lfs_is_told_from_damage(saved, name):
    folder = saved(name)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    library = "timm" if name.startswith("timm") else "transformers"
    error = refused("only the pointer of git LFS", library=library, name=str(folder))
    assert error.hint == "git lfs pull, in that folder"


def test_pickled_weights_are_refused(saved):
    folder = saved("vit")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in str(refused("a pickle; RECAP reads safetensors only", name=str(folder)).hint)


def test_weights_that_do_not_belong_to_their_configuration_are_named(saved):
    folder = saved("vit")
    tensors = load_file(folder / "model.safetensors")
    shortened = {**tensors, "vit.layers.0.mlp.fc1.weight": torch.zeros(40, 32)}
    save_file(shortened, folder / "model.safetensors", {"format": "pt"})
    refused(r"vit\.layers\.0\.mlp\.fc1\.weight is of another shape", name=str(folder))
    del tensors["vit.layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(r"vit\.layernorm\.weight is missing", name=str(folder))


def test_timm_weights_that_do_not_fit_are_named(saved):
    folder = saved("timm-vit")
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.1.attn.qkv.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(r"blocks\.1\.attn\.qkv\.weight is missing", library="timm", name=str(folder))


def test_an_unknown_model_type_names_the_adapters_and_how_to_add_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    error = refused(r"model type 'mamba' is unknown: .*bert, .*deit, dinov2.*timm-vit", name=str(tmp_path))
    assert "recap.adapters" in str(error.hint)
    (tmp_path / "config.json").write_text("{}")
    refused(r"config\.json names no model_type", name=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert refused(r"config\.json cannot be read", name=str(tmp_path)).hint == checkpoints.CONFIG_HINT
    (tmp_path / "config.json").write_text("[]")
    assert refused(r"holds no JSON object, but a list", name=str(tmp_path)).hint == checkpoints.CONFIG_HINT


def test_configurations_with_mistakes_are_refused():
    error = refused("no configuration key 'hiden_size'", config={"model_type": "vit", "hiden_size": 32})
    assert error.hint == "did you mean hidden_size?"
    refused("no configuration of a vit", config={"model_type": "vit", "hidden_size": "wide"})
    refused("names no model_type", config={})
    refused("exactly one of", config=None)
    error = refused("hidden_act of this vit is 'gelo'", config={"model_type": "vit", "hidden_act": "gelo"})
    assert error.hint == "did you mean gelu?"
    refused("weights of a vit are float32, not float16", config={"model_type": "vit", "torch_dtype": "float16"})
    refused("dtype of this vit is 'nope'", config={"model_type": "vit", "dtype": "nope"})
    refused("num_hidden_layers of this vit is 1,000,000", config={"model_type": "vit", "num_hidden_layers": 10**6})
    refused("image-classification needs 2 labels at least", config={"model_type": "vit"}, label_names=["a"])


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "intermediate_size", "patch_size", "num_channels"])
def test_a_size_of_nothing_is_named(key):
    error = refused(f"{key} of this vit is 0; expected 1 or more", config={"model_type": "vit", key: 0})
    assert (error.exit_code, error.hint) == (5, transformers_models.CONFIG_HINT)


@pytest.mark.parametrize(
    ("name", "wanted"), [("bert", 40), ("distilbert", 40), ("electra", 40), ("roberta", 39), ("vit", None)]
)
def test_positions_are_those_that_the_model_runs_with(name, wanted):
    model, spec = pico(name)
    assert build.positions(spec) == wanted
    if wanted is not None:
        ids = torch.full((1, wanted), 7)
        assert logits_for(spec)(model, {"input_ids": ids}).shape == (1, 3)
        with pytest.raises((IndexError, RuntimeError)):
            logits_for(spec)(model, {"input_ids": torch.full((1, wanted + 1), 7)})


def test_a_model_for_another_task_is_refused(saved):
    refused("no bert for image-classification", name=str(saved("bert")))
    refused("no vit for text-classification", name=str(saved("vit")), **TEXT)
    refused("timm has no models for text-classification", library="timm", name="vit_tiny_patch16_224", **TEXT)


def test_timm_architectures_with_mistakes_are_refused(saved):
    error = refused("no architecture 'vit_tny_patch16_224'", library="timm", name="vit_tny_patch16_224")
    assert "vit_tiny_patch16_224" in str(error.hint)
    refused("depht", library="timm", config={"architecture": "vit_tiny_patch16_224", "depht": 1})
    error = refused("timm cannot build", library="timm", config={"architecture": "vit_tiny_patch16_224", "num_heads": 0})
    assert "model.config" in str(error.hint)
    refused("names no timm architecture", library="timm", name=str(saved("vit")))
    refused("'timm-resnet' is unknown", library="timm", config={"architecture": "resnet18"})


def test_a_text_model_without_a_tokenizer_is_refused(saved):
    folder = saved("bert")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused("has no tokenizer", name=str(folder), **TEXT)


def test_an_unreachable_hub_is_told_from_a_model_that_is_not_there(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "--set model.name=DIR" in str(refused("hub cannot be reached", name="google/vit-base-patch16-224").hint)
    refused("hub cannot be reached", library="timm", name="vit_tiny_patch16_224")


def test_files_from_the_hub_are_read_as_a_folder(saved, monkeypatch):
    import huggingface_hub

    folder, asked = saved("vit"), {}

    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    created = made(library="transformers", name="org/vit", revision="v2", **VISION)
    assert (asked["name"], asked["revision"], created.new) == ("org/vit", "v2", ())
    assert not any(pattern.endswith((".bin", "*")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("propagates", [False, True], ids=["own-handler", "and-those-of-the-process"])  # as in CI
def test_quiet_silences_warnings_of_the_libraries_and_gives_them_their_voice_back(propagates, monkeypatch):
    import logging

    from transformers.utils import logging as hf_logging

    loggers = hf_logging.get_logger("transformers.modeling_utils"), logging.getLogger("timm.models._builder")
    (handler,) = [one for one in logging.getLogger("transformers").handlers if one is hf_logging._default_handler]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", propagates)
    own, process = [], []
    shouted = logging.Handler()
    shouted.emit = lambda record: process.append(record.getMessage())
    logging.getLogger().addHandler(shouted)
    monkeypatch.setattr(handler, "emit", lambda record: own.append(record.getMessage()))
    try:
        for number, silence in enumerate((nullcontext, checkpoints.quiet_timm, nullcontext)):
            with silence():
                assert hf_logging.is_progress_bar_enabled() is (silence is nullcontext)
                for logger in loggers:
                    logger.warning(f"{logger.name} {number}")
                    logger.error(f"{logger.name} {number}!")
                logging.getLogger("mine").warning(f"mine {number}")
    finally:
        logging.getLogger().removeHandler(shouted)

    def said(*names):
        every = [f"{name} {number}{mark}" for number in (0, 1, 2) for name in names for mark in ("", "!")]
        return [text for text in every if not text.endswith("1")]  # a warning while all is silent

    transformers, timm = (logger.name for logger in loggers)
    assert own == said(transformers)
    assert [text for text in process if not text.startswith("mine")] == said(*((transformers, timm) if propagates else (timm,)))
    assert [text for text in process if text.startswith("mine")] == ["mine 0", "mine 1", "mine 2"]


def labelled(folder: Path, names: list[str]) -> torch.Tensor:
    """Gives a saved vit a head of these labels; its weights."""
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["id2label"] = dict(sorted(config["id2label"].items()))
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    weight = torch.randn(len(names), 32, generator=torch.Generator().manual_seed(0))
    tensors = {**load_file(folder / "model.safetensors"), "classifier.weight": weight, "classifier.bias": weight[:, 0].clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return weight


def created_for(folder: Path, labels: list[str]) -> Created:
    return made(library="transformers", name=str(folder), **{**VISION, "label_names": labels})


def test_the_labels_of_a_head_are_in_the_order_of_their_numbers_however_a_file_has_them(saved):
    names = [f"class {number:02}" for number in range(12)]
    folder = saved("vit")
    weight = labelled(folder, names)
    assert list(json.loads((folder / "config.json").read_text())["id2label"])[:3] == ["0", "1", "10"]
    created = created_for(folder, names)
    assert created.notes == ("the head of the checkpoint is kept",)
    assert torch.equal(created.model.classifier.weight, weight)


@pytest.mark.parametrize(
    ("own", "labels", "places"),
    [
        ([">50K", "<=50K"], ["<=50K", ">50K"], [1, 0]),
        (["-", "+"], ["+", "-"], [1, 0]),
        (["C#", "C", "C++"], ["C", "C#", "C++"], [1, 0, 2]),
        (["😢", "😀"], ["😀", "😢"], [1, 0]),
        (["1", "0", "-1"], ["-1", "0", "1"], [2, 1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["sea_lion", "wolf"], ["Wolf", "sea lion"], [1, 0]),
    ],
)
def test_labels_of_a_head_are_told_apart_by_their_signs(saved, own, labels, places):
    folder = saved("vit")
    weight = labelled(folder, own)
    created = created_for(folder, labels)
    assert created.new == ()
    assert "in the order of the data" in created.notes[0]
    assert torch.equal(created.model.classifier.weight, weight[places])


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (["+", "-"], ["plus", "minus"]),
        (["-1", "0"], ["0", "1"]),
        (["up -1", "up 0"], ["up 0", "up 1"]),
        (["a b", "a-b"], ["A B", "a_b"]),
    ],
)
def test_labels_of_a_head_that_may_be_others_get_a_new_one(saved, own, labels):
    folder = saved("vit")
    labelled(folder, own)
    created = created_for(folder, labels)
    assert set(created.new) == {"classifier.weight", "classifier.bias"}
    assert "is for other labels" in created.notes[0]


def gpt2(layers: int = 2) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    with torch.device("meta"):
        return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=64))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("buffers", [("attn.bias", "attn.masked_bias"), ("attn.rotary_emb.inv_freq", "attn.attention.bias")])
def test_buffers_that_older_releases_wrote_into_the_blocks_are_told(prefix, buffers):
    unexpected = [f"{prefix}h.{number}.{name}" for number in range(2) for name in buffers]
    (note,) = unexpected_weights.notes(gpt2(), unexpected, "DIR")
    assert note.startswith(f"ignored weights that this model does not have: {prefix}h.0.attn.")


@pytest.mark.parametrize(
    "name", ["h.2.attn.bias", "h.2.mlp.c_fc.weight", "transformer.h.1.attn.q_norm.weight", "h.0.ls1.gamma"]
)
def test_weights_of_blocks_that_a_model_lacks_are_refused(name):
    with pytest.raises(ModelError, match=f"has no {name}"):
        unexpected_weights.notes(gpt2(), [name], "DIR")


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_a_model_on_meta_is_one_of_its_own_each_time(name):
    _, spec = pico(name)
    first, second = build.on_meta(spec), build.on_meta(spec)
    names = {parameter for parameter, _ in first.named_parameters()}
    assert all(tensor.is_meta for tensor in build.tensors_of(first).values())
    for module in first.modules():
        module.register_parameter("mine", torch.nn.Parameter(torch.zeros(1)))
    assert {parameter for parameter, _ in second.named_parameters()} == names
    assert {parameter for parameter, _ in build.on_meta(spec).named_parameters()} == names


def test_weights_that_do_not_fit_into_main_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("Cannot allocate memory (os error 12)")

    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    monkeypatch.setattr(checkpoints, "safe_open", full)
    with pytest.raises(ModelError, match=r"model\.safetensors is larger than the memory that is left"):
        checkpoints.check_weights(tmp_path)


def test_positions_without_a_class_token_are_all_patches() -> None:
    positions = torch.randn(1, 16, 4)  # as of Swin with absolute embeddings
    assert resample(positions, (4, 4)) is positions
    assert resample(positions, (2, 3)).shape == (1, 6, 4)
