"""A run of the stages, one after another as their commands would, with a record of what they looked at and what they wrote."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from recap_cli.data.splits import Split
from recap_cli.models import build
from recap_cli.models.specs import ModelSpec
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.run_context import Context
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from tests.segmentation import CONFIGS, DETR
from tests.stages import naive
from tests.stages.naive import Axes, Group
from tests.strange import STRANGE
from tests.tiny import VALIDATION, is_text, tiny

STAGES = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}
NO_DROPOUT: dict[str, Any] = {
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    **{name: {} for name in (*STRANGE, *CONFIGS)},
    "segformer": {"classifier_dropout_prob": 0.0},
    "dpt": {"semantic_classifier_dropout": 0.0},
    "maskformer": {"decoder_config": {**DETR, "dropout": 0.0}},
    "oneformer": {"dropout": 0.0},
    "other": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
EPS = {"mask2former": 1.0, "maskformer": 1.0, "oneformer": 1.0, "other": 1e-3}
"""Of AdamW. In models with queries a rounding may decide: which points are chosen, what a mask hides, what a match is. AdamW
makes steps of the rounding itself where a gradient is 0 but for it: weights differed by 4 % of the largest at 1e-3, and by 3e-6
at 1.0."""


@dataclass(frozen=True)
class Look:
    """One batch that a stage asked for: the stage's label of what it does, the examples by index, and their tensors."""

    round: int
    stage: str
    label: str
    indices: tuple[int, ...]
    batch: dict[str, Tensor]
    validation: bool


