"""`profile-memory`: what finetuning by a recipe holds on its device, predicted from its configuration, and
from the tokens of texts that are here.

Each method is the real model, made trainable as the method has it, and one real training step on fake tensors
(`memory.fake_step`). Where it is not known yet which groups are kept and trainable, every layer has the same share of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Shape, UnitMask, all_units, counts, shapes_of, unit_params
from recap_cli.core.batch_norms import train_mode
from recap_cli.core.criterion import Criterion
from recap_cli.core.importance import group_scores
from recap_cli.core.method import RoundPlan, TrainerHook
from recap_cli.core.ranking import Limits, select
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import indices, owner_of
from recap_cli.core.task import Batch
from recap_cli.core.ties import names_of
from recap_cli.memory.fake_step import Fakes, Kernels, Step
from recap_cli.memory.meta_model import MetaModel, anew
from recap_cli.memory.tracker import GRANULE_BYTES, KINDS, Kind, Usage
from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.custom_training import attach, make_hook_trainable
from recap_cli.rounds.device_policy import blocks_of, importance_batch_size
from recap_cli.rounds.plans import method_of_name, round_plans_for, teaches
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.selection import limits_of
from recap_cli.rounds.small_model import (
    SmallModel,
    enable_recomputing,
    fine_axes,
    in_dtype,
    make_trainable,
    micro_batch_size_of,
    placement_of,
    rule_of,
)
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss
from recap_cli.trainable.embedding import PartialEmbedding
from recap_cli.trainable.optim import Optimizer
from recap_cli.trainable.token_rows import all_token_rows

SHORT = {"full": "full-ft", "head": "head-ft", "lora": "lora-ft"}  # what is written most is written short
Like = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
TAYLOR = Criterion(score=lambda weight, grad: (weight * grad).square_(), needs="mean")  # eq. (1), as the plugin `taylor` has it
MICRO_BATCHES = 3  # the first, the last, and one for all between, each of which holds what the others there do
SEED = 0  # of the groups that a prediction takes for chosen


@dataclass(frozen=True)
class Prediction:
    """What one method holds: `usage` of a training step in the first of `round_plans`, which of its own holds most there, the
    peak of scoring over all of them, and the numbers of parameters.

    `weights` are the parameters that lie on the device (without adapters of LoRA), `trainable` the trainable entries, and
    `micro_batch_size` the examples that the step takes at a time.
    """

    method: str
    recipe: Recipe
    round_plans: Sequence[RoundPlan]
    usage: Usage
    evaluation_bytes: int
    total: int
    weights: int
    trainable: int
    micro_batch_size: int

    @property
    def peak_bytes(self) -> int:
        """The most that is held at one instant, of a training step or of scoring."""
        return max(self.usage.peak_bytes, self.evaluation_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes by kind at their own maxima and at the peak instant, and the settings they belong to."""
        tune, round_plan = self.recipe.finetune, self.round_plans[0]
        return {
            "method": self.method,
            "batch_size": tune.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "weights": tune.weights,
            "checkpointing": tune.checkpointing,
            "fused_backward": tune.fused_backward,
            "offload": tune.offload,
            "optimizer": tune.optimizer,
            "evaluation_batch_size": self.recipe.evaluate.batch_size,
            "prune_ratio": round_plan.prune_ratio,
            "mask_ratio": round_plan.mask_ratio,
            **{f"{kind}_bytes": self.usage.maxima[kind] for kind in KINDS},
            "at_peak": {f"{kind}_bytes": self.usage.at_peak[kind] for kind in KINDS},
            "training_peak_bytes": self.usage.peak_bytes,
            "sum_of_maxima_bytes": self.usage.sum_of_maxima_bytes,
            "evaluation_peak_bytes": self.evaluation_bytes,
            "peak_bytes": self.peak_bytes,
            "total_parameters": self.total,
            "held_parameters": self.weights,
            "trainable_parameters": self.trainable,
        }


def predict(model: MetaModel, recipe: Recipe, method: str, *, kernels: Kernels = "cuda") -> Prediction:
    """What finetuning by a method holds with the settings of a recipe; the other methods use them too, as far as they can.

    Of rounds that differ, the one that holds most counts.

    Raises:
        PluginError: there is no such method.
    """
    found = [
        _predicted(model, recipe, method, round_plans, kernels) for round_plans in distinct(planned(model, recipe, method))
    ]
    most = max(found, key=lambda one: one.usage.peak_bytes)
    return replace(most, evaluation_bytes=max(one.evaluation_bytes for one in found))


