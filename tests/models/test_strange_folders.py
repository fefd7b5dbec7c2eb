"""Model folders and exports of strangers: damaged, huge, deep, or leading elsewhere; each a ModelError, and none waited for."""

import faulthandler
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import recap_cli
from recap_cli.errors import ModelError
from recap_cli.models import build, conformance, create
from tests.models.test_export import Small, uniform
from tests.pico import LABELS, pico, source_for, write_tokenizer

SECONDS = 120  # against a test that waits for ever; each takes below one
DEEP = "[" * 100_000
WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def nothing_is_waited_for() -> Iterator[None]:
    """A library that waits for a pipe hears no signal: the whole process ends then, with a traceback."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per pico model, as its library writes it; and an export per form."""
    root = tmp_path_factory.mktemp("folders")
    processor = write_tokenizer(root / "tokenizer")
    for name in ("bert", "vit", "timm-vit"):
        model, spec = pico(name)
        (root / name).mkdir()
        for file, content in build.describe(spec, None if spec.image else processor).items():
            (root / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        save_file(model.state_dict(), root / name / WEIGHTS, {"format": "pt"})
    Small("bert").export(root / "ragged")
    Small("bert").export(root / "dense", dense=True)
    Small("timm-vit").export(root / "timm", dense=True)
    Small("vit", uniform).export(root / "stock")
    return root


def values(file: str, **given: Any) -> Change:
    """Sets keys of a JSON file; a dot in a key leads into an object."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        for key, value in given.items():
            outer, inside, inner = key.partition("__")
            (found[outer] if inside else found)[inner if inside else key] = value
        (folder / file).write_text(json.dumps(found))

    return change


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content)


def fifo(file: str) -> Change:
    return lambda folder: ((folder / file).unlink(missing_ok=True), os.mkfifo(folder / file))


def index(content: str) -> Change:
    return lambda folder: ((folder / WEIGHTS).rename(folder / SHARD), (folder / INDEX).write_text(content))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return rewrite


def config(**given: Any) -> Change:
    return values("config.json", **given)


def made(folder: Path, name: str) -> create.Created:
    kind = "text-classification" if name == "bert" else "image-classification"
    library = "timm" if name == "timm-vit" else "transformers"
    created = create.create_model(source_for(kind, library, name=str(folder), label_names=LABELS))  # type: ignore[arg-type]
    conformance.check(created.model, build.adapter_of(created.spec), created.spec)
    return created


FOLDERS: list[tuple[str, Change, str]] = [
    ("bert", text("config.json", DEEP), r"config\.json is nested too deeply"),
    ("bert", text("config.json", f'{{"model_type": "bert", "x": {"[" * 60}{"]" * 60}}}'), "nested more than 50 deep"),
    ("bert", text("config.json", "\0"), r"config\.json cannot be read"),
    ("bert", fifo("config.json"), r"config\.json is no ordinary file"),
    ("bert", fifo(WEIGHTS), r"model\.safetensors is no ordinary file"),
    ("bert", fifo("generation_config.json"), r"generation_config\.json is no ordinary file"),
    ("bert", fifo("special_tokens_map.json"), r"special_tokens_map\.json is no ordinary file"),
    ("bert", index("[]"), r"index\.json holds no JSON object, but a list"),
    ("bert", index(DEEP), r"index\.json is nested too deeply"),
    ("bert", index('{"weight_map": {"a": 5}}'), "names 5, which is no safetensors file in the same folder"),
    ("bert", index('{"weight_map": {"a": "../bert/model.safetensors"}}'), "no safetensors file in the same folder"),
    ("bert", index('{"weight_map": {"a": "/tmp/model.safetensors"}}'), "no safetensors file in the same folder"),
    ("bert", index('{"weight_map": {"a": "weights.bin"}}'), "no safetensors file in the same folder"),
    ("bert", index('{"weight_map": {}}'), "does not name the files of the weights"),
    ("bert", lambda f: (index(f'{{"weight_map": {{"a": "{SHARD}"}}}}')(f), fifo(SHARD)(f)), "is no ordinary file"),
    ("bert", config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "are quantized"),
    ("bert", config(quantization_config={"quant_method": "gptq", "bits": 4}), "are quantized"),
    ("bert", config(id2label="x"), "no configuration of a bert"),
    ("bert", config(id2label={"a": "b"}), "no configuration of a bert"),
    ("bert", config(sub_configs=5), "sub_configs is no setting of a bert"),
    ("bert", config(to_dict=5), "to_dict is no setting of a bert"),
    *[
        (name, config(**{key: "nope"}), "is 'nope', which is not a type")
        for name in ("bert", "vit")
        for key in ("dtype", "torch_dtype")
    ],
    ("bert", config(pad_token_id=10**6), "pad_token_id of this bert is 1000000, and its vocabulary has the tokens 0 to 63"),
    ("bert", config(hidden_size=10**9), "hidden_size of this bert is 1,000,000,000; expected at most 1,000,000"),
    ("bert", config(vocab_size=10**12), "vocab_size of this bert is 1,000,000,000,000; expected at most 100,000,000"),
    ("bert", config(hidden_size=1_000_000, intermediate_size=1_000_000), "GB of weights, but this machine"),
    ("bert", config(intermediate_size=1_000_000), r"has 130,\d{3},\d{3} weights, but its files hold"),
    ("bert", config(num_hidden_layers=10**6), "num_hidden_layers of this bert is 1,000,000; expected at most 1,000"),
    ("bert", config(num_labels=10**9), "num_labels of this bert is 1,000,000,000"),
    ("bert", config(num_hidden_layers=1), r"config\.json, which has no bert\.encoder\.layer\.1\..* and \d+ more"),
    ("vit", config(num_hidden_layers=1), r"config\.json, which has no vit\.layers\.1\..* and \d+ more"),
    ("timm-vit", config(model_args__depth=1), r"config\.json, which has no blocks\.1\..* and \d+ more"),
    ("bert", weights(lambda t: t.update({"bert.encoder.layer.0.extra.weight": torch.ones(2)})), r"no .*layer\.0\.extra"),
    (
        "bert",
        weights(lambda t: t.update({n: w.to(torch.int8) for n, w in t.items() if n.endswith("query.weight")})),
        r"query\.weight is quantized \(I8\)",
    ),
    ("bert", text("adapter_config.json", '{"peft_type": "LORA"}'), "holds an adapter of PEFT"),
    ("bert", text("tokenizer.json", DEEP), "tokenizer in .* cannot be loaded"),
    ("bert", text("tokenizer.json", '{"a":' * 200 + "1" + "}" * 200), "tokenizer in .* cannot be loaded"),
    ("bert", text("tokenizer.json", "{}"), "tokenizer in .* cannot be loaded"),
    ("bert", text("tokenizer_config.json", DEEP), "tokenizer in .* cannot be loaded"),
    ("bert", text("tokenizer_config.json", "5"), "tokenizer in .* cannot be loaded"),
    ("vit", values("preprocessor_config.json", image_mean=["x", 0, 0]), r"preprocessor_config\.json: expected numbers as mean"),
    (
        "vit",
        values("preprocessor_config.json", image_mean=[10**400, 0, 0]),
        r"preprocessor_config\.json: expected numbers as mean",
    ),
    ("vit", values("preprocessor_config.json", image_std=[0, 0, 0]), "expected standard deviations above 0"),
    ("vit", values("preprocessor_config.json", resample=-99), "resample is -99; expected 0 to 5"),
    ("vit", text("preprocessor_config.json", DEEP), r"preprocessor_config\.json is nested too deeply"),
    ("timm-vit", config(model_args__depth=10**6), "depth of this vit_tiny_patch16_224 is 1,000,000; expected at most 1,000"),
    ("timm-vit", config(model_args__mlp_ratio=float("nan")), "mlp_ratio .* is nan, which no model has"),
    ("timm-vit", config(model_args__checkpoint_path="evil.pth"), "checkpoint_path is an argument of"),
    ("timm-vit", config(model_args__embed_dim=1_000_000), "GB of weights, but this machine"),
    ("timm-vit", config(model_args=5), "model_args in .* is no object, but a int"),
    ("timm-vit", config(pretrained_cfg=5), "pretrained_cfg in .* is no object, but a int"),
    ("timm-vit", config(pretrained_cfg__interpolation="x"), "the interpolation is 'x'"),
]


@pytest.mark.parametrize(("name", "change", "problem"), FOLDERS, ids=[problem for *_, problem in FOLDERS])
def test_a_folder_that_is_no_model_is_refused(folders, tmp_path, name, change, problem):
    folder = shutil.copytree(folders / name, tmp_path / "model")
    change(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        made(folder, name)
    assert caught.value.exit_code == 5
    assert caught.value.hint


@pytest.mark.parametrize(
    "given",
    [
        {"torch_dtype": "float16"},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"auto_map": {"AutoConfig": "evil.Evil"}},
    ],
)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_a_configuration_says_of_code_and_types_is_left_out(folders, tmp_path, name, given):
    folder = shutil.copytree(folders / name, tmp_path / "model")
    config(**given)(folder)
    created = made(folder, name)
    assert created.model.config._attn_implementation in ("eager", "sdpa")
    assert {param.dtype for param in created.model.parameters()} == {torch.float32}
    assert "evil" not in json.dumps({key: value for key, value in created.spec.config.items() if key != "auto_map"})


def test_weights_of_another_tasks_head_are_left_out_with_a_note(folders, tmp_path):
    folder = shutil.copytree(folders / "bert", tmp_path / "model")
    weights(lambda t: t.update({"cls.predictions.bias": torch.ones(64), "cls.seq_relationship.weight": torch.ones(2, 32)}))(
        folder
    )
    notes = made(folder, "bert").notes
    assert notes[1:] == ("ignored weights that this model does not have: cls.predictions.bias, cls.seq_relationship.weight",)


def test_a_bare_encoder_of_more_layers_than_its_configuration_says_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "bert", tmp_path / "model")
    bare = {name.removeprefix("bert."): t for name, t in load_file(folder / WEIGHTS).items() if name.startswith("bert.")}
    save_file(bare, folder / WEIGHTS, {"format": "pt"})
    assert made(folder, "bert").new
    config(num_hidden_layers=1)(folder)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\."):
        made(folder, "bert")


def facts(**given: Any) -> Change:
    return values("recap.json", **given)


def entry(name: str, checksum: Any) -> Change:
    def change(folder: Path) -> None:
        about = json.loads((folder / "recap.json").read_text())
        about["files"][name] = checksum
        (folder / "recap.json").write_text(json.dumps(about))

    return change


def checksummed(*changes: Change) -> Change:
    """Changes an export, and seals it anew, as whoever wrote it could."""

    def change(folder: Path) -> None:
        for each in changes:
            each(folder)
        checksums = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
            if path.name != "recap.json" and path.is_file()
        }
        facts(files=checksums)(folder)

    return change


def spec(**given: Any) -> Change:
    return checksummed(values("spec.json", **given))


def linked(file: str, target: str) -> Change:
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to(target))


def outside(folder: Path) -> None:
    """The weights lie beside the export, and an index of the export names them there."""
    (folder / WEIGHTS).rename(folder.parent / "o.safetensors")
    names = dict.fromkeys(load_file(folder.parent / "o.safetensors"), "../o.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


CHECKSUM = {"bytes": 0, "sha256": "0" * 64}
EXPORTS: list[tuple[str, Change, str]] = [
    *[("ragged", facts(files=files), "files is not an object with a checksum for each name") for files in (None, [], 5)],
    ("ragged", facts(files={}), "has no checksum in recap.json"),
    *[
        ("ragged", entry("spec.json", checksum), "the checksum of spec.json is not bytes")
        for checksum in (5, {**CHECKSUM, "more": 1}, [])
    ],
    *[
        ("ragged", entry(name, CHECKSUM), "is no file in the same folder")
        for name in ("../secret.txt", "/etc/hostname", "a\0b", "", "..")
    ],
    *[
        ("ragged", facts(sizes=sizes), "sizes are a number for each axis")
        for sizes in (None, [], {"heads": -5}, {"heads": "x"})
    ],
    *[("ragged", facts(sizes=sizes), "are none of this bert") for sizes in ({}, {"heads": 10**12})],
    *[
        ("ragged", facts(schema=schema), "is not what recap export wrote: its schema is")
        for schema in (float("inf"), 0, -1, 1.5, "1", None, True)
    ],
    *[("ragged", facts(form=form), "form is ") for form in ("evil", None, 5)],
    ("ragged", text("recap.json", DEEP), r"recap\.json is nested too deeply"),
    ("ragged", text("recap.json", "[]"), "holds no JSON object, but a list"),
    ("ragged", fifo("recap.json"), r"recap\.json is no ordinary file"),
    ("ragged", linked("recap.json", "/dev/zero"), r"recap\.json is no ordinary file"),
    ("ragged", lambda f: os.truncate(f / "recap.json", 10**12), "bytes; expected at most"),
    ("ragged", fifo("spec.json"), r"spec\.json is no ordinary file"),
    ("ragged", lambda f: (linked("spec.json", "/dev/zero")(f), entry("spec.json", CHECKSUM)(f)), "is no ordinary file"),
    (
        "ragged",
        lambda f: ((f / WEIGHTS).rename(f.parent / "o"), (f / WEIGHTS).symlink_to("../o")),
        "is a link to a file outside",
    ),
    ("dense", lambda f: (outside(f), facts(files={})(f)), "has no checksum in recap.json"),
    ("dense", checksummed(outside), "is no safetensors file in the same folder"),
    ("dense", text("adapter_config.json", "{}"), r"adapter_config\.json has no checksum"),
    ("timm", text("pytorch_model.bin", "x"), r"pytorch_model\.bin has no checksum"),
    *[
        ("ragged", spec(**{key: value}), rf"spec\.json is no description of a model: {problem}")
        for key, value, problem in (
            ("library", "evil", "library"),
            ("library", "timm", "config names no architecture"),
            ("config", None, "config or forward"),
            ("model_type", 5, "model_type"),
            ("model_type", "vit", "model_type"),
            ("num_labels", 10**9, "num_labels is 1000000000, for 3 label_names"),
            ("label_names", None, "label_names"),
            ("task_kind", 5, "task_kind"),
            ("auto_class", None, "auto_class is None"),
            ("auto_class", "PreTrainedModel", "auto_class is 'PreTrainedModel'"),
            ("image", {}, "image"),
        )
    ],
    ("stock", spec(image=None), "image is missing"),
    ("timm", spec(image=None), "image is missing"),
    ("stock", spec(image__mean=["x", 0, 0]), "image has mean"),
    ("stock", spec(image__size=10**9), "image has size"),
    ("ragged", checksummed(text("spec.json", DEEP)), r"spec\.json cannot be read"),
    ("ragged", spec(config__num_hidden_layers=10**6), "num_hidden_layers of this bert is 1,000,000"),
    ("ragged", spec(config__hidden_size=4096), r"has shape \(32,\); expected \(4096,\)"),
    ("ragged", spec(config__id2label="x"), "no configuration of a bert"),
    ("ragged", spec(config__quantization_config={"quant_method": "gptq"}), "are quantized"),
    ("dense", checksummed(config(hidden_size=10**9)), "hidden_size of this bert is 1,000,000,000"),
    ("dense", checksummed(config(intermediate_size=1_000_000)), "weights, but its files hold"),
    ("dense", checksummed(config(pad_token_id=10**6)), "pad_token_id of this bert is 1000000"),
    ("dense", checksummed(config(num_hidden_layers=1)), "cannot hold bert.encoder.layer.1"),
    ("dense", checksummed(text("config.json", DEEP)), r"config\.json is nested too deeply"),
    ("dense", checksummed(config(quantization_config={"quant_method": "bitsandbytes"})), "are quantized"),
    (
        "timm",
        checksummed(config(pretrained_cfg__file="/etc/hostname")),
        "pretrained_cfg in config.json does not fit spec.json",
    ),
    ("timm", checksummed(config(model_args__depth=1)), "model_args in config.json does not fit spec.json"),
    ("timm", checksummed(text(WEIGHTS, "x" * 100)), "truncated or damaged"),
    *[
        (
            form,
            checksummed(weights(lambda t: [w.fill_(float("nan")) for w in t.values() if w.is_floating_point()])),
            "not finite",
        )
        for form in ("ragged", "dense", "timm", "stock")
    ],
]


@pytest.mark.parametrize(("form", "change", "problem"), EXPORTS, ids=[f"{form}: {problem}" for form, _, problem in EXPORTS])
def test_an_export_that_is_none_of_ours_is_refused(folders, tmp_path, form, change, problem):
    folder = shutil.copytree(folders / form, tmp_path / "out")
    change(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        recap_cli.load(folder)
    assert caught.value.hint


@pytest.mark.parametrize("form", ["ragged", "dense", "stock"])
def test_an_export_chooses_no_attention_code(folders, tmp_path, form):
    folder = shutil.copytree(folders / form, tmp_path / "out")
    given = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    checksummed(config(**given), values("spec.json", **{f"config__{key}": value for key, value in given.items()}))(folder)
    loaded: Any = recap_cli.load(folder)
    assert loaded.config._attn_implementation in ("eager", "sdpa")


def test_an_export_in_the_hubs_cache_is_loaded_through_its_links(folders, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    shutil.copytree(folders / "ragged", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "README.md").write_text("a model card")
    assert recap_cli.load(snapshot)