@dataclass
class Record:
    """What the stages of a run looked at, and the files of the state after each of them: (round, stage) → file → tensors."""

    recipe: Recipe
    looks: list[Look] = field(default_factory=list)
    files: dict[tuple[int, str], dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    root: Path = Path()
    read: dict[Any, dict[str, Tensor]] = field(default_factory=dict)

    def folder(self, round: int, stage: str) -> Path:
        """The state as it was after a stage of the first two rounds, if the record was told to keep it."""
        return self.root / f"{round}-{stage}"

    def at(self, round: int, stage: str) -> Context:
        return Context(State.open(self.folder(round, stage)))

    @property
    def layout(self) -> dict[str, Any]:
        return json.loads(self.texts["layout.json"])

    @property
    def axes(self) -> Axes:
        layout = self.layout
        shapes = {name: tuple(shape) for name, shape in layout["shapes"].items()}
        return Axes(layout["axes"], shapes, layout["whole_trained"], layout["whole_frozen"])

    def model(self) -> nn.Module:
        """The full model of the run's architecture, with weights of no meaning: the same one each time."""
        return _built(self.texts["spec.json"])

    def full(self, round: int) -> dict[str, Tensor]:
        """The full model's weights after a round, 0 being `init`."""
        stage = "merge" if round else "init"
        return {n: t.clone() for n, t in self.files[round, stage][f"full-{round:03d}/model.safetensors"].items()}

    def plan(self, round: int) -> list[Group]:
        """The groups of the full model that are left in a round."""
        return groups_of(self.files[round, "prune"][f"round-{round:03d}/plan.safetensors"])

    def mask(self, round: int) -> list[Group]:
        """The hidden dimensions that may move in a round, in the full model's numbers."""
        axes, alive = self.axes, naive.by_axis(self.plan(round))
        of_small = self.files[round, "mask"][f"round-{round:03d}/mask.safetensors"]
        assert of_small.keys() == axes.fine.keys()
        found: list[Group] = []
        for name, chosen in of_small.items():
            axis = axes.fine[name][0]["name"]
            fine = [g for unit in alive[axis] for g in axes.fine_of((axis, unit)) if g[0] == name]
            found += [g for g, trains in zip(fine, chosen.tolist(), strict=True) if trains]
        return sorted(found)

    def seen(self, round: int, stage: str, *, validation: bool = False) -> dict[str, list[Look]]:
        """What a stage looked at, by its own label of what it did, in order."""
        found: dict[str, list[Look]] = {}
        for look in self.looks:
            if (look.round, look.stage, look.validation) == (round, stage, validation):
                found.setdefault(look.label, []).append(look)
        return found

    def only(self, round: int, stage: str, *, validation: bool = False) -> list[Look]:
        """The batches of a stage that goes through the data once, for one thing it does."""
        found = self.seen(round, stage, validation=validation)
        of = "validation" if validation else "training"
        assert len(found) == 1, f"{stage} of round {round} went through the {of} data for {[*found]}, not for one thing"
        return next(iter(found.values()))

    def samples(self) -> dict[tuple[int, str, int], list[Look]]:
        """Every D_s of the run: round, stage and number within the stage → its batches."""
        return {
            (round, stage, number): looks
            for round in range(1, self.recipe.rounds + 1)
            for stage in ("prune", "mask")
            for number, looks in enumerate(self.seen(round, stage).values())
        }


@lru_cache(maxsize=4)
def _built(spec: str) -> nn.Module:
    return build._build(ModelSpec.from_json(spec))


def groups_of(unit_mask: dict[str, Tensor]) -> list[Group]:
    return sorted((name, unit) for name, chosen in unit_mask.items() for unit, kept in enumerate(chosen.tolist()) if kept)


def indices_of(looks: list[Look]) -> list[int]:
    return [i for look in looks for i in look.indices]


@contextmanager
def watching(record: Record, at: list[Any]) -> Iterator[Any]:
    """Inside, every batch that is made of any split is put down in `record`; gives the `track` that tells what it is for."""
    plain, label = Split.batch, [""]

    def batch(split: Split, indices: Tensor, variants: Tensor | None = None) -> dict[str, Tensor]:
        made = plain(split, indices, variants)
        copies = {name: tensor.clone() for name, tensor in made.items()}
        record.looks.append(Look(*at, label[0], tuple(indices.tolist()), copies, len(split) == VALIDATION))
        return made

    def track(items: Any, text: str, total: int | None = None) -> Any:
        label[0] = text
        yield from items
        label[0] = ""

    Split.batch = batch  # type: ignore[method-assign]
    try:
        yield track
    finally:
        Split.batch = plain  # type: ignore[method-assign]


def witnessed(
    recipe: Recipe, stop: tuple[int, str] | None = None, folder: Path | None = None, *, kept_rounds: int = 0
) -> Record:
    """Run the stages of a recipe up to `stop` (round, stage), each on the state as it lies on the disk.

    Of the first `kept_rounds` rounds the state after each stage is copied.
    """
    root = folder or Path(mkdtemp(prefix="recap-witness-"))
    path, record, at = root / "state", Record(recipe, root=root), [0, "init"]
    with watching(record, at) as track:
        init(recipe, path, track=track)
        _put_down(record, path, at)
        if stop == (0, "init"):
            return record
        for round in range(1, len(State.open(path).manifest.made["round_plans"]) + 1):
            for name, stage in STAGES.items():
                at[:] = [round, name]
                stage(State.open(path), track=track)
                _put_down(record, path, at)
                if round <= kept_rounds:
                    shutil.copytree(path, record.folder(round, name))
                if tuple(at) == stop:
                    return record
    return record


def _put_down(record: Record, path: Path, at: list[Any]) -> None:
    state = State.open(path)
    for folder in path.glob("full-*"):
        record.texts |= {name: (folder / name).read_text() for name in ("layout.json", "spec.json")}
    record.files[at[0], at[1]] = {str(f.relative_to(path)): _copied(f, record.read) for f in path.rglob("*.safetensors")}
    if at[1] == "finetune":
        record.metrics[at[0]] = json.loads((path / f"round-{at[0]:03d}" / "metrics.json").read_text())
    record.history, record.best = list(state.manifest.history), state.manifest.best


def _copied(file: Path, read: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
    now = file.stat()
    key = file, now.st_ino, now.st_mtime_ns, now.st_size  # most of the files are those of the stage before
    if key not in read:
        read[key] = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file may go with its round
    return read[key]


def still(name: str, **sections: Any) -> Recipe:
    """A tiny recipe without dropout, whose plan is chosen anew in two rounds of three, and whose rounds end within an epoch."""
    base: dict[str, Any] = {
        "rounds": 3,
        "prune": {"ratio": 0.4, "steps": 2, "hold_plan": 0.4, "floor": 0.2},
        "mask": {"ratio": 0.6},
        "head": {"lr": 0.02},
        "finetune": {"epochs": 1.2, "batch_size": 7, "lr": 0.005, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "evaluate": {"batch_size": 5},
    }
    base["finetune"]["eps"] = EPS.get(name, EPS["other"])
    if is_text(name) or name in CONFIGS:
        config = tiny(name).model.config
        base["model"] = {"config": {**(config or {}), **NO_DROPOUT.get(name, NO_DROPOUT["other"])}}
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return tiny(name, **base)


@cache
def record_of(name: str) -> Record:
    """Three rounds of one adapter's pico model, run once per process."""
    return witnessed(still(name), kept_rounds=2)
