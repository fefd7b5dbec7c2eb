"""What the files of a state mean, checked as they are read: names, shapes, types and values, whatever their checksums say."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Shape, UnitMask
from recap_cli.core.surgery import IndexMap
from recap_cli.errors import CorruptStateError, ModelError, RecapError
from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.rounds.record import OPEN, Count, Held, Size
from recap_cli.state.manifest import START_OVER
from recap_cli.state.store import State
from recap_cli.trainable.moments import COUNT
from recap_cli.trainable.token_rows import TokenRows

STRICT = ConfigDict(strict=True)
PROBE_TOKENS = 8


class Image(BaseModel):
    """The `image` of a model's spec."""

    model_config = OPEN

    size: Size
    channels: Size
    mean: list[float]
    std: list[float]
    interpolation: str


class Peak(BaseModel):
    """The peak of an accelerator's allocator in training."""

    model_config = OPEN

    allocated_bytes: Count


class Memory(Held):
    """What memory.json has, as far as it is read again."""

    training_peak: Peak | None


METRICS_OF = TypeAdapter(dict[str, Annotated[float, Field()]], config=STRICT)
SPEC_OF = TypeAdapter(ModelSpec)


def corrupt(path: Path, what: str) -> CorruptStateError:
    """The error of a file that is as it was committed, and yet none that a stage writes."""
    return CorruptStateError(f"{path}: is not what a stage has written: {what}", hint=START_OVER)


@contextmanager
def meant(path: Path) -> Iterator[None]:
    """Rounds whatever the content of a file makes other code raise into a `CorruptStateError`; our own errors pass."""
    try:
        yield
    except RecapError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        index_map = ".".join(map(str, first["loc"]))
        raise corrupt(path, f"{index_map or 'it'}: {first['msg']}") from error
    except Exception as error:  # libraries that build a model or a tokenizer of it may raise anything
        raise corrupt(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def spec(state: State, rel: str) -> ModelSpec:
    """A model's description. Raises as `State.verified`, and `CorruptStateError`."""
    path, text = state.path / rel, state.load_text(rel)
    with meant(path):
        found = SPEC_OF.validate_json(text, strict=True)
        image = None if found.image is None else Image.model_validate(found.image)
    if len(found.label_names) != found.num_labels or found.num_labels < 1:
        raise corrupt(path, f"{found.num_labels} labels, and {len(found.label_names)} names of them")
    if (found.library == "transformers") != (found.auto_class is not None):
        raise corrupt(path, f"a model of {found.library}, and {found.auto_class} of transformers")
    if image is not None and not len(image.mean) == len(image.std) == image.channels:
        raise corrupt(path, f"{image.channels} channels, {len(image.mean)} means and {len(image.std)} deviations")
    return found


def metrics(state: State, rel: str, metric: str) -> dict[str, float]:
    """The loss and the metrics of a round, `metric` among them. Raises as `State.verified`, and `CorruptStateError`."""
    text = state.load_text(rel)
    with meant(state.path / rel):
        found = METRICS_OF.validate_json(text)
    if lacking := {"loss", metric} - found.keys():
        raise corrupt(state.path / rel, f"no {', '.join(sorted(lacking))}")
    return found


class Seen(BaseModel):
    """A line of steps.jsonl, as far as it is read again."""

    model_config = OPEN

    step: Size
    loss: Annotated[float, Field(allow_inf_nan=False)]
    lr: Annotated[float, Field(allow_inf_nan=False)]


def looks(state: State, rel: str) -> list[dict[str, Any]]:
    """What was seen of the steps of a round, in their order. Raises as `State.verified`, and `CorruptStateError`."""
    text = state.load_text(rel)
    with meant(state.path / rel):
        return [Seen.model_validate_json(line).model_dump() for line in text.splitlines()]


def memory(state: State, rel: str) -> dict[str, Any]:
    """What a finetuning held. Raises as `State.verified`, and `CorruptStateError`."""
    text = state.load_text(rel)
    with meant(state.path / rel):
        Memory.model_validate_json(text)
        found: dict[str, Any] = json.loads(text)
    return found


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model: the shape of each under all of its names, which are floats, and the names of each."""

    shapes: dict[str, Shape]
    floats: frozenset[str]
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def of_model(cls, model: nn.Module) -> "Tensors":
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, list[str]] = {}
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
        floats = frozenset(name for name, tensor in named if tensor.is_floating_point())
        return cls({name: tuple(tensor.shape) for name, tensor in named}, floats, tuple(map(tuple, names.values())))


_SHAPES: dict[str, Tensors] = {}  # of the last model: every stage of a run asks, and building one takes its time


def tensors_of_spec(spec: ModelSpec) -> Tensors:
    """The tensors that a model of this description has; kept for the next call with the same one."""
    key = spec.to_json()
    if key not in _SHAPES:
        made = Tensors.of_model(build.on_meta(spec))
        _SHAPES.clear()
        _SHAPES[key] = made
    return _SHAPES[key]


def cut_shapes(shapes: Mapping[str, Shape], index_map: IndexMap) -> dict[str, Shape]:
    """The shapes of what `index_map` leaves of tensors."""
    cut = {name: list(shape) for name, shape in shapes.items()}
    for name, dims in index_map.items():
        for dim, chosen in dims.items():
            cut[name][dim] = len(chosen)
    return {name: tuple(shape) for name, shape in cut.items()}


def check_each(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], dtype: torch.dtype | None) -> None:
    """Raises `CorruptStateError` for a tensor that is not in `shapes`, or of another shape or type (None: any)."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise corrupt(path, f"it holds {name}, which is none of its names")
        if tuple(tensor.shape) != shapes[name]:
            raise corrupt(path, f"{name} has shape {tuple(tensor.shape)}, not {shapes[name]}")
        if dtype is not None and tensor.dtype != dtype:
            raise corrupt(path, f"{name} is of type {tensor.dtype}, not {dtype}")


def check_all(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], dtype: torch.dtype | None) -> None:
    """As `check_each`, and for a name that is missing."""
    if lacking := sorted(shapes.keys() - tensors.keys()):
        raise corrupt(path, f"it lacks {lacking[0]}")
    check_each(path, tensors, shapes, dtype)


