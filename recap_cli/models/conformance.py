"""Checks that an adapter describes a model, before a state is made: a wrong table costs seconds, not a run (I1).

The check is structural, so it uses random weights with a fixed seed. Real weights, such as a layer scale near zero or a zero
bias, could hide a wrong cut.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor, nn

from recap_cli.core.adapter import Adapter, find_axes, is_transposed, names_found, resize
from recap_cli.core.axes import Axis, UnitMask, check_axes, counts, shapes_of
from recap_cli.core.surgery import cut_model, indices, zero_groups
from recap_cli.errors import ConformanceError, ModelError
from recap_cli.models import build
from recap_cli.models.specs import ModelSpec

TOLERANCE = 1e-5  # of the largest logit
SEED = 2024
LISTED = 5  # names in an error message
LAYERS = ("num_hidden_layers", "n_layers", "depth")  # keys of the libraries for the number of layers
HINT = (
    "the library and the adapter's table disagree: see docs/plugins/adapter.md, or install the versions that the adapter is for"
)


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        found: What the adapter found, in words.
        axes: The axes.
        coverage: The matrices in the blocks that no axis touches.
        max_difference: Between the logits of cutting and of zeroing, relative to the largest logit.
        control_difference: The smaller difference to two controls that must differ.
    """

    found: list[str]
    axes: list[Axis]
    coverage: list[str]
    max_difference: float
    control_difference: float


def check(model: nn.Module, adapter: Adapter, spec: ModelSpec) -> Report:
    """Check that an adapter describes a model: cutting groups must equal zeroing them. Works on a copy of the model.

    Two controls must give other logits: the uncut model, and a model with the other groups zeroed.

    Raises:
        ModelError: The model has no layers, or does not run.
        ConformanceError: A cut does not exist or fit, an entry belongs to two groups, cutting differs from zeroing, or a
            control does not differ.
    """
    _check_layers(spec)
    axes = _axes(model, adapter, spec)
    _check_names(model, adapter, axes, spec)
    try:
        cut, control = _differences(model, adapter, spec, axes, random_plan(axes))
    except _Failure as failure:
        raise ConformanceError(
            f"{_who(spec)}: with groups cut out, it does not run ({failure}){_culprit(model, adapter, spec, axes)}", hint=HINT
        ) from failure
    if not cut <= TOLERANCE:  # NaN too
        raise ConformanceError(
            f"{_who(spec)}: cutting groups changes the logits by {cut:.1e} more than zeroing them"
            f"{_culprit(model, adapter, spec, axes)}",
            hint=HINT,
        )
    if not control > TOLERANCE:
        raise ConformanceError(f"{_who(spec)}: {_indifferent(model, adapter, spec, axes)}", hint=HINT)
    return Report(names_found(axes), axes, coverage(model, axes), cut, control)


def coverage(model: nn.Module, axes: Sequence[Axis]) -> list[str]:
    """Return the matrices in the encoder's blocks that no axis touches: pruning does not change them."""
    touched = {cut.param for axis in axes for cut in axis.cuts}
    stacks = {match[0] for name in touched if (match := re.match(r"(?:.*?\.)?\d+\.", name))}
    stacks = {re.sub(r"\d+\.$", "", stack) for stack in stacks}
    return [
        name
        for name, module in model.named_modules()
        if any(name.startswith(stack) for stack in stacks)
        and (isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_transposed(module))
        and f"{name}.weight" not in touched
    ]


def random_plan(axes: Sequence[Axis], seed: int = SEED) -> UnitMask:
    """Return a plan that keeps about half of the units of each axis, by a fixed seed. Of two or more it keeps and cuts one."""
    generator = torch.Generator().manual_seed(seed)
    plan: UnitMask = {}
    for axis in axes:
        keep = torch.rand(axis.size, generator=generator) < 0.5
        first, second = torch.randperm(axis.size, generator=generator)[:2].tolist() if axis.size > 1 else (0, 0)
        keep[first], keep[second] = False, True
        plan[axis.name] = keep
    return plan


class _Failure(Exception):
    """The library's code does not run; with the first line of its message."""


def _who(spec: ModelSpec) -> str:
    return f"the adapter {spec.model_type!r} does not describe this model ({spec.library})"


def _check_layers(spec: ModelSpec) -> None:
    values = spec.config["args"] if spec.library == "timm" else spec.config
    if key := next((key for key in LAYERS if values.get(key, 1) < 1), None):
        hint = f"correct {key} in model.config, or in the config.json of the model's folder"
        raise ModelError(f"this {spec.model_type} has no layers ({key} is {values[key]})", hint=hint)