def planned(model: MetaModel, recipe: Recipe, method: str) -> tuple[RoundPlan, ...]:
    """The rounds that a method, by its name or short name, plans with the settings of a recipe; a state's own where it has
    begun. That of a teacher is not among them, as it trains a block at a time (`memory.teacher`).
    """
    own = model.round_plans and with_method(recipe, method) is recipe
    found = model.round_plans if own else round_plans_for(with_method(recipe, method))
    return tuple(round_plan for round_plan in found if not teaches(round_plan))


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another method; the options are the method's own defaults where they belong to another."""
    name = SHORT.get(method, method)
    return recipe if name == recipe.method else recipe.model_copy(update={"method": name, "options": {}})


def distinct(round_plans: Sequence[RoundPlan]) -> list[Sequence[RoundPlan]]:
    """The rounds that may hold most, each with those that follow it: the least pruned and the least masked of those alike."""
    kinds = {(round_plan.trains, round_plan.embeddings) for round_plan in round_plans}
    alike = [
        [n for n, round_plan in enumerate(round_plans) if (round_plan.trains, round_plan.embeddings) == kind] for kind in kinds
    ]
    least_pruned = {min(ns, key=lambda n: (round_plans[n].prune_ratio, round_plans[n].mask_ratio)) for ns in alike}
    least_masked = {min(ns, key=lambda n: (round_plans[n].mask_ratio, round_plans[n].prune_ratio)) for ns in alike}
    return [round_plans[number:] for number in sorted(least_pruned | least_masked)]


def prunes(method: str) -> bool:
    """Whether the prune ratio means anything to a method."""
    return method_of_name(SHORT.get(method, method)).prunes


def _predicted(model: MetaModel, recipe: Recipe, method: str, round_plans: Sequence[RoundPlan], kernels: Kernels) -> Prediction:
    fakes, tune = Fakes(), recipe.finetune
    bare = build.on_meta(model.spec)
    micro = micro_batch_size_of(recipe, round_plans[0], bare)
    size = min(tune.batch_size, MICRO_BATCHES * (micro or tune.batch_size))
    fewer = recipe if size == tune.batch_size else recipes.changed(recipe, {"finetune.batch_size": size})
    step, weights = prepare(model, fewer, method, fakes.like, round_plans=round_plans)
    step = replace(step, micro_batch_size=micro)
    trainable = sum(trainable.grad_param.numel() for trainable in step.optimizer.trainables)
    usage = _with_other(
        fakes.usage(step, kernels), _held_bytes(model, recipe, tune.batch_size) - _held_bytes(model, recipe, size)
    )
    evaluation = _scored(fakes, model, recipe, step, kernels)
    parameters = {name for name, _ in bare.named_parameters()}
    total = sum(model.tensors[name].numel() for name in parameters)
    return Prediction(method, recipe, round_plans, usage, evaluation, total, weights, trainable, micro or tune.batch_size)


def evaluation_bytes(model: MetaModel, recipe: Recipe, method: str, *, kernels: Kernels = "cuda") -> int:
    """The peak of scoring alone, as `predict` has it beside that of a training step."""
    fakes = Fakes()
    steps = (
        prepare(model, recipe, method, fakes.like, round_plans=left)[0] for left in distinct(planned(model, recipe, method))
    )
    return max(_scored(fakes, model, recipe, step, kernels) for step in steps)


