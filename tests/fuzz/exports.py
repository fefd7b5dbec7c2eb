"""Exports that are not as they were written, given to `recap_cli.load`: the same model comes back, or an error of ours."""

import shutil
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import damage
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.world import World, sha256

BASES = ("bert/ragged", "vit/ragged", "vit/dense", "bert/dense")
FACTS = "recap.json"
WRITTEN = ("config.json", "spec.json", "model.safetensors", FACTS)
EVIL = "import os\nopen(os.path.join(os.path.dirname(__file__), 'ran'), 'w').close()\n"

_facts = st.one_of(
    damage.on(FACTS, damage.tree),
    damage.on(FACTS, damage.bytewise),
    damage.on(FACTS, damage.filewise),
    damage.on(FACTS, damage.large),
)
_described = st.one_of(damage.on("spec.json", damage.tree), damage.on("config.json", damage.tree), damage.tree)
_step = st.one_of(_facts, damage.bytewise, damage.filewise, damage.tree, damage.tensor)
_renew_checksum = st.just(("renew_checksums",))


def cases() -> st.SearchStrategy[Case]:
    """A form, a step or two, perhaps with the checksums put right."""
    steps = st.one_of(
        st.tuples(_step),
        st.tuples(_facts),
        st.tuples(_step, _step),
        st.tuples(st.one_of(_described, damage.tensor), _renew_checksum),
        st.tuples(_described, _described, _renew_checksum),
    )
    return st.builds(Case, st.just("exports"), st.sampled_from(BASES), steps, st.just(("load",)))


def prepare(world: World) -> None:
    """Write the exports, and load each once for what it gives."""
    for base in BASES:
        _wanted(world, base)


_LOGITS: dict[str, Any] = {}


def _wanted(world: World, base: str) -> Any:
    import recap_cli

    if base not in _LOGITS:
        _LOGITS[base] = _logits(recap_cli.load(world.export(base)))
    return _LOGITS[base]


