"""The kinds of input, how many cases each gets, and how cases are drawn."""

import random
from importlib import import_module
from itertools import islice
from types import ModuleType

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.fuzz import data, exports, folders, plugins, probe, recipes, states
from tests.fuzz.case import Case

KINDS: dict[str, ModuleType] = {
    "probe": probe,
    "recipes": recipes,
    "states": states,
    "data": data,
    "folders": folders,
    "exports": exports,
    "plugins": plugins,
}
SHARES = {"recipes": 0.36, "states": 0.28, "data": 0.12, "folders": 0.08, "exports": 0.08, "plugins": 0.08}
SAMPLE = 10
LIBRARIES = ("torch", "transformers", "timm", "datasets", "torchvision", "sklearn.datasets", "torchmetrics", "PIL.Image")


def load_libraries() -> None:
    """Import what the commands import when they are called, so that forks have it."""
    for name in LIBRARIES:
        import_module(name)
    import torch

    torch.set_num_threads(1)


def drawn(kinds: list[str], count: int, seed: int) -> list[tuple[str, Case]]:
    """So many cases of these kinds, mixed; the same for the same seed."""
    whole = sum(SHARES.get(kind, 0) for kind in kinds)
    found: dict[str, Case] = {}
    for kind in kinds:
        if kind in SHARES:
            found |= {case.to_json(): case for case in draw(kind, max(1, round(count * SHARES[kind] / whole)), seed)}
    mixed = list(found.values())
    random.Random(seed).shuffle(mixed)
    return [("", case) for case in mixed]


def draw(kind: str, count: int, seed: int) -> list[Case]:
    """So many different cases of a kind."""
    found: dict[str, Case] = {}

    @seeded(seed)
    @settings(
        max_examples=2 * count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(KINDS[kind].cases())
    def note(case: Case) -> None:
        found[case.to_json()] = case

    note()
    return list(islice(found.values(), count))


def corpus(kinds: list[str], sampled: int | None = None) -> list[tuple[str, Case]]:
    """The inputs that once broke something, by name; with a seed, `SAMPLE` of those that are quick."""
    found = [(name, case) for kind in kinds for name, case in getattr(KINDS[kind], "CORPUS", {}).items()]
    if sampled is None:
        return found
    quick = [(name, case) for name, case in found if not name.endswith("(slow)")]
    return random.Random(sampled).sample(quick, min(SAMPLE, len(quick)))


def probes() -> dict[str, Case]:
    """A case for each kind of fault, named for it."""
    return {what: Case("probe", what, (), ()) for what in probe.ACTS}
