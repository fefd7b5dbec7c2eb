"""A state with what its files mean: its recipe, the model's description and layout, and the tensors of its rounds."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from recap_cli.core.adapter import Adapter
from recap_cli.core.axes import Shape, UnitMask, check_axes, mask_axes, shapes_of, shrink
from recap_cli.core.compensation import with_change
from recap_cli.core.cut_inputs import cut_inputs
from recap_cli.core.method import RoundPlan
from recap_cli.core.surgery import IndexMap, gather, indices
from recap_cli.core.task import Objective
from recap_cli.data.soft_targets import SoftTargets
from recap_cli.data.split import Split
from recap_cli.errors import StageOrderError
from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import record, stored
from recap_cli.rounds.examples import splits_of
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.plans import round_plans_of, teaches
from recap_cli.rounds.rates import peak_lr
from recap_cli.rounds.recipe_model import objective_of
from recap_cli.rounds.record import (
    BUFFERS,
    COMPENSATION,
    IMPORTANCE,
    LAYOUT,
    LOOKS,
    MASK,
    MEMORY,
    METRICS,
    MOMENTS,
    PLAN,
    ROWS,
    SCORES,
    SMALL,
    SPEC,
    STATES,
    TARGETS,
    TEACHER_FOLDER,
    TRAINED,
    WEIGHTS,
)
from recap_cli.rounds.status import finished
from recap_cli.rounds.teacher import with_teacher
from recap_cli.state.manifest import below, quoted
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.trainable.token_rows import TokenRows

LAYOUT_OF = TypeAdapter(Layout)


class Context:
    """A state with what its files mean. Everything is read when it is first asked for, and checked then.

    Whatever reads a file raises `CorruptStateError` where it is not one that a stage writes: another name, shape or type.
    """

    def __init__(self, state: State) -> None:
        record.check(state)
        self.state = state
        self.recipe: Recipe = recipes.parse(state.recipe_text, str(state.path / state.manifest.recipe))

    def check_rounds(self) -> None:
        """Do nothing if a stage of a round is next.

        Raises:
            StageOrderError: the last round is merged: K are done, or the metric has not improved for `patience`.
        """
        if self.state.next_stage() != "prune":
            return
        path = quoted(self.state.path)
        if reason := finished(self.recipe, self.state.manifest):
            raise StageOrderError(
                f"{self.state.path}: {reason}",
                hint=f"recap export {path} OUT writes the best small model; recap status {path} shows the rounds",
            )

    @cached_property
    def full(self) -> str:
        """The folder of the full model as it is now."""
        return str(self.state.manifest.full)

    @cached_property
    def round_plans(self) -> tuple[RoundPlan, ...]:
        """What each round does."""
        return round_plans_of(self.state.manifest)

    @cached_property
    def spec(self) -> ModelSpec:
        rel, task = f"{self.full}/{SPEC}", task_named(self.recipe.task.kind)
        spec = stored.spec(self.state, rel)
        if spec.task_kind != self.recipe.task.kind or (spec.image is None) == (task.inputs == "image"):
            raise stored.corrupt(self.state.path / rel, f"it is no model for {self.recipe.task.kind}")
        return spec

    @cached_property
    def adapter(self) -> Adapter:
        return build.adapter_of(self.spec)

    @cached_property
    def _shapes_by_name(self) -> stored.Tensors:
        """The tensors that the full model has."""
        with stored.meant(self.state.path / f"{self.full}/{SPEC}"):
            return stored.tensors_of_spec(self.spec)

    @cached_property
    def layout(self) -> Layout:
        rel = f"{self.full}/{LAYOUT}"
        path, text = self.state.path / rel, self.state.load_text(rel)
        with stored.meant(path):
            layout = LAYOUT_OF.validate_json(text, strict=True)
            problems = check_axes(layout.axes, layout.shapes)
        shapes = self._shapes_by_name.shapes
        known = {**layout.shapes, **{name: shapes.get(name, ()) for name in (*layout.embeddings, *layout.head)}}
        problems += [f"{name} is no such parameter of the model" for name, shape in known.items() if shapes.get(name) != shape]
        problems += [f"{name} is whole, and no axis cuts it" for name in sorted(layout.whole - layout.shapes.keys())]
        if not layout.axes or problems:
            raise stored.corrupt(path, problems[0] if problems else "it has no axes")
        return layout

    @cached_property
    def objective(self) -> Objective:
        """What the models are trained and scored for."""
        return objective_of(self.recipe, self.spec)

    def lr(self, round_plan: RoundPlan) -> float:
        """The peak learning rate of a round."""
        return peak_lr(self.recipe, self.layout, round_plan)

    def head_lr(self, round_plan: RoundPlan) -> float:
        """The peak learning rate of the task head in a round."""
        is_new, is_alone = self.state.manifest.made["head_new"], round_plan.trains == "head"
        return self.recipe.head_lr(self.lr(round_plan), new=is_new, alone=is_alone)

    def processor(self) -> Any:
        """The tokenizer of the full model, or None for images."""
        files = below(self.state.manifest.files, self.full)
        for rel in files.keys() - {f"{self.full}/{name}" for name in (WEIGHTS, MOMENTS)}:
            self.state.verified(rel)
        folder = self.state.path / self.full
        return stored.processor(folder, lambda: build.load_processor(folder, self.spec))

    def splits(self, track: Track) -> tuple[Split, Split]:
        """The training and the validation examples, ready for the model."""
        return splits_of(self.recipe, self.spec, self.processor(), track)

    def training_examples(self, track: Track) -> tuple[Split, Split]:
        """The training and the validation examples; those for training with what the recipe's teacher gives, if it has one.

        Raises:
            DataError: the training examples are not those that the teacher has seen.
        """
        train, validation = self.splits(track)
        if self.recipe.distill.teacher is None or teaches(self.round_plans[self.state.manifest.round - 1]):
            return train, validation
        targets = self._of_teacher(TARGETS)
        states = self._of_teacher(STATES) if self.recipe.distill.hidden_weight else None
        seen = (record.teacher_of(self.state.manifest) or {})["examples"]
        return with_teacher(train, targets, states, seen), validation

    def _of_teacher(self, file: str) -> SoftTargets:
        rel = f"{TEACHER_FOLDER}/{file}"
        path, tensors = self.state.path / rel, self.state.load_tensors(rel)
        with stored.meant(path):
            return SoftTargets.from_tensors(tensors)

    def full_weights(self) -> dict[str, Tensor]:
        """The weights of the full model, on the CPU, without what no checkpoint of it holds."""
        return self._full_parts()[0]

    def full_tensors(self) -> dict[str, Tensor]:
        """The weights and buffers of the full model, on the CPU."""
        weights, buffers = self._full_parts()
        return weights | buffers

    def _full_parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        file = f"{self.full}/{BUFFERS}"
        weights = self.state.load_tensors(f"{self.full}/{WEIGHTS}")
        buffers = self.state.load_tensors(file) if file in self.state.manifest.files else {}
        stored.check_model(
            self.state.path / self.full / WEIGHTS, weights | buffers, self._shapes_by_name, self._shapes_by_name.shapes
        )
        return weights, buffers

    def model(self, tensors: dict[str, Tensor], sizes: dict[str, int] | None = None) -> nn.Module:
        """A model in evaluation mode made of `tensors` (no copies); a small one if `sizes` (axis → units) are given."""
        return build.assemble(self.spec, tensors, self.adapter, sizes or {}).eval()

    def plan(self, folder: str) -> UnitMask:
        """Which groups of the full model the small model in `folder` kept."""
        return stored.unit_mask(self.state, f"{folder}/{PLAN}", self.layout.axes)

    def mask(self, folder: str, plan: UnitMask) -> UnitMask:
        """Which hidden dimensions of the small model that `plan` leaves are trainable in a round."""
        axes = mask_axes(shrink(self.layout.axes, plan), self.layout.whole)
        return stored.unit_mask(self.state, f"{folder}/{MASK}", axes)

    def small_shapes(self, plan: UnitMask) -> dict[str, Shape]:
        """The shapes of the small model's tensors, by all of their names."""
        shapes = self._shapes_by_name.shapes
        return stored.cut_shapes(shapes, indices(self.layout.axes, plan, self.layout.shapes))

    def small(self, folder: str, plan: UnitMask, name: str = SMALL) -> dict[str, Tensor]:
        """The tensors of the small model of a round, as it was cut; or those of the file `name`, a small model too."""
        rel = f"{folder}/{name}"
        tensors = self.state.load_tensors(rel)
        stored.check_model(self.state.path / rel, tensors, self._shapes_by_name, self.small_shapes(plan))
        return tensors

    def compensation(self, folder: str, plan: UnitMask) -> dict[str, Tensor]:
        """What the small model in `folder` has beside the full model's entries at its plan: parameter → change, fp32, in the
        small model's shapes. It is empty where the cut is not compensated.
        """
        rel = f"{folder}/{COMPENSATION}"
        if rel not in self.state.manifest.files:
            return {}
        found = cut_inputs(build.on_meta(self.spec), indices(self.layout.axes, plan, self.layout.shapes))
        small, names = self.small_shapes(plan), {name for cut in found for name in (cut.weight, cut.bias)}
        return stored.change(self.state, rel, {name: shape for name, shape in small.items() if name in names})

    def gathered(self, folder: str, plan: UnitMask) -> dict[str, Tensor]:
        """The small model in `folder` as the full model has it: gathered at its plan, with the change of its cut."""
        full = self.full_tensors()
        return with_change(gather(full, indices(self.layout.axes, plan, shapes_of(full))), self.compensation(folder, plan))

    def trained(self, folder: str, plan: UnitMask, index_map: IndexMap) -> dict[str, Tensor]:
        """The values of the trained entries, which are `index_map` in the small model."""
        rel = f"{folder}/{TRAINED}"
        path, tensors = self.state.path / rel, self.state.load_tensors(rel)
        stored.check_each(path, tensors, stored.cut_shapes(self.small_shapes(plan), index_map), torch.float32)
        tuned = next(entry for entry in reversed(self.state.manifest.history) if entry["stage"] == "finetune")
        count = sum(tensor.numel() for tensor in tensors.values())
        if self.round_plans[tuned["round"] - 1].trains not in ("training", "teacher") and count != tuned["trainable"]:
            raise stored.corrupt(path, f"it holds {count:,} entries, and {tuned['trainable']:,} were trained")
        return tensors

    def tuned_moments(self, folder: str, plan: UnitMask, index_map: IndexMap, kinds: Sequence[str]) -> dict[str, Tensor]:
        """The moments, of the `kinds` there are, of the entries `index_map` in the small model, after a round."""
        shapes = stored.cut_shapes(self.small_shapes(plan), index_map)
        return stored.moments(self.state, f"{folder}/{MOMENTS}", shapes, kinds, self._along(self.token_rows(folder)))

    def full_moments(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """The moments of the full model; none before the first merge, or where they are not carried."""
        file, shapes = f"{self.full}/{MOMENTS}", self._shapes_by_name.shapes
        if not self.recipe.finetune.carry_moments or file not in self.state.manifest.files:
            return {}
        rounds = (self.token_rows(f"round-{number:03d}") for number in range(self.state.manifest.round, 0, -1))
        token_rows = next((found for found in rounds if found), None)
        return stored.moments(self.state, file, shapes, kinds, self._along(token_rows))

    def _along(self, token_rows: TokenRows | None) -> dict[str, int]:
        return self.layout.along | (token_rows.along() if token_rows else {})

    def importance(self, folder: str) -> dict[str, Tensor] | None:
        """The averaged importance of the full model's groups that a round has written; None where it has written none."""
        file = f"{folder}/{IMPORTANCE}"
        return stored.scores(self.state, file, self.layout.axes) if file in self.state.manifest.files else None

    def scores(self, folder: str) -> dict[str, Tensor]:
        """The scores that the training of a round has learned for the groups of its small model."""
        return stored.scores(self.state, f"{folder}/{SCORES}", shrink(self.layout.axes, self.plan(folder)))

    def metrics(self, folder: str) -> dict[str, float]:
        """Loss and metrics of a round's small model on the validation data."""
        return stored.metrics(self.state, f"{folder}/{METRICS}", self.recipe.metric.name)

    def looks(self, folder: str) -> list[dict[str, Any]]:
        """The losses of a round's steps, as they were seen; none of a round before they were kept."""
        rel = f"{folder}/{LOOKS}"
        return stored.looks(self.state, rel) if rel in self.state.manifest.files else []

    def memory(self, folder: str) -> dict[str, Any]:
        """Bytes held and measured while finetuning in a round."""
        return stored.memory(self.state, f"{folder}/{MEMORY}")

    def token_rows(self, folder: str) -> TokenRows | None:
        """Which rows of the token table the finetuning in `folder` held and trained; None where that is not known."""
        file = f"{folder}/{ROWS}"
        return stored.token_rows(self.state, file, self._shapes_by_name.shapes) if file in self.state.manifest.files else None

    def rows(self, folder: str) -> IndexMap:
        """The rows of the token table that the finetuning in `folder` trained, where that is neither all nor none."""
        token_rows, round_plan = self.token_rows(folder), self.round_plans[int(folder.rpartition("-")[2]) - 1]
        return token_rows.index_map(round_plan) if token_rows else {}
