"""States after every stage, damaged: `state.yaml`, the files that it names, what lies beside them."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.world import AFTER, MODELS, World, facts_of, sha256, tensors_since

OURS = re.compile(r"(full|round|best)-\d{3,}/.*|recipe(-\d{3,})?\.yaml|state\.yaml\.tmp|\.recap-init")
NOTES = "notes.txt"
CHECKSUM = "# sha256 of all lines above: "  # the last line of a state.yaml that is sealed
LOOKS = ("status", "status-json", "eval", "export", "report", "dry-run")

_manifest = st.one_of(
    damage.on("state.yaml", damage.bytewise), damage.on("state.yaml", damage.tree), damage.on("state.yaml", damage.filewise)
)
_plants = st.tuples(
    st.just("write"),
    st.sampled_from(["own.txt", "full-000/own.txt", "round-099/x", "recipe-999.yaml", "report.html"]),
    st.just("mine"),
)
_any = st.one_of(damage.bytewise, damage.filewise, damage.tree, damage.tensor, _plants)
_step = st.one_of(_manifest, _any, _any)
_linked = st.tuples(st.just("link"), st.sampled_from(["full-000", "full-001", "full-002", "round-001", "best-001"]))


def cases() -> st.SearchStrategy[Case]:
    """A base, one or two steps, perhaps the checksums put right again, and two calls."""
    steps = st.one_of(
        st.tuples(_step),
        st.tuples(_step, _step),
        st.tuples(st.one_of(damage.tree, damage.tensor), st.just(("renew_checksums",))),
        st.tuples(st.one_of(damage.on("state.yaml", damage.tree)), st.just(("renew_checksums",))),
        st.tuples(_linked),
    )
    calls = st.one_of(
        st.just(("status", "next")), st.just(("next",)), st.tuples(st.sampled_from([*LOOKS, "next", "run", "wrong"]))
    )
    base = st.tuples(st.sampled_from(MODELS), st.sampled_from(AFTER)).map("/".join)
    return st.builds(Case, st.just("states"), base, steps, calls)


def prepare(world: World) -> None:
    """Make the states."""
    for model in MODELS:
        for after in AFTER:
            facts_of(world.state(model, after))


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The calls of a case."""
    model, after = case.base.split("/")
    sound, state = world.state(model, after), box.root / "state"
    shutil.copytree(sound, state)
    (state / NOTES).write_text("mine")
    (box.root / "out").mkdir()
    facts = facts_of(sound)
    touched = {damage.apply(state, step, box.outside) for step in case.steps if step[0] != "renew_checksums"}
    with_new_checksums = ("renew_checksums",) in case.steps
    if with_new_checksums:
        renew_checksums(state, checksummed=CHECKSUM.encode() in (sound / "state.yaml").read_bytes())
    start = told(state / "state.yaml")
    forged = not with_new_checksums and "state.yaml" in touched and start != told(sound / "state.yaml")
    refuse = "a state.yaml that is not what was committed is refused" if forged else ""
    committed = {*facts["files"], "state.yaml", NOTES}
    for name in case.calls:
        arguments = _arguments(name, after, state, box)
        yield Call(
            arguments,
            refuse=refuse,
            names=() if with_new_checksums else (state.name,),
            state=state,
            leftovers=lambda rel, name=name: (
                (OURS.fullmatch(rel) is not None and rel not in committed)
                or (name == "run" and rel in _given_up(start, told(state / "state.yaml")))
            ),
            reads_only=name in LOOKS,
            writes=(state, box.root / "out", box.root / "elsewhere"),
            stays=frozenset({NOTES}),
            same={} if with_new_checksums else _wanted(world, model, after, name),
        )


def _given_up(start: Any, now: Any) -> set[str]:
    """What the stages that a `run` finished before it failed have replaced or removed, from what state.yaml said and says."""
    before, after = (found.get("history") if isinstance(found, dict) else None for found in (start, now))
    if not isinstance(before, list) or not isinstance(after, list):
        return set()
    if len(after) <= len(before) or after[: len(before)] != before:
        return set()
    return {"state.yaml", *(name for name in start["files"] if name not in now["files"])}


def told(file: Path) -> Any:
    """What a state.yaml says, as far as a reader of YAML can tell; a text of its bytes where there is no telling."""
    try:
        found = (
            yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if damage.is_small(file)
            else None
        )
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        found = None
    return found if isinstance(found, dict) else f"no mapping: {file}"


