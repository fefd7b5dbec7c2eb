"""LoRA (2106.09685) by the library peft: low-rank adapters beside frozen matrices, added to these at the end."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recap_cli.api import (
    Axis,
    Method,
    RoundPlan,
    Settings,
    TrainContext,
    TrainerHook,
    is_linear,
    is_transposed,
    names_of,
    owner_of,
)

MARK = ".lora_"  # in the names that peft gives
HEADS = ("query", "key", "value")
PLACES = (*HEADS, "output", "up", "down")


def round_plans(settings: Settings) -> list[RoundPlan]:
    """Return one round in which the adapters and the task head are trainable."""
    check_options(settings.options)
    return [RoundPlan(trains="training")]


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a rank or an alpha that is no whole number above 0, and for places that there are not."""
    for name in ("rank", "alpha"):
        _count(name, options[name])
    _places(options["targets"])


def attach(context: TrainContext) -> TrainerHook:
    """Add adapters of `rank` to the layers at `targets`; at the end `alpha / rank · B A` is added to their weights."""
    from peft import LoraConfig, inject_adapter_in_model

    rank, alpha = context.options["rank"], context.options["alpha"]
    called, places = names_of(context.model), context.options["targets"]
    if set(places) & set(HEADS):  # first: `targets` counts the matrices, and would miss tied ones
        blocks = [block for axis in context.axes for block in _blocks(context.model, axis)]
        _refuse_ties(called, [path for block in blocks if not block.is_known for path in block.rows])
    paths = targets(context.model, context.axes, places)
    _refuse_ties(called, paths)
    transposed = {path: is_transposed(context.model.get_submodule(path)) for path in paths}
    config = LoraConfig(r=_count("rank", rank), lora_alpha=_count("alpha", alpha), target_modules=paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of GPT-2's transposed layers, although it supports them
        inject_adapter_in_model(config, context.model)
    head, scale = set(context.head), config.lora_alpha / config.r

    def result(values: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trained = {name: value for name, value in values.items() if MARK not in name}
        for path in paths:
            down, up = (values[f"{path}{MARK}{side}.default.weight"] for side in "AB")  # (rank, in), (out, rank)
            delta = scale * up @ down
            weight = f"{path}.weight"
            trained[weight] = small[weight] + (delta.t() if transposed[path] else delta)
        return trained, {}

    return TrainerHook(trains=lambda name: name in head or MARK in name, result=result, keeps_tokens=True)


def targets(model: nn.Module, axes: Sequence[Axis], places: Any) -> list[str]:
    """Return the paths of the layers at `places`. A layer of several places (a fused qkv) occurs once."""
    found: list[str] = []
    for axis in axes:
        for block in _blocks(model, axis):
            if axis.kind != "heads":
                layers = {"up": block.rows, "down": [block.last]}
            elif block.is_known:
                query, key, value = block.rows if len(block.rows) == 3 else block.rows * 3
                layers = {"query": [query], "key": [key], "value": [value], "output": [block.last]}
            elif set(_places(places)) & set(HEADS):
                raise ValueError(
                    f"{axis.name} has {len(block.rows)} matrices before the last; LoRA expects query, key and value"
                )
            else:
                layers = {"output": [block.last]}
            found += [path for place in _places(places) for path in layers.get(place, [])]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Block:
    """The linear layers that an axis cuts in one block: the paths of those before it, and of the one after it."""

    kind: str
    rows: list[str]
    last: str

    @property
    def is_known(self) -> bool:
        """Whether the layers before are query, key and value, or one that is all of them, where the axis is of heads."""
        return self.kind != "heads" or len(self.rows) in (1, 3)


def _blocks(model: nn.Module, axis: Axis) -> list[_Block]:
    """Return the blocks of an axis: one, or each of those that it spans."""
    found, rows = list[_Block](), list[str]()
    for cut in axis.cuts:
        layer, attribute = owner_of(model, cut.param)
        if attribute != "weight" or not is_linear(layer):
            continue
        path = cut.param.removesuffix(".weight")
        if cut.dim == (0 if is_transposed(layer) else 1):
            found.append(_Block(axis.kind, list(dict.fromkeys(rows)), path))
            rows = []
        else:
            rows.append(path)
    if not found:
        raise ValueError(f"{axis.name} ({axis.kind}) cuts the input of no linear layer; LoRA expects one")
    return found


def _refuse_ties(called: Mapping[str, Sequence[str]], paths: Sequence[str]) -> None:
    if tied := [names for path in paths if len(names := called[f"{path}.weight"]) > 1]:
        raise ValueError(f"{' and '.join(tied[0])} are one parameter, to which LoRA cannot add an adapter: see options.targets")


def _places(value: Any) -> Sequence[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(place in PLACES for place in value):
        raise ValueError(f"options.targets: expected some of {', '.join(PLACES)}; found {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"options.{name}: expected a whole number of at least 1; found {value!r}")
    return value


LORA = Method(
    "LoRA: low-rank adapters on the attention of a frozen model, by peft.",
    round_plans,
    training=attach,
    options={"rank": 8, "alpha": 16, "targets": ("query", "value")},
    extra="lora",
    lr=5e-3,
)