def _held_bytes(model: MetaModel, recipe: Recipe, size: int) -> int:
    """What a batch of `size` examples takes, in the allocator's granules."""
    counts_bytes = (tensor.numel() * tensor.element_size() for tensor in batch_of(model.spec, recipe, size).values())
    return sum(-(-count // GRANULE_BYTES) * GRANULE_BYTES for count in counts_bytes)


def _with_other(usage: Usage, more_bytes: int) -> Usage:
    """The same with `more_bytes` of the batch, which is held from the beginning of a step to its end."""

    def more(kinds: Mapping[Kind, int]) -> dict[Kind, int]:
        return {**kinds, "other": kinds.get("other", 0) + more_bytes}

    by_module = {**usage.by_module, "": more(usage.by_module.get("", {}))} if more_bytes else usage.by_module
    return Usage(more(usage.at_peak), more(usage.maxima), by_module)


def _scored(fakes: Fakes, model: MetaModel, recipe: Recipe, step: Step, kernels: Kernels) -> int:
    batch = batch_of(model.spec, recipe, recipe.evaluate.batch_size)
    if model.map_size is not None:
        batch["labels"] = torch.zeros(len(batch["labels"]), *model.map_size, dtype=torch.int64, device="meta")
    return fakes.evaluation_bytes(step, fakes.like(batch), kernels)


def grid(
    model: MetaModel,
    recipe: Recipe,
    methods: Sequence[str],
    batch_sizes: Sequence[int] = (),
    prune_ratios: Sequence[float] = (),
    track: Track = silent,
) -> list[Prediction]:
    """A prediction for every method at every batch size (not in micro-batches) and every r_p; the recipe's own for none."""
    batches = [{"finetune.batch_size": size, "finetune.micro_batch_size": None} for size in batch_sizes] or [{}]
    ratios = [{"prune.ratio": ratio} for ratio in prune_ratios] or [{}]
    cells = [
        (method, {**batch, **ratio})
        for method in methods
        for batch in batches
        for ratio in (ratios if prunes(method) else [{}])
    ]
    if prune_ratios:
        model = anew(model)
    recipes_of = [(method, recipes.changed(recipe, values) if values else recipe) for method, values in cells]
    return [predict(model, one, method) for method, one in track(recipes_of, "predict", len(cells))]


def importance_bytes(model: MetaModel, recipe: Recipe, kernels: Kernels = "cuda") -> int:
    """The peak of `importance.device` while the full model is scored, its blocks one at a time (`core.streaming`).

    The sample is one batch; gradients that add up over several do so on the CPU.
    """
    fakes = Fakes()
    size = importance_batch_size(recipe, torch.device("cuda"))
    batch = fakes.like(batch_of(model.spec, recipe, size))
    built = build.assemble(model.spec, fakes.like(model.tensors), model.adapter, {})
    call, axes, task = forward_of(model.spec, built), model.layout.axes, task_named(recipe.task.kind)
    blocks = blocks_of(built, axes, model.spec.model_type)

    def score() -> None:
        with streamed(built, blocks, "cpu"):
            group_scores(built, axes, TAYLOR, lambda _: iter([(mean_loss(task, call(batch), batch)[0], 1.0)]))

    return fakes.peak_bytes(score, host=[*built.parameters(), *built.buffers()], inputs=batch, kernels=kernels)


def by_block(model: MetaModel, usage: Usage) -> dict[str, dict[str, int]]:
    """What was held at the peak, by the model's blocks in their order, and by the module at the top for what is in none: what
    holds the blocks stands before them, the head after; last "outside", the batch, the loss and the optimizer's step.
    """
    blocks = list(dict.fromkeys(axis.name.rpartition(".")[0] for axis in model.layout.axes))
    found: dict[str, dict[str, int]] = {}
    for path, kinds in usage.by_module.items():
        block = next((name for name in blocks if path == name or path.startswith(f"{name}.")), path.partition(".")[0])
        row = found.setdefault(block or "outside", dict.fromkeys(KINDS, 0))
        for kind, count in kinds.items():
            row[kind] += count

    def place(name: str) -> int:
        if name in blocks:
            return blocks.index(name)
        holds = any(block.startswith(f"{name}.") for block in blocks)
        return -1 if holds else len(blocks) + (name == "outside")

    return dict(sorted(found.items(), key=lambda item: place(item[0])))


def prepare(
    model: MetaModel,
    recipe: Recipe,
    method: str,
    like: Like,
    device: torch.device | str = "cpu",
    round_plans: Sequence[RoundPlan] | None = None,
) -> tuple[Step, int]:
    """A training step of a method in the first of `round_plans` (None: all of its own), and the number of parameters that are
    held.

    `like` makes the tensors of the small model and of the batch, fake or real, of the shapes that it is shown.
    """
    recipe = with_method(recipe, method)
    round_plans = round_plans or planned(model, recipe, recipe.method)
    plan, chosen = choices(model, recipe, round_plans[0])
    index_map = indices(model.layout.axes, plan, shapes_of(model.tensors))
    tensors = like({name: _shape_of(tensor, index_map.get(name, {})) for name, tensor in model.tensors.items()})
    built, tune = build.assemble(model.spec, tensors, model.adapter, counts(plan)), recipe.finetune
    placement = placement_of(tune, device)
    weights = sum(param.numel() for param in built.parameters())
    token_rows = model.token_rows or (all_token_rows(built) if round_plans[0].embeddings == "tokens" else None)
    small = SmallModel(built, model.layout, round_plans[0], plan, chosen, token_rows)
    enable_recomputing(built, tune, model.layout, model.spec.model_type)
    hook = with_hook(small, recipe, round_plans, like) if round_plans[0].trains == "training" else None
    trainables = make_trainable(small, placement) if hook is None else make_hook_trainable(small, hook, placement)
    weights -= sum(module.absent for module in built.modules() if isinstance(module, PartialEmbedding))
    optimizer = Optimizer(trainables, rule_of(tune), weight_decay=tune.weight_decay)
    forward = in_dtype(forward_of(model.spec, built), placement.dtype)
    batch = {name: tensor.to(device) for name, tensor in like(batch_of(model.spec, recipe, tune.batch_size)).items()}
    if token_rows is not None:
        batch["input_ids"] += int(token_rows.held[0])  # real ones are zeros, which may be no row that is held
    task = task_named(recipe.task.kind)
    micro = micro_batch_size_of(recipe, round_plans[0], built)
    step = Step(train_mode(built), optimizer, forward, task, batch, micro, tune.fused_backward, tune.offload)
    return step, weights


def batch_of(spec: ModelSpec, recipe: Recipe, size: int) -> Batch:
    """The shapes of a batch of `size` examples as the recipe's data give them, on the meta device; texts at their longest.

    Texts of more than one example are padded, so that there is a mask.
    """
    task = task_named(recipe.task.kind)
    with torch.device("meta"):
        blank = torch.as_tensor(task.target.blank(spec.num_labels))  # (), or (labels,)
        labels = torch.zeros(size, *blank.shape, dtype=blank.dtype)  # (size,) or (size, labels)
        if spec.image is not None:
            side = spec.image["size"]
            labels = torch.zeros(size, side, side, dtype=torch.int64) if task.target.maps else labels
            return {"pixel_values": torch.zeros(size, spec.image["channels"], side, side), "labels": labels}
        ids = torch.zeros(size, min(recipe.data.max_length, build.positions(spec) or recipe.data.max_length), dtype=torch.int64)
        mask = {"attention_mask": torch.zeros_like(ids)} if size > 1 else {}
        labels = torch.zeros_like(ids) if task.inputs == "words" else labels  # one for each token
        return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), **mask, "labels": labels}


