"""Plugins of strangers: entry points that are malformed or claimed twice, modules that fail, values that are nonsense."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage
from tests.fuzz.case import Box, Call, Case
from tests.fuzz.world import World, run, tensors_since

MODULE = "recap_fuzzed"
POINTS = f"[recap.criteria]\nfuzzed = {MODULE}:CRITERION\n\n[recap.methods]\nfuzzed = {MODULE}:METHOD\n"
SOURCE = """
import os, sys, time
import torch
from recap_cli.api import Criterion, Method, RoundPlan

def score(weight, grad):
    {score}

def rounds(settings):
    {round_plans}

{module}
CRITERION = Criterion(score=score, needs="none")
METHOD = Method("Fuzzed.", rounds, prunes=True, masks=True, options={{"n": 1}})
"""
SCORE = "return weight.abs()"
ROUND_PLANS = """
    part = 1 / settings.rounds
    each = (settings.prune_ratio, settings.mask_ratio)
    return [RoundPlan(*each, share=part, lr_window=(n * part, (n + 1) * part)) for n in range(settings.rounds)]
"""
# What a criterion may return or do, and the rule of docs/plugins/criterion.md that forbids to use it, if any does.
SCORES = {
    "return -weight.abs()": "scores are non-negative",
    "return weight.to(torch.complex64)": "scores are non-negative, and so real",
    "return weight.abs().to('meta')": "scores have values",
    "return weight.abs()[:1]": "scores have the tensor's shape",
    "return weight.abs().sum()": "scores have the tensor's shape",
    "return torch.full_like(weight, float('nan'))": "scores are non-negative",
    "return torch.full_like(weight, float('inf'))": "scores are finite",
    "return weight.abs() * float('nan')": "scores are finite",
    "return None": "a criterion returns a tensor",
    "return weight.abs().tolist()": "a criterion returns a tensor",
    "return 5": "a criterion returns a tensor",
    "return weight.abs().to(torch.int64)": "",
    "return weight.abs() > 0.01": "",
    "return weight.abs().to_sparse()": "",
    "raise KeyError('x')": "a criterion that fails is refused",
    "raise SystemExit(4)": "a criterion that fails is refused",
    "raise KeyboardInterrupt": "",
    "raise StopIteration": "a criterion that fails is refused",
    "raise RecursionError('deep')": "a criterion that fails is refused",
    "class E(BaseException): pass\n    raise E('x')": "a criterion that fails is refused",
    "scores = weight.abs().clone(); weight.zero_(); return scores": "",
    "scores = weight.abs().clone(); weight.data.mul_(2); return scores": "",
    "scores = weight.abs().clone(); grad.fill_(1); return scores": "",
    "print('hello'); return weight.abs()": "",
    "os.write(1, b'hello'); return weight.abs()": "",
    "weight.requires_grad_(True); return weight.abs()": "",
    "torch.manual_seed(1); torch.set_default_dtype(torch.float64); return weight.abs()": "",
    "sys.exit(4)": "a criterion that fails is refused",
}
MODULES = {
    "raise ValueError('boom')": "a module that cannot be imported is refused",
    "import nonsense_that_is_not_there": "a module that cannot be imported is refused",
    "sys.exit(0)": "a module that cannot be imported is refused",
    "class E(BaseException): pass\nraise E('x')": "a module that cannot be imported is refused",
    "raise KeyboardInterrupt": "a module that cannot be imported is refused",
    "def f(:": "a module that cannot be imported is refused",
    "print('hello')": "",
    "del score": "a module that cannot be imported is refused",
    "raise RecursionError('x' * 100000)": "a module that cannot be imported is refused",
    "raise ValueError('\\x1b[31m' + 'x\\n' * 9)": "a module that cannot be imported is refused",
}
ROUND_PLAN_LISTS = {
    "return []": "rounds that make no sense are refused",
    "return None": "rounds that make no sense are refused",
    "return [1, 2]": "rounds that make no sense are refused",
    "return [RoundPlan(2.0, 0.5)]": "rounds that make no sense are refused",
    "return [RoundPlan(0.3, 0.5, share=0.4)]": "shares add up to 1",
    "return [RoundPlan(0.3, 0.5, lr_window=(1.0, 0.0))]": "rounds that make no sense are refused",
    "return [RoundPlan(0.3, 0.5, trains='nothing')]": "rounds that make no sense are refused",
    "return [RoundPlan(0.3, 0.5, plan='learned')]": "rounds that make no sense are refused",
    "return [RoundPlan(-0.3, 0.5)]": "rounds that make no sense are refused",
    "return [RoundPlan(float('nan'), 0.5)]": "rounds that make no sense are refused",
    "raise KeyError('x')": "rounds that make no sense are refused",
    "raise ValueError('options.n: no')": "a ValueError refuses an option",
    "sys.exit(4)": "rounds that make no sense are refused",
    "raise KeyboardInterrupt": "",
    "while True: yield RoundPlan(0.3, 0.5)": "rounds that make no sense are refused",
}
CLAIM = "taylor = os:name"  # a name of ours, which the recipe asks for
LINES = [
    "no equals here",
    "= nothing",
    "x =",
    "x = ",
    "a b c",
    "[broken",
    "x = y:z [extra",
    "x = :",
    "x = ..:",
    "é = ü:ö",
    "\0",
    "x = os:system",
    "x = this:that ; y",
    "[recap.criteria]",
    CLAIM,
    "x=y=z",
    "\t",
]
OUTS = ("plugins", "plugins-json", "dry-run", "recipes", "status")

_source = st.one_of(
    *(
        st.tuples(st.just(what), st.sampled_from(sorted(table)))
        for what, table in (("score", SCORES), ("module", MODULES), ("round_plans", ROUND_PLAN_LISTS))
    )
)
_foreign = st.one_of(
    st.tuples(st.just("foreign"), st.sampled_from(LINES)),
    st.tuples(st.just("foreign"), st.text(max_size=12, alphabet=st.characters(exclude_categories=("Cs",)))),
)
_metadata = st.tuples(
    st.just("metadata"),
    st.sampled_from(["", "Name: x", "no metadata", "\0", "Metadata-Version: 9.9\nName:\nVersion:\n", "delete", "latin"]),
)
_points = st.tuples(
    st.just("points"), st.one_of(damage.on("entry_points.txt", damage.bytewise), damage.on("entry_points.txt", damage.filewise))
)


def cases() -> st.SearchStrategy[Case]:
    """A plugin of ours-to-be, perhaps beside a broken stranger."""
    used = st.builds(Case, st.just("plugins"), st.just("criterion"), st.tuples(_source), st.just(("prune",)))
    method = st.builds(
        Case,
        st.just("plugins"),
        st.just("method"),
        st.tuples(st.tuples(st.just("round_plans"), st.sampled_from(sorted(ROUND_PLAN_LISTS)))),
        st.sampled_from([("dry-fuzzed",), ("init-fuzzed",)]),
    )
    beside = st.builds(
        Case,
        st.just("plugins"),
        st.just("foreign"),
        st.tuples(st.one_of(_foreign, _metadata, _points)),
        st.tuples(st.sampled_from(OUTS), st.sampled_from(OUTS)),
    )
    return st.one_of(used, method, beside)


_STATES: dict[str, Path] = {}


def prepare(world: World) -> None:
    """Make a state whose recipe names a sound plugin, and what pruning with it gives."""
    site = world.root / "site"
    install(site, MODULE, POINTS, _text())
    sys.path.insert(0, str(site))
    recipe = world.root / "fuzzed.yaml"
    values = world.recipe("bert")
    values["prune"] |= {"criterion": "fuzzed"}
    recipe.write_text(yaml.safe_dump(values))
    for name in ("init", "prune"):
        _STATES[name] = world.root / f"fuzzed-{name}"
        run("init", recipe, "--state", _STATES[name])
    run("prune", _STATES["prune"])
    sys.path.remove(str(site))
    for name in list(sys.modules):
        if name == MODULE:
            del sys.modules[name]


def install(site: Path, name: str, points: str, source: str) -> Path:
    """Put a distribution of one module into a folder; returns its .dist-info."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (site / f"{name}.py").write_text(source)
    return info