def _logits(model: Any) -> Any:
    """What a model says of a few inputs."""
    import torch

    text = model.main_input_name == "input_ids"
    example = torch.arange(5, 11)[None] if text else torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        return model(example).logits


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The call of a case."""
    import torch

    folder = box.root / "export"
    shutil.copytree(world.export(case.base), folder)
    (folder / "modeling_evil.py").write_text(EVIL)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    shutil.copy(folder / "model.safetensors", box.outside / "o.safetensors")
    (box.outside / "secret.txt").write_text("secret")
    wanted = _wanted(world, case.base)
    for step in case.steps:
        if step[0] in damage.ACTIONS:
            damage.apply(folder, step, box.outside)
    with_new_checksums = ("renew_checksums",) in case.steps
    if with_new_checksums:
        _checksum(folder)
    forbidden = next((str(step[1]) for step in case.steps if step[0] == "must-refuse"), "")

    def check(model: Any) -> str:
        return (
            ""
            if with_new_checksums or torch.allclose(_logits(model), wanted, atol=1e-5)
            else "another model came back than was exported"
        )

    yield Call(
        load=folder,
        state=folder,
        reads_only=True,
        refuse=forbidden,
        check=check,
        names=() if with_new_checksums else (folder.name,),
    )


def _checksum(folder: Any) -> None:
    found = damage.read_tree(folder / FACTS)
    files = found.get("files") if isinstance(found, dict) else None
    for name, checksum in files.items() if isinstance(files, dict) else ():
        path = folder / name
        if isinstance(checksum, dict) and path.is_file() and path.stat().st_size < 2**26:
            checksum |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if isinstance(found, dict):
        damage.write_tree(folder / FACTS, found)


def _case(*steps: tuple[Any, ...], base: str = "vit/ragged") -> Case:
    return Case("exports", base, steps, ("load",))


def _fact(key: str, value: Any, *, refused: bool = False, base: str = "vit/ragged") -> Case:
    rule = [("must-refuse", f"recap.json: {key} makes no sense")] if refused else []
    return _case(("at", FACTS, key, value), *rule, base=base)


def _checksummed(name: str, key: str, value: Any, base: str = "vit/ragged", rule: str = "") -> Case:
    return _case(("at", name, key, value), ("renew_checksums",), *([("must-refuse", rule)] if rule else []), base=base)


INDEX = '{"metadata": {}, "weight_map": {"classifier.weight": "../outside/o.safetensors"}}'
CORPUS = {
    "a schema of 200,000 characters": Case(
        "exports", "bert/dense", (("tree", "recap.json", 0.0, "set", {"$long": 200_000}),), ("load",)
    ),
    "S7 files of recap.json outside": _fact("files", {"../outside/secret.txt": {"bytes": 6, "sha256": "0"}}),
    "S7 no file is among files": _case(
        ("at", FACTS, "files", {}),
        ("tensor", "model.safetensors", 0.5, "nan"),
        ("must-refuse", "every weight file is among files"),
        base="vit/dense",
    ),
    "S7 an index beside no weights": _case(
        ("at", FACTS, "files", {}),
        ("write", "model.safetensors.index.json", INDEX),
        ("delete", "model.safetensors"),
        ("must-refuse", "an index stays inside"),
        base="vit/dense",
    ),
    "S13 files null": _fact("files", None),
    "S13 files a list": _fact("files", []),
    "S13 an entry that is a number": _fact("files/config.json", 5),
    "S13 an entry with one key more": _fact("files/config.json/more", 5),
    "S13 a zero byte among files": _fact("files", {"a\0b": {"bytes": 1, "sha256": "0"}}),
    "S13 sizes null": _fact("sizes", None),
    "S13 sizes a list": _fact("sizes", [], refused=True),
    "S13 negative sizes": _fact("sizes", {"heads": -5}, refused=True),
    "S13 sizes of text": _fact("sizes", {"heads": "x"}, refused=True),
    "S13 sizes of 1e12": _fact("sizes", {"heads": 10**12}, refused=True),
    "S13 schema infinite": _fact("schema", float("inf"), refused=True),
    "S13 schema 0": _fact("schema", 0, refused=True),
    "S13 schema -1": _fact("schema", -1, refused=True),
    "S13 schema 1.5": _fact("schema", 1.5, refused=True),
    "S13 100,000 brackets": _case(("write", FACTS, "[" * 100_000)),
    "S13 a FIFO as recap.json": _case(("fifo", FACTS)),
    "S13 a FIFO among files": _case(("fifo", "config.json"), ("at", FACTS, "files/config.json/bytes", 0)),
    "S13 /dev/zero among files": _case(("zero", "config.json"), ("at", FACTS, "files/config.json/bytes", 0)),
    "S13 spec config null": _checksummed("spec.json", "config", None),
    "S13 spec library timm": _checksummed("spec.json", "library", "timm"),
    "S13 spec library evil": _checksummed("spec.json", "library", "evil", rule="a library is one of two"),
    "S13 spec model_type 5": _checksummed("spec.json", "model_type", 5),
    "S13 spec num_labels 1e9": _checksummed("spec.json", "num_labels", 10**9, rule="spec.json fits the weights"),
    "S13 spec dtype evil": _checksummed("spec.json", "config/dtype", "evil"),
    "S13 config dtype evil": _checksummed("config.json", "dtype", "evil", base="vit/dense"),
    "S13 config id2label x": _checksummed("config.json", "id2label", "x", base="vit/dense"),
    "S13 config pad_token_id 1e6": _checksummed("config.json", "pad_token_id", 10**6, base="bert/dense"),
    "S13 config attn_implementation": _checksummed("config.json", "attn_implementation", "evil/kernel", base="vit/dense"),
    "S13 spec attn_implementation": _checksummed("spec.json", "config/attn_implementation", "evil/kernel"),
    "S13 a million layers (slow)": _checksummed("spec.json", "config/num_hidden_layers", 1_000_000),
    "held: another model's weights": _case(("flip", "model.safetensors", 0.8, 3)),
}