def renew_checksums(state: Path, *, checksummed: bool) -> None:
    """Put the checksums in state.yaml right, as a hostile hand would, and its own where it has one."""
    found = told(state / "state.yaml")
    files = found.get("files") if isinstance(found, dict) else None
    for name, checksum in files.items() if isinstance(files, dict) else ():
        path = state / str(name)
        if isinstance(checksum, dict) and damage.is_small(path):
            checksum |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if isinstance(found, dict):
        damage.write_tree(state / "state.yaml", found)
        if checksummed:
            text = (state / "state.yaml").read_bytes()
            (state / "state.yaml").write_bytes(text + f"{CHECKSUM}{hashlib.sha256(text).hexdigest()}\n".encode())


def _wanted(world: World, model: str, after: str, call: str) -> dict[str, str]:
    """The tensors that a call writes into the sound state, by sha256; of a finished one, those of its product."""
    number, last = AFTER.index(after), world.state(model, AFTER[-1])
    if call == "run" and after == AFTER[-1]:
        return {name: digest for name, digest in tensors_since(None, last).items() if name.startswith("best-")}
    if call == "run":
        return tensors_since(world.state(model, after), last)
    if call == "next" and number + 1 < len(AFTER):
        return tensors_since(world.state(model, after), world.state(model, AFTER[number + 1]))
    return {}


def _arguments(name: str, after: str, state: Path, box: Box) -> tuple[str, ...]:
    number = AFTER.index(after)
    stage = "prune" if number + 1 == len(AFTER) else AFTER[number + 1][:-1]
    wrong = {"prune": "merge", "mask": "prune", "finetune": "mask", "merge": "finetune"}[stage]
    place = str(state)
    return {
        "status": ("status", place),
        "status-json": ("status", place, "--json"),
        "next": (stage, place),
        "wrong": (wrong, place),
        "run": ("run", "--state", place),
        "dry-run": ("run", "--state", place, "--dry-run"),
        "eval": ("eval", place, "--json"),
        "export": ("export", place, str(box.root / "out" / "model")),
        "report": ("report", place, "--out", str(box.root / "out" / "page.html")),
        "amend": ("run", "--state", place, "--set", "evaluate.batch_size=32"),
    }[name]


def _case(base: str, *steps: tuple[Any, ...], calls: tuple[str, ...] = ("status", "next")) -> Case:
    return Case("states", base, steps, calls)