def with_hook(small: SmallModel, recipe: Recipe, round_plans: Sequence[RoundPlan], like: Like) -> TrainerHook:
    """Attach a method's own training, and make what it puts into the model as `like` makes tensors."""
    built = small.model
    known = {*dict(built.named_parameters()).values(), *dict(built.named_buffers()).values()}
    hook = attach(small, recipe, round_plans)
    params = {name: param for name, param in built.named_parameters() if param not in known}
    buffers = {name: buffer for name, buffer in built.named_buffers() if buffer not in known}
    called = names_of(built)
    for name, tensor in like(params | buffers).items():
        new = nn.Parameter(tensor) if name in params else tensor
        for each in called.get(name, [name]):
            owner, attribute = owner_of(built, each)
            if isinstance(new, nn.Parameter):
                owner.register_parameter(attribute, new)
            else:
                owner.register_buffer(attribute, new, persistent=False)
    return hook


def choices(model: MetaModel, recipe: Recipe, round_plan: RoundPlan) -> tuple[UnitMask, UnitMask]:
    """The plan, and the mask of the small model's fine groups: a state's own, or ones that treat all layers alike."""
    axes = model.layout.axes
    plan = all_units(axes)
    fits = model.round_plan is None or model.round_plan.prune_ratio == round_plan.prune_ratio
    if round_plan.prune_ratio > 0:
        plan = (model.plan if fits else None) or _even(
            axes,
            model.layout.shapes,
            1 - round_plan.prune_ratio,
            replace(limits_of(recipe), scope="per-layer"),
        )
    fine = fine_axes(model.layout, plan)
    if round_plan.trains != "mask" or round_plan.mask_ratio == 0:
        return plan, all_units(fine)
    if fits and model.mask is not None and model.plan is not None:
        return plan, model.mask
    shapes = {name: tuple(shape) for name, shape in model.layout.shapes.items()}
    index_map = indices(axes, plan, shapes)
    small = {name: _cut(shape, index_map.get(name, {})) for name, shape in shapes.items()}
    return plan, _even(fine, small, 1 - round_plan.mask_ratio, Limits(scope="per-layer", least=0))


def _even(axes: Sequence[Axis], shapes: Mapping[str, Shape], share: float, limits: Limits) -> UnitMask:
    """A share of the groups of every axis, scattered over it; all of them for a share of 1."""
    if share == 1.0:
        return all_units(axes)
    random = torch.Generator().manual_seed(SEED)
    return select(
        axes,
        {axis.name: torch.rand(axis.size, generator=random) for axis in axes},
        {axis.name: unit_params(axis, shapes) for axis in axes},
        original={axis.name: axis.size for axis in axes},
        keep_share=share,
        limits=limits,
    )


def _cut(shape: Shape, dims: Mapping[int, Tensor]) -> Shape:
    return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape))


def _shape_of(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor, on the meta device."""
    return torch.empty(_cut(tuple(tensor.shape), dims), dtype=tensor.dtype, device="meta")