def check_model(path: Path, found: Mapping[str, Tensor], model: Tensors, shapes: Mapping[str, Shape]) -> None:
    """Raises `CorruptStateError` unless every tensor of a `model` is there, of these `shapes`; floats are fp32."""
    if lacking := next((group for group in model.names if not any(name in found for name in group)), None):
        raise corrupt(path, f"it lacks {lacking[0]}")
    floats = {name: tensor for name, tensor in found.items() if name in model.floats}
    check_each(path, floats, shapes, torch.float32)
    rest = {name: tensor for name, tensor in found.items() if name not in floats}
    check_each(path, rest, shapes, None)
    if wrong := next((name for name, tensor in rest.items() if tensor.is_floating_point()), None):
        raise corrupt(path, f"{wrong} is of type {rest[wrong].dtype}")


def unit_mask(state: State, rel: str, axes: Sequence[Axis]) -> UnitMask:
    """Which groups of `axes` a plan or a mask chooses. Raises as `State.verified`, and `CorruptStateError`."""
    path, found = state.path / rel, state.load_tensors(rel)
    check_all(path, found, {axis.name: (axis.size,) for axis in axes}, torch.uint8)
    if high := next((name for name, chosen in found.items() if chosen.numel() and int(chosen.max()) > 1), None):
        raise corrupt(path, f"{high} holds other values than 0 and 1")
    return {name: chosen.bool() for name, chosen in found.items()}


def as_bytes(unit_mask: UnitMask) -> dict[str, Tensor]:
    """A plan or a mask as it is stored: booleans of one byte."""
    return {name: chosen.to(torch.uint8) for name, chosen in unit_mask.items()}


def scores(state: State, rel: str, axes: Sequence[Axis]) -> dict[str, Tensor]:
    """A score for each group of `axes`. Raises as `State.verified`, and `CorruptStateError`."""
    found = state.load_tensors(rel)
    check_all(state.path / rel, found, {axis.name: (axis.size,) for axis in axes}, None)
    if whole := next((name for name, tensor in found.items() if not tensor.is_floating_point()), None):
        raise corrupt(state.path / rel, f"{whole} is of type {found[whole].dtype}")
    return found


def change(state: State, rel: str, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """What the parameters of these shapes absorb of a cut. Raises as `State.verified`, and `CorruptStateError`."""
    found = state.load_tensors(rel)
    check_all(state.path / rel, found, shapes, torch.float32)
    return found


def moments(
    state: State, rel: str, shapes: Mapping[str, Shape], kinds: Sequence[str], along: Mapping[str, int]
) -> dict[str, Tensor]:
    """An optimizer's moments of the `kinds` that its rule has, and counts, for tensors of `shapes`.

    `along` is the dimension that a parameter is cut along, or of which some rows are trainable.

    Raises:
        CorruptStateError: the file was altered, or holds something else.
    """
    path, found = state.path / rel, state.load_tensors(rel)
    wanted: dict[str, Shape] = {}
    for name in {key.rpartition("/")[0] for key in found} & shapes.keys():
        wanted |= {f"{name}/{kind}": shapes[name] for kind in kinds}
    counts = {key: tensor for key, tensor in found.items() if key.rpartition("/")[2] == COUNT}
    check_all(path, {key: tensor for key, tensor in found.items() if key not in counts}, wanted, torch.float32)
    for key in {f"{name.rpartition('/')[0]}/{COUNT}" for name in found}:
        name = key.rpartition("/")[0]
        lengths = {1} | ({shapes[name][along[name]]} if name in along else set())
        tensor = counts.get(key)
        if tensor is None or tensor.dim() != 1 or len(tensor) not in lengths or tensor.dtype != torch.int32:
            raise corrupt(path, f"{key} is no count of steps")
    return found


def token_rows(state: State, rel: str, shapes: Mapping[str, Shape]) -> TokenRows:
    """Which rows of the token table were held, and which were trained. Raises as `State.verified`, and `CorruptStateError`."""
    path, found = state.path / rel, state.load_tensors(rel)
    with meant(path):
        rows = TokenRows.from_tensors(found)
    whole = all(tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 1 for tensor in found.values())
    if (
        found.keys() != {f"{rows.table}/held", f"{rows.table}/trained", "size"}
        or not whole
        or shapes.get(rows.table, ())[:1] != (rows.size,)
    ):
        raise corrupt(path, f"it names no rows of {rows.table}")
    for ids in (rows.held, rows.trained):
        if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= rows.size or not bool((ids[1:] > ids[:-1]).all())):
            raise corrupt(path, f"it names rows that {rows.table} does not have")
    return rows


def processor(path: Path, load: Callable[[], Any]) -> Any:
    """The tokenizer that `load` gives, once it has made tokens of a text; None where it gives none."""
    with meant(path):
        try:
            found = load()
        except ModelError as error:
            raise corrupt(path, error.message) from error
        if found is not None:
            found.pad(found(["a"], truncation=True, max_length=PROBE_TOKENS), padding=True)
            if not isinstance(found.model_max_length, int | float) or not all(
                isinstance(n, int) for n in found.all_special_ids
            ):
                raise corrupt(path, "its tokenizer has no greatest length, or no ids of its special tokens")
    return found