def _text(**parts: str) -> str:
    return SOURCE.format(**{"score": SCORE, "round_plans": ROUND_PLANS, "module": "", **parts})


def play(case: Case, world: World, box: Box) -> Iterator[Call]:
    """The calls of a case."""
    parts = {str(step[0]): str(step[1]) for step in case.steps if step[0] in ("score", "module", "round_plans")}
    install(box.site, MODULE, POINTS, _text(**parts))
    for step in case.steps:
        _foreigners(box, step)
    sys.path.insert(0, str(box.site))
    state = box.root / "state"
    shutil.copytree(_STATES["init"], state)
    values = world.recipe("bert")
    plain, fuzzed = box.cwd / "plain.yaml", box.cwd / "fuzzed.yaml"
    plain.write_text(yaml.safe_dump(values))
    fuzzed.write_text(yaml.safe_dump({**values, "method": "fuzzed"}))
    module = MODULES.get(parts.get("module", ""), "")
    refuse = {
        "prune": module or SCORES.get(parts.get("score", ""), ""),
        "fuzzed": module or ROUND_PLAN_LISTS.get(parts.get("round_plans", ""), ""),
    }
    sound = "a broken stranger stops no command of ours" if case.base == "foreign" else ""
    claimed = any(str(step[0]) == "foreign" and step[1] == CLAIM for step in case.steps)
    new = str(box.root / "new")
    arguments: dict[str, tuple[str, ...]] = {
        "plugins": ("plugins",),
        "plugins-json": ("plugins", "--json"),
        "recipes": ("recipes", "ls"),
        "status": ("status", str(state)),
        "dry-run": ("run", str(plain), "--dry-run"),
        "prune": ("prune", str(state)),
        "dry-fuzzed": ("run", str(fuzzed), "--dry-run"),
        "init-fuzzed": ("init", str(fuzzed), "--state", new),
        "doctor": ("doctor",),
    }
    for name in case.calls:
        interrupted = "KeyboardInterrupt" in "".join(parts.values())
        twice = claimed and name not in ("plugins", "plugins-json", "recipes", "status", "doctor")
        ours = refuse["prune" if name == "prune" else "fuzzed"] if name in ("prune", "dry-fuzzed", "init-fuzzed") else ""
        yield Call(
            arguments[name],
            refuse=ours or ("a name that two distributions claim" if twice else ""),
            succeed="" if twice else sound,
            names=("fuzzed", "round_plan", "options", *(["stranger"] if twice else []))
            if not interrupted and name != "doctor"
            else (),
            state=state,
            leftovers=lambda rel: rel.startswith("round-"),
            writes=(state, box.root / "new"),
            stdout=f"{state}\n" if name == "prune" else None,
            same=tensors_since(_STATES["init"], _STATES["prune"])
            if name == "prune" and "clone()" in parts.get("score", "")
            else {},
            codes=(130,) if interrupted else (1,) if name == "doctor" else (),
            may_start=name == "doctor",
        )


