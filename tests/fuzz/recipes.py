"""Recipes and `--set`: values of every kind at every key, odd YAML, bombs; mostly `--dry-run`, a share really run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage, documented
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.values import PLAIN, hostile, in_text, unfold
from tests.fuzz.world import MODELS, World

FILE = "recipe.yaml"
KEYS = sorted(documented.keys())
# What a real run may be asked for: more would only take as long as was asked.
LARGEST = {
    **{
        "rounds": 2,
        "finetune.epochs": 2,
        "finetune.steps": 4,
        "head.warmup_epochs": 2,
        "importance.batches": 4,
        "prune.steps": 3,
    },
    **{"data.image_size": 64, "data.workers": 4, "patience": 10**9},
}
LARGEST_OF_CONFIG = 256
SANE: dict[str, list[Any]] = {
    "a whole number": [1, 2, 3, 4, 7, 8, 40],
    "a number": [0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1e-6],
    "true": [True, False, "tokens"],
}
TEXTS = [
    "x",
    "..",
    ".",
    "../../x",
    "/dev/null/x",
    "a/b",
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "~",
    " ",
    "-x",
    "é",
    "con",
    "a" * 300,
    "x\\y",
    "\u202e",
]

_key = st.sampled_from([*KEYS, *documented.sections()])
_config = st.sampled_from(
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "hidden_act",
        "layer_norm_eps",
        "attn_implementation",
        "id2label",
        "model_type",
        "nonsense",
        "max_position_embeddings",
        "image_size",
        "patch_size",
        "num_channels",
        "quantization_config",
        "auto_map",
        "architectures",
        "tokenizer",
    ]
).map("model.config.{}".format)


@st.composite
def _sane(draw: st.DrawFn) -> tuple[Any, ...]:
    """A value that the documentation allows, at any key."""
    key = draw(st.sampled_from([key for key in KEYS if not key.startswith(("model.", "data.name", "data.subset"))]))
    told = documented.keys()[key]
    if told.startswith("one of "):
        return ("set", key, draw(st.sampled_from(told.removeprefix("one of ").removesuffix(" or null").split(", "))))
    if told.startswith("text such as ") and key.startswith("task."):
        return ("set", key, draw(st.sampled_from(told.removeprefix("text such as ").removesuffix(" or null").split(", "))))
    for start, values in SANE.items():
        if told.startswith(start):
            return ("set", key, draw(st.sampled_from(values)))
    return ("set", key, draw(st.sampled_from(["x", None, [0.5, 0.9], "cpu", "2GiB", {}])))


def _override(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"{key}={text}"


_set = st.tuples(st.just("set"), st.one_of(_key, _key, _config), hostile)
_overrides = st.tuples(
    st.just("override"),
    st.one_of(
        st.builds(
            _override, st.one_of(_key, _config), st.sampled_from([value for value in PLAIN if not isinstance(value, dict)])
        ),
        st.sampled_from(
            [
                "",
                "=",
                "x",
                "=x",
                ".=1",
                "a.b.c.d=1",
                "prune=",
                "prune.ratio",
                "rounds=1=2",
                "data.train=#x",
                "data.train=&x",
                "rounds=*x",
                "prune.=1",
                "[=1",
                "rounds=!!python/name:os.system",
                "\udcff=1",
                "finetune.betas=[.9,",
                "rounds= 3",
                " rounds =3",
                "rounds=١",
            ]
        ),
    ),
)
_unknown = st.tuples(
    st.just("set"),
    st.builds(
        "{}.{}".format, st.sampled_from(sorted(documented.sections())), st.sampled_from(["x", "ratoi", "", "a.b", "ünï"])
    ),
    hostile,
)
_removed = st.tuples(st.just("remove"), _key)
_text = st.one_of(damage.on(FILE, damage.bytewise), damage.on(FILE, damage.bytewise), damage.on(FILE, damage.filewise))
_bomb = st.tuples(
    st.just("bomb"), st.just(FILE), st.integers(2, 12), st.integers(2, 12), st.sampled_from(["options", "extra", "name"])
)
_name = st.tuples(st.just("set"), st.just("name"), st.sampled_from(TEXTS))


def cases() -> st.SearchStrategy[Case]:
    """Steps on the recipe of a pico model; where no more is asked for than can be done quickly, a share is really run."""
    looked = st.one_of(
        st.tuples(_set),
        st.tuples(_overrides),
        st.tuples(_set, _overrides),
        st.tuples(_sane(), _sane(), _overrides),
        st.tuples(_unknown),
        st.tuples(_removed),
        st.tuples(_text),
        st.tuples(_set, _set),
        st.tuples(_bomb),
        st.tuples(_name),
    )
    tried = st.one_of(
        st.tuples(_sane(), _sane()), st.tuples(_sane(), _sane(), _sane(), _sane()), st.tuples(_set), st.tuples(_name)
    )
    base = st.sampled_from(MODELS)
    dry = st.builds(Case, st.just("recipes"), base, looked, st.just(("dry-run",)))
    real = st.builds(Case, st.just("recipes"), base, tried, st.sampled_from([("init",), ("run",), ("run-named",)]))
    return st.one_of(dry, dry, dry, real)


def prepare(world: World) -> None:
    """Write the data."""
    for model in MODELS:
        world.recipe(model)


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The calls of a case."""
    values = _small(world.recipe(case.base)) if case.base in MODELS else {}
    file = box.cwd / FILE
    for step in case.steps:
        _structural(values, step)
    file.write_text(in_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)), "utf-8", "surrogatepass")
    for step in case.steps:
        if step[0] in damage.ACTIONS:
            damage.apply(box.cwd, step, box.outside)
    overrides = [str(step[1]) for step in case.steps if step[0] == "override"]
    found = _read(file)
    refuse = next(_forbidden(found, overrides), "") if case.base in MODELS else next(_forbidden(None, overrides), "")
    refuse = next((str(step[1]) for step in case.steps if step[0] == "must-refuse"), refuse)
    for name in case.calls:
        told = "dry-run" if name in ("run", "init", "run-named") and not _quick(found, overrides) else name
        source = str(file) if case.base in MODELS else case.base
        sets = [word for override in overrides for word in ("--set", override)]
        yield Call((*ARGUMENTS[told](source, box), *sets), refuse=refuse, writes=(box.root / "state", box.cwd))