def _axes(model: nn.Module, adapter: Adapter, spec: ModelSpec) -> list[Axis]:
    try:
        axes = find_axes(adapter, model)
        problems = check_axes(axes, shapes_of(model.named_parameters()))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConformanceError(f"{_who(spec)}: {error}", hint=HINT) from error
    if not axes or problems:
        problems = problems or ["it finds nothing to prune"]
        more = f" (and {len(problems) - LISTED} more)" if len(problems) > LISTED else ""
        raise ConformanceError(f"{_who(spec)}: {'; '.join(problems[:LISTED])}{more}", hint=HINT)
    return axes


def _check_names(model: nn.Module, adapter: Adapter, axes: Sequence[Axis], spec: ModelSpec) -> None:
    """Check that there is a head, and that neither the head nor an embedding is pruned."""
    head, embeddings = build.head_names(adapter, model), build.embedding_names(adapter, model)
    if not head:
        raise ConformanceError(f"{_who(spec)}: no parameter is named like its head ({', '.join(adapter.head)})", hint=HINT)
    cut = {cut.param for axis in axes for cut in axis.cuts}
    if both := sorted(cut & {*head, *embeddings}):
        raise ConformanceError(f"{_who(spec)}: {both[0]} is pruned, but belongs to the head or the embeddings", hint=HINT)


def _differences(
    model: nn.Module, adapter: Adapter, spec: ModelSpec, axes: Sequence[Axis], plan: UnitMask
) -> tuple[float, float]:
    """Return how far cutting is from zeroing, and from the nearer control, both relative to the largest logit."""
    logits = _logits_of(spec)
    trial = _randomize(build.copied(model).eval())
    uncut = _untouched(trial, spec)
    zero_groups(trial, axes, {name: ~keep for name, keep in plan.items()})
    wrong = logits(trial)
    zero_groups(_randomize(trial), axes, plan)
    zeroed = logits(trial)
    index_map = indices(axes, plan, shapes_of(trial.named_parameters()))
    cut_model(trial, index_map)
    resize(adapter, trial, counts(plan))
    cut = logits(trial)
    scale = float(zeroed.abs().max())
    return float((cut - zeroed).abs().max()) / scale, min(float((cut - other).abs().max()) for other in (uncut, wrong)) / scale


def _logits_of(spec: ModelSpec) -> Callable[[nn.Module], Tensor]:
    batch = build.example_batch(spec)

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        try:
            return build.flat_outputs(spec, model, batch).double()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # of the library
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _Failure(first_line) from error

    return logits


def check_patches(spec: ModelSpec) -> None:
    """Check that an image of a model holds a patch, as far as the configuration says it, without running the model.

    Raises:
        ModelError: It does not.
    """
    values = spec.config["args"] if spec.library == "timm" else spec.config
    patch = values.get("patch_size")
    sides = patch if isinstance(patch, list | tuple) else [patch]
    if spec.image and any(isinstance(side, int) and side > spec.image["size"] for side in sides):
        raise ModelError(
            f"images of {spec.image['size']} pixels hold no patch of {' × '.join(map(str, sides))}",
            hint="raise it: --set data.image_size=224",
        )


def _untouched(model: nn.Module, spec: ModelSpec) -> Tensor:
    """Return the logits of the uncut model. Raises `ModelError` if it does not run: that is not the adapter's fault."""
    try:
        return _logits_of(spec)(model)
    except _Failure as failure:
        size = (
            f"images of {spec.image['size']} × {spec.image['size']} pixels"
            if spec.image
            else f"texts of {build.EXAMPLE_TOKENS} tokens"
        )
        hint = "--set data.image_size=224" if spec.image else "is max_position_embeddings in its config.json too small?"
        raise ModelError(f"the model does not run at {size} ({failure})", hint=hint) from failure


def _randomize(model: nn.Module) -> nn.Module:
    """Give every parameter fixed random values: matrices that keep the scale, norms near 1, small biases."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(std=1 / sqrt(prod(param.shape[1:])), generator=generator)
            else:
                param.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.1, generator=generator)
    return model


def _culprit(model: nn.Module, adapter: Adapter, spec: ModelSpec, axes: Sequence[Axis]) -> str:
    """Return the first axis that fails when only it is cut, for the message; empty if none does."""
    plan = random_plan(axes)
    for axis in axes:
        alone = {other.name: plan[other.name] if other is axis else torch.ones(other.size, dtype=torch.bool) for other in axes}
        try:
            cut, _ = _differences(model, adapter, spec, axes, alone)
        except _Failure:
            cut = float("inf")
        if not cut <= TOLERANCE:  # NaN too
            return f"; the first to fail alone is {axis.name} ({axis.size} {axis.kind}: {_cuts(axis)})"
    return ""


def _indifferent(model: nn.Module, adapter: Adapter, spec: ModelSpec, axes: Sequence[Axis]) -> str:
    return f"zeroing other groups, or none, gives the same logits as cutting {len(axes)} axes: they do not affect the output"


def _cuts(axis: Axis) -> str:
    return ", ".join(dict.fromkeys(f"{cut.param} along dimension {cut.dim}" for cut in axis.cuts))