def _foreigners(box: Box, step: tuple[Any, ...]) -> None:
    """Put a second distribution beside, broken as the step says."""
    if step[0] == "second":
        install(box.site / "second", "recap_second", POINTS.replace(MODULE, "recap_second"), _text())
        sys.path.insert(0, str(box.site / "second"))
    if step[0] not in ("foreign", "metadata", "points"):
        return
    info = install(box.site, "stranger", "[console_scripts]\nx = y:z\n\n[recap.criteria]\n", "")
    if step[0] == "foreign":
        with (info / "entry_points.txt").open("a", encoding="utf-8") as points:
            points.write(f"{step[1]}\n")
    elif step[0] == "points":
        damage.apply(info, step[1], box.outside)
    elif step[1] == "delete":
        (info / "METADATA").unlink()
    else:
        (info / "METADATA").write_bytes(b"Name: \xff\n" if step[1] == "latin" else str(step[1]).encode())


def _case(what: str, text: str, *, base: str = "criterion", calls: tuple[str, ...] = ("prune",)) -> Case:
    return Case("plugins", base, ((what, text),), calls)


CORPUS = {
    "S5 a criterion that writes to its weight": _case("score", "scores = weight.abs().clone(); weight.zero_(); return scores"),
    "S8 a line without an equals sign": _case("foreign", "no equals here", base="foreign", calls=("plugins", "dry-run")),
    "S8 doctor beside it": Case("plugins", "criterion", (("foreign", "no equals here"),), ("doctor",)),
    "S14 negative scores": _case("score", "return -weight.abs()"),
    "S14 complex scores": _case("score", "return weight.to(torch.complex64)"),
    "S14 scores without values": _case("score", "return weight.abs().to('meta')"),
    "S14 prints of a plugin": _case("score", "print('hello'); return weight.abs()"),
    "S14 sys.exit in score": _case("score", "raise SystemExit(4)"),
    "S14 a BaseException on import": _case("module", "class E(BaseException): pass\nraise E('x')"),
    "S14 KeyboardInterrupt on import": _case("module", "raise KeyboardInterrupt"),
    "entry points of a million million zero bytes": Case(
        "plugins", "foreign", (("points", ("sparse", "entry_points.txt")),), ("plugins", "dry-run")
    ),
    "a FIFO as entry points": Case("plugins", "foreign", (("points", ("fifo", "entry_points.txt")),), ("plugins", "dry-run")),
    "an escape in the error of an import": _case("module", "raise ValueError('\\x1b[31m' + 'x\\n' * 9)"),
    "an import whose error has 100,000 characters": _case("module", "raise RecursionError('x' * 100000)"),
    "scores that are not a number": _case("score", "return torch.full_like(weight, float('nan'))"),
    "held: a method that cannot be imported": Case(
        "plugins", "method", (("module", "raise ValueError('boom')"),), ("dry-fuzzed",)
    ),
    "a stranger's claim to a name of ours": Case("plugins", "foreign", (("foreign", CLAIM),), ("plugins", "dry-run")),
    "held: a name claimed twice": Case("plugins", "criterion", (("second", ""), ("score", "raise KeyError('x')")), ("prune",)),
}