ARGUMENTS: dict[str, Any] = {
    "dry-run": lambda source, box: ("run", source, "--dry-run"),
    "init": lambda source, box: ("init", source, "--state", str(box.root / "state")),
    "run": lambda source, box: ("run", source, "--state", str(box.root / "state")),
    "run!": lambda source, box: ("run", source, "--state", str(box.root / "state")),
    "run-named": lambda source, box: ("run", source),
}


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with as little to do as there can be."""
    values["rounds"] = 1
    values["finetune"] |= {"steps": 2}
    values["importance"] |= {"batches": 1}
    values["prune"] |= {"steps": 1}
    return values


def _structural(values: dict[str, Any], step: tuple[Any, ...]) -> None:
    """Set or remove a key."""
    if step[0] not in ("set", "remove"):
        return
    *sections, last = str(step[1]).split(".") if step[1] else [""]
    inside: Any = values
    for section in sections:
        if not isinstance(inside.get(section), dict):
            inside[section] = {}
        inside = inside[section]
    if step[0] == "set":
        inside[last] = unfold(step[2])
    else:
        inside.pop(last, None)


def _read(file: Path) -> Any:
    """The values that the text stands for; None where that is nothing that a plain reader reads, or should."""
    try:
        text = file.read_text("utf-8-sig") if file.is_file() and file.stat().st_size < 50_000 else ""
        return None if "&" in text or "*" in text or text.count("[") > 500 else yaml.safe_load(text)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, RecursionError):
        return None


def _parsed(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    try:
        return ".".join(part.strip() for part in key.split(".")), yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return "", None


def _forbidden(values: Any, overrides: list[str]) -> Iterator[str]:
    """The rules of the documentation that this breaks, whatever stands beside it."""
    said = [_parsed(override) for override in overrides]
    if values is not None and not isinstance(values, dict):
        yield "a recipe is keys with values"
    if not any(key.partition(".")[0] in {part.partition(".")[0] for part in _broken_keys(values)} for key, _ in said):
        yield from documented.violations(values)
    for at, (key, value) in enumerate(said):
        if not key or "=" not in overrides[at]:
            yield "an override is section.key=value"
        elif not any(later.partition(".")[0] == key.partition(".")[0] for later, _ in said[at + 1 :]):
            yield from documented.violation(key, value)
    names = [value for key, value in said if key == "name"] or ([values.get("name")] if isinstance(values, dict) else [])
    if any(isinstance(name, str) and documented.leads_astray(name) for name in names[-1:]):
        yield "a name is one part of a path"


def _broken_keys(values: Any) -> list[str]:
    """The keys at which the values break a rule."""
    found = []
    for key, value in values.items() if isinstance(values, dict) else ():
        if list(documented.violations({key: value})):
            found.append(str(key))
    return found


def _quick(values: Any, overrides: list[str]) -> bool:
    """Whether what is asked for is done in a second or two, should it be taken."""
    if not isinstance(values, dict):
        return True
    asked = {
        f"{key}.{name}": value
        for key, section in values.items()
        if isinstance(section, dict)
        for name, value in section.items()
    }
    asked |= {str(key): value for key, value in values.items()} | dict(map(_parsed, overrides))
    for key, value in asked.items():
        largest = LARGEST.get(key, LARGEST_OF_CONFIG if key.startswith("model.config.") else math.inf)
        if isinstance(value, int | float) and value > largest:
            return False
    config = asked.get("model.config")
    sizes = config.values() if isinstance(config, dict) else ()
    return all(not isinstance(value, int | float) or value <= LARGEST_OF_CONFIG for value in sizes) and (
        asked.get("rounds") is not None and (asked.get("finetune.steps") is not None)
    )


def _case(*steps: tuple[Any, ...], base: str = "vit", calls: tuple[str, ...] = ("dry-run",)) -> Case:
    return Case("recipes", base, steps, calls)


def _set_case(key: str, value: Any, base: str = "vit", call: str = "run") -> Case:
    return _case(("set", key, value), base=base, calls=(call,))


def _empty(override: str) -> Case:
    return _case(("override", override), ("must-refuse", "an override with nothing in it switches nothing"), base="quickstart")


CORPUS = {
    "S4 an empty override of the data": _empty("data.train="),
    "S4 a comment as an override": _empty("data.train=#a.csv"),
    "S4 an anchor as an override": _empty("data.train=&x"),
    "S4 an empty section": _empty("prune="),
    "a budget for images that hold no patch": _case(
        ("set", "finetune.memory_budget", "2GiB"), ("set", "data.image_size", 1), calls=("run",)
    ),
    "a compensated cut over one example": _case(("set", "importance.batch_size", 1), base="vit", calls=("run-named",)),
    "S9 an alias bomb in options (slow)": _case(("bomb", FILE, 9, 10, "options")),
    "S9 an alias bomb in model.config (slow)": _case(
        ("remove", "model"),
        (
            "append",
            FILE,
            "model:\n  config:\n    model_type: vit\n    a0: &a0 [x]\n"
            + "".join(f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
        ),
    ),
    "S9 ten million rounds (slow)": _set_case("rounds", 10_000_000, call="dry-run"),
    "S9 1e308 rounds (slow)": _case(("override", "rounds=1e308")),
    "S9 100,000 brackets (slow)": _case(("write", FILE, "[" * 100_000)),
    "S9 3,000 brackets (slow)": _case(("write", FILE, "[" * 3000)),
    "S9 20,000 unknown keys (slow)": _case(
        ("set", "prune.x", {"$wide": 20_000}),
        ("set", "x", {"$wide": 3}),
        ("append", FILE, "".join(f"k{n}: 1\n" for n in range(20_000))),
    ),
    "S9 a value of 20 MB (slow)": _case(("set", "name", {"$long": 20_000_000})),
    "S9 a million layers (slow)": _set_case("model.config.num_hidden_layers", 1_000_000, call="run!"),
    "S9 a million steps of pruning (slow)": _set_case("prune.steps", 1_000_000, call="run!"),
    "S10 a name above the folder": _set_case("name", "../../x", call="run-named"),
    "S10 an absolute name": _set_case("name", "/dev/null/x", call="dry-run"),
    "S10 the folder above as a name": _set_case("name", "..", call="dry-run"),
    "S10 the folder itself as a name": _set_case("name", ".", call="run-named"),
    "S10 a zero byte in a name": _set_case("name", "a\0b", call="run-named"),
    "S10 an escape in a name": _set_case("name", "\x1b[31mred", call="run-named"),
    "S10 a line break in a name": _set_case("name", "a\nb", call="run-named"),
    "S15 an override that is no text": _case(("override", "\udcff=1")),
    "a FIFO": _case(("fifo", FILE)),
    "an escape in an override": _case(("override", "finetune.device=\x1b[31mred"), ("must-refuse", "no such device")),
    "S15 an override of 2,000 parts": _case(("override", ".".join("a" * 2000) + "=1")),
    "S15 finetune.batch_size 1e20": _set_case("finetune.batch_size", 10**20),
    "S15 evaluate.batch_size 1e20": _set_case("evaluate.batch_size", 10**20),
    "S15 importance.batch_size 1e20": _set_case("importance.batch_size", 10**20),
    "S15 a budget of 400 digits": _set_case("finetune.memory_budget", "9" * 400 + "GB"),
    "S15 the root as data": _case(
        ("set", "data.train", "/"), ("set", "data.validation", None), ("set", "data.validation_share", 0.5), calls=("run",)
    ),
    "S15 torch_dtype float16": _set_case("model.config.torch_dtype", "float16"),
    "S15 dtype nope": _set_case("model.config.dtype", "nope"),
    "S15 pad_token_id 999": _set_case("model.config.pad_token_id", 999, base="bert", call="run!"),
    "held: tags": _case(("write", FILE, "name: !!python/object/apply:os.system [echo]")),
}
