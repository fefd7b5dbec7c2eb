"""Model folders that `model.name` points to: hostile configurations, indices, weights, tokenizers and preprocessors."""

import shutil
from collections.abc import Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.exports import EVIL
from tests.fuzz.world import World

BASES = ("bert", "vit", "bert-sharded")
HEAD = ("classifier.", "bert.pooler.")  # of these a checkpoint may have none, or others

_config = damage.on("config.json", st.one_of(damage.tree, damage.tree, damage.bytewise, damage.filewise, damage.large))
_index = damage.on("model.safetensors.index.json", st.one_of(damage.tree, damage.bytewise, damage.filewise, damage.large))
_beside = st.one_of(
    *(
        damage.on(name, st.one_of(damage.tree, damage.bytewise, damage.large))
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
)
_looks = damage.on("preprocessor_config.json", st.one_of(damage.tree, damage.bytewise, damage.filewise))
_added = st.tuples(
    st.just("put"),
    st.just("config.json"),
    st.sampled_from(
        [
            "dtype",
            "torch_dtype",
            "id2label",
            "pad_token_id",
            "sub_configs",
            "quantization_config",
            "attn_implementation",
            "auto_map",
            "num_labels",
            "hidden_act",
            "architectures",
            "layer_types",
            "problem_type",
            "_name_or_path",
        ]
    ),
    st.one_of(
        st.sampled_from(
            [
                {"quant_method": "bitsandbytes"},
                {"quant_method": "gptq"},
                {"AutoModelForSequenceClassification": "modeling_evil.Evil"},
                "flash_attention_2",
                "evil/kernel",
                10**6,
            ]
        ),
        damage.hostile,
    ),
)
_any = st.one_of(damage.bytewise, damage.filewise, damage.tree, damage.tensor)


def cases() -> st.SearchStrategy[Case]:
    """A folder, and one or two steps."""
    step = st.one_of(_config, _added, _any, _any)
    by_base = {
        "bert": st.one_of(step, _beside),
        "vit": st.one_of(step, _looks),
        "bert-sharded": st.one_of(step, _index, _index),
    }
    return st.one_of(
        *(
            st.builds(
                Case,
                st.just("folders"),
                st.just(base),
                st.one_of(st.tuples(steps), st.tuples(steps, steps)),
                st.just(("init",)),
            )
            for base, steps in by_base.items()
        )
    )


def prepare(world: World) -> None:
    """Make the folders."""
    for base in BASES:
        world.checkpoint(base)


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The calls of a case: it is taken as a model, and as one that is to become small."""
    folder = box.root / "model"
    shutil.copytree(world.checkpoint(case.base), folder)
    (folder / "modeling_evil.py").write_text(EVIL)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    weights = world.checkpoint(case.base.partition("-")[0]) / "model.safetensors"
    shutil.copy(weights, box.outside / "o.safetensors")
    refuse = ""
    for step in case.steps:
        refuse = _damage(folder, step, box) or refuse
    values = world.recipe(case.base.partition("-")[0])
    values["model"], values["head"] = {"name": str(folder)}, {"warmup_epochs": 0}
    recipe = box.cwd / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    arguments = ("init", str(recipe), "--state", str(box.root / "state"))
    yield Call(
        arguments,
        state=folder,
        reads_only=True,
        refuse=refuse,
        names=(str(folder),),
        writes=(box.root / "state",),
    )
    data = world.data() / ("train" if case.base.startswith("vit") else "train.csv")
    yield Call(("compress", str(folder), "--data", str(data), "--dry-run"), state=folder, reads_only=True)


def _damage(folder: Any, step: tuple[Any, ...], box: Box) -> str:
    """Do a step; returns the rule that forbids to use what there is now."""
    if step[0] == "must-refuse":
        return str(step[1])
    if step[0] == "put":
        found = damage.read_tree(folder / step[1])
        if isinstance(found, dict):
            damage.write_tree(folder / step[1], {**found, step[2]: damage.unfold(step[3])})
        return ""
    if step[0] == "index":
        names = sorted(_names(folder / "model.safetensors"))
        place = str(box.outside / "o.safetensors") if step[1] == "absolute" else "../outside/o.safetensors"
        (folder / "model.safetensors").unlink()
        damage.write_tree(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(names, place)})
        return "an index names files of its own folder"
    before = {path: _names(path) for path in folder.glob("*.safetensors")} if step[0] == "tensor" else {}
    damage.apply(folder, step, box.outside)
    lost = [name for path, names in before.items() for name in names - _names(path) if not name.startswith(HEAD)]
    return "weights that the body of the model needs are missing" if lost else ""


def _names(path: Any) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return set()


def _case(*steps: tuple[Any, ...], base: str = "bert") -> Case:
    return Case("folders", base, steps, ("init",))


def _put(key: str, value: Any, base: str = "bert", name: str = "config.json") -> Case:
    return _case(("put", name, key, value), base=base)


HALF = ("must-refuse", "a checkpoint has more layers than its configuration")
CORPUS = {
    "S6 half of a checkpoint": _case(("put", "config.json", "num_hidden_layers", 1), HALF, base="vit"),
    "S6 half of a checkpoint of bert": _case(("put", "config.json", "num_hidden_layers", 1), HALF),
    "weights beyond the memory that is left": _case(("delete", 12), ("sparse", 37), base="vit"),
    "S7 an index that leads out": _case(("index", "relative")),
    "a tokenizer without its padding token": _case(("drop-line", "tokenizer_config.json", 0.5175)),
    "S7 an index with absolute names": _case(("index", "absolute"), base="vit"),
    "S13 a FIFO as a shard": _case(("fifo", "model-00001-of-*.safetensors"), base="bert-sharded"),
    "S15 an index that is a list": _case(("write", "model.safetensors.index.json", "[]"), base="bert-sharded"),
    "S15 a number as a shard": _case(("tree", "model.safetensors.index.json", 0.9, "set", 5), base="bert-sharded"),
    "S15 a deep index": _case(("write", "model.safetensors.index.json", "[" * 100_000), base="bert-sharded"),
    "S15 bitsandbytes": _put("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "S15 gptq": _put("quantization_config", {"quant_method": "gptq", "bits": 4}),
    "S15 flash attention": _put("attn_implementation", "flash_attention_2"),
    "S15 a deep tokenizer.json": _case(("write", "tokenizer.json", "[" * 100_000)),
    "S15 a deep config.json": _case(("write", "config.json", "[" * 100_000)),
    "S15 id2label x": _put("id2label", "x"),
    "S15 dtype nope": _put("dtype", "nope"),
    "S15 pad_token_id 1e6": _put("pad_token_id", 10**6),
    "S15 sub_configs 5": _put("sub_configs", 5),
    "S15 image_mean of text": _put("image_mean", ["x", 0, 0], "vit", "preprocessor_config.json"),
    "S15 resample -99": _put("resample", -99, "vit", "preprocessor_config.json"),
    "20,000 labels": _put("id2label", {"$wide": 20_000}),
    "a label of 200,000 characters": _put("id2label", {"0": "x" * 200_000, "1": "y"}),
    "a type of 200,000 characters": _put("model_type", {"$long": 200_000}),
    "held: auto_map": _put(
        "auto_map", {"AutoModelForSequenceClassification": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    ),
    "held: a pickle alone": _case(("delete", "model.safetensors")),
}
