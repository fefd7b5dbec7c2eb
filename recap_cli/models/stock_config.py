"""A configuration of the library for a pruned model, if there is one: a guess, which opening the export has to confirm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recap_cli.core.axes import USUAL, Axis, Shape, UnitMask, counts, shapes_of
from recap_cli.errors import ModelError
from recap_cli.models import build
from recap_cli.models.specs import ModelSpec

HEADS = ("num_attention_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads",)
NEURONS = ("intermediate_size", "hidden_dim")


def stock_spec(
    spec: ModelSpec, axes: Sequence[Axis], plan: UnitMask, shapes: Mapping[str, Shape]
) -> tuple[ModelSpec | None, str | None]:
    """Return a spec whose model has the given shapes, or None and the reason why there is none."""
    if all(bool(keep.all()) for keep in plan.values()):
        return spec, None
    sizes = counts(plan)
    alike: dict[str, int] = {}
    for axis in axes:
        if alike.setdefault(axis.kind, sizes[axis.name]) != sizes[axis.name]:
            differ = f"layers differ in their {axis.kind} ({_range(axes, sizes, axis.kind)})"
            before = {other.size for other in axes if other.kind == axis.kind}
            return None, f"{differ}: prune.uniform makes them alike" if len(before) == 1 else f"{differ}, as before the cut"
        if axis.kind not in USUAL and sizes[axis.name] != axis.size:
            return None, f"a stock configuration has no known key for the number of {axis.kind}"
    stock = replace(spec, config=_with_sizes(spec, axes, alike, shapes))
    try:
        made = shapes_of(build.tensors_of(build.on_meta(stock)))
    except ModelError as error:
        return None, f"no stock configuration fits: {error.message}"
    for name, shape in shapes.items():
        if made.get(name) != shape:
            return None, f"a stock {spec.model_type} makes {name} of shape {made.get(name)}, not {shape}"
    return stock, None


def _range(axes: Sequence[Axis], sizes: Mapping[str, int], kind: str) -> str:
    found = [sizes[axis.name] for axis in axes if axis.kind == kind]
    return f"{min(found)} to {max(found)}"


def _with_sizes(spec: ModelSpec, axes: Sequence[Axis], alike: Mapping[str, int], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the configuration with the new counts, under the keys of its architecture."""
    values = dict(spec.config["args"] if spec.library == "timm" else spec.config)
    for axis in {axis.kind: axis for axis in axes}.values():  # one of each kind; all layers are alike
        cut = axis.cuts[0]
        if axis.size == alike[axis.kind]:
            continue
        if axis.kind == "heads":
            head_dim = min(cut.width for cut in axis.cuts if cut.width > 1 or axis.cuts[0].width == 1)
            queries = axis.cuts[0].width // head_dim  # that share a key and a value
            keys = ["num_heads"] if spec.library == "timm" else [key for key in HEADS if key in values]
            values |= dict.fromkeys(keys, alike["heads"] * queries)
            values |= {key: alike["heads"] for key in KEY_HEADS if key in values}
            values["attn_head_dim" if spec.library == "timm" else "head_dim"] = head_dim
        else:
            values |= _neuron_keys(values, alike["neurons"], *shapes[cut.param][:2])
    return {**spec.config, "args": values} if spec.library == "timm" else values


def _neuron_keys(values: Mapping[str, Any], neurons: int, rows: int, width: int) -> dict[str, Any]:
    """Return the key with the number of neurons, or if there is none, with their ratio to the width of the model."""
    named = {key: neurons for key in NEURONS if key in values}
    if named:
        return named
    if values.get("use_swiglu_ffn"):
        rows = rows * 3 // 2  # DINOv2 takes two thirds of it
    ratio = rows / width if int(width * (rows / width)) == rows else (rows + 0.25) / width  # the library rounds down
    return {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio}