CORPUS = {
    "S1 state.yaml cut within files": _case("bert/merge1", ("keep-files", "state.yaml", 1)),
    "S1 state.yaml cut within files, settings changed": _case("bert/merge1", ("keep-files", "state.yaml", 1), calls=("amend",)),
    "S1 a line of files gone": _case("vit/prune1", ("drop-match", "state.yaml", "^  full-000/layout.json:")),
    "S1 a bit of a file's name flipped": _case("vit/mask1", ("flip", "state.yaml", 0.95, 1)),
    "S1 best names a folder without files": _case("vit/merge1", ("at", "state.yaml", "best/folder", "best-009")),
    "S11 a folder on another disk": _case("bert/merge1", ("link", "full-001")),
    "S11 a folder on another disk, for the mask": _case("vit/prune1", ("link", "full-000")),
    "an index of a buffer that no table has": _case("bert/init", ("tensor", 14, 0.846, "inf"), ("renew_checksums",)),
    "S15 history without a round": _case(
        "bert/merge1", ("at", "state.yaml", "history", [{"stage": "init"}]), ("renew_checksums",), calls=("status", "next")
    ),
    "S15 seconds that are a text": _case("bert/merge1", ("at", "state.yaml", "history/1/seconds", "x"), ("renew_checksums",)),
    "S15 bytes that are a list": _case(
        "bert/finetune1", ("at", "state.yaml", "history/3/weights_bytes", [1]), ("renew_checksums",)
    ),
    "a kind of groups that was not there": _case(
        "vit/merge1", ("at", "state.yaml", "history/1/of/heads", "$delete"), ("renew_checksums",), calls=("status",)
    ),
    "S15 best round that is a text": _case(
        "bert/merge1", ("at", "state.yaml", "best/round", ".."), ("renew_checksums",), calls=("eval",)
    ),
    "S15 round 1000": _case("bert/mask1", ("at", "state.yaml", "round", 1000), ("renew_checksums",), calls=("next",)),
    "S15 small above the folder": _case(
        "bert/prune1", ("at", "state.yaml", "small", ".."), ("renew_checksums",), calls=("status", "next")
    ),
    "S15 a round without its course": _case(
        "bert/merge1",
        ("at", "state.yaml", "history/0/round_plans/0/lr_window", "$delete"),
        ("renew_checksums",),
        calls=("next",),
    ),
    "S15 a plan without a name": _case(
        "bert/prune1", ("tensor", "round-001/plan.safetensors", 0.0, "drop"), ("renew_checksums",), calls=("next",)
    ),
    "S15 a plan of another shape": _case(
        "bert/prune1", ("tensor", "round-001/plan.safetensors", 0.0, "flat"), ("renew_checksums",), calls=("next",)
    ),
    "S15 a mask without a name": _case(
        "bert/mask1", ("tensor", "round-001/mask.safetensors", 0.0, "drop"), ("renew_checksums",), calls=("next",)
    ),
    "S15 a mask of another shape": _case(
        "bert/mask1", ("tensor", "round-001/mask.safetensors", 0.0, "longer"), ("renew_checksums",), calls=("next",)
    ),
    "S15 moved without a name": _case(
        "bert/finetune1", ("tensor", "round-001/trained.safetensors", 0.5, "drop"), ("renew_checksums",), calls=("next",)
    ),
    "S15 moved of another shape": _case(
        "bert/finetune1", ("tensor", "round-001/trained.safetensors", 0.5, "longer"), ("renew_checksums",), calls=("next",)
    ),
    "S15 small without a name": _case(
        "bert/prune1", ("tensor", "round-001/small.safetensors", 0.3, "drop"), ("renew_checksums",), calls=("next",)
    ),
    "a change of a compensated cut without a name": _case(
        "vit/finetune1", ("tensor", "round-001/compensation.safetensors", 0.3, "drop"), ("renew_checksums",), calls=("next",)
    ),
    "a change of a compensated cut of another shape, for a round that keeps it": _case(
        "vit/merge1", ("tensor", "round-001/compensation.safetensors", 0.0, "longer"), ("renew_checksums",), calls=("next",)
    ),
    "a compensated cut without its note": _case(
        "vit/merge1", ("at", "state.yaml", "history/1/compensated", None), ("renew_checksums",), calls=("status", "next")
    ),
    "S15 layout.json a list": _case(
        "vit/init", ("write", "full-000/layout.json", "[1]"), ("renew_checksums",), calls=("next",)
    ),
    "S15 layout.json of other types": _case(
        "vit/init", ("tree", "full-000/layout.json", 0.3, "set", 5), ("renew_checksums",), calls=("next",)
    ),
    "S15 metrics.json a list": _case(
        "bert/finetune1", ("write", "round-001/metrics.json", "[1]"), ("renew_checksums",), calls=("next",)
    ),
    "S15 spec.json of other types": _case(
        "bert/init", ("at", "full-000/spec.json", "config", None), ("renew_checksums",), calls=("next",)
    ),
    "S15 tokenizer_config.json of other types": _case(
        "bert/init", ("write", "full-000/tokenizer_config.json", "[1]"), ("renew_checksums",), calls=("next",)
    ),
    "a plugin without its kind": _case(
        "bert/init", ("at", "state.yaml", "plugins/used/0/kind", "$delete"), ("renew_checksums",), calls=("report",)
    ),
    "plugins that are no list": _case(
        "bert/init", ("at", "state.yaml", "plugins/used", {"kind": "x"}), ("renew_checksums",), calls=("report",)
    ),
    "S16 state.yaml a FIFO": _case("vit/init", ("fifo", "state.yaml"), calls=("status",)),
    "S16 the product of a finished state altered": _case(
        "bert/merge2", ("flip", "best-*/model.safetensors", 0.9, 1), calls=("run",)
    ),
    "what an earlier round has left is cut, and the stages before it is needed are kept": _case(
        "bert/prune2", ("tensor", "round-001/rows.safetensors", 0.0, "empty"), calls=("run",)
    ),
    "held: every file cut": _case("bert/merge1", ("cut", 3, 0.5), calls=("next",)),
    "held: tags in state.yaml": _case(
        "vit/init", ("write", "state.yaml", "!!python/object/apply:os.system [echo]"), calls=("status",)
    ),
}
