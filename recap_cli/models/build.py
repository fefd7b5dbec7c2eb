"""Models by their spec: built, split into tensors and assembled again."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recap_cli import registry
from recap_cli.core import adapter as adapters
from recap_cli.core.adapter import Adapter, matches
from recap_cli.core.surgery import modules_by_name, state_sizes
from recap_cli.core.ties import names_of
from recap_cli.errors import ModelError
from recap_cli.models import adapter_calls, preprocessing, prompts, timm_models, transformers_models
from recap_cli.models.specs import ModelSpec
from recap_cli.models.unfilled import meta_device
from recap_cli.untrusted.files import some

__all__ = [
    "ModelSpec",
    "adapter_named",
    "adapter_of",
    "assemble",
    "copied",
    "describe",
    "embedding_names",
    "example_batch",
    "flat_outputs",
    "forward",
    "head_names",
    "inputs_of",
    "load_processor",
    "on_meta",
    "positions",
    "tensors_of",
]

Batch = Mapping[str, Any]
EXAMPLE_TOKENS = 12
_ATOMS = frozenset({bool, int, float, str, NoneType, FunctionType, type})  # a copy of one is itself
_TABLES = frozenset({dict, OrderedDict, set})  # most of those of a module, of its hooks, are empty


def adapter_of(spec: ModelSpec) -> Adapter:
    """Return the adapter of a model, as `adapter_named`."""
    return adapter_named(spec.model_type)


def adapter_named(model_type: str) -> Adapter:
    """Return the adapter of a model type.

    Raises:
        ModelError: There is none.
        PluginError: It cannot be loaded.
    """
    known = registry.names("adapters")
    if model_type not in known:
        message, hint = registry.unknown("adapters", model_type, known)
        raise ModelError(f"the model type {model_type!r} is unknown: {message}", hint=hint)
    return adapter_calls.guarding(cast(Adapter, registry.load("adapters", model_type)), model_type)


_ON_META: dict[str, nn.Module] = {}  # of the last spec: every stage asks, and a copy takes a fifth to a half of the time


def on_meta(spec: ModelSpec) -> nn.Module:
    """Return the model on the meta device: names and original shapes without memory."""
    key = spec.to_json()
    if key not in _ON_META:
        with meta_device():
            made = _build(spec)
        _ON_META.clear()
        _ON_META[key] = made
    return copied(_ON_META[key])


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, as `copy.deepcopy` makes, in a third of its time: that looks at every name and number of a module."""
    modules = [module for module in model.modules() if _is_plain(type(module))]
    made: dict[int, Any] = {id(module): type(module).__new__(type(module)) for module in modules}
    for module in modules:
        state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
        vars(made[id(module)]).update((name, _copy_of(value, made)) for name, value in state.items())
    return copy.deepcopy(model, made)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a deep copy of a module has copies of its attributes, and nothing else is done to it."""
    usual = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__setstate__ is nn.Module.__setstate__
    return usual and kind.__getstate__ is nn.Module.__getstate__ and not hasattr(kind, "__deepcopy__")


def _copy_of(value: Any, made: dict[int, Any]) -> Any:
    if type(value) in _ATOMS:
        return value
    if type(value) in _TABLES and not value:
        return made.setdefault(id(value), type(value)())
    return copy.deepcopy(value, made)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, detached, not copied. A tied tensor occurs once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def assemble(spec: ModelSpec, tensors: Mapping[str, Tensor], adapter: Adapter, sizes: dict[str, int]) -> nn.Module:
    """Return a model in eval mode that holds the given tensors themselves, not copies.

    Args:
        spec: The spec of the full model.
        tensors: The tensors by name, of the shapes of the full or of a pruned model.
        adapter: The adapter of the model.
        sizes: The units kept per axis; axes without an entry are not pruned.

    Raises:
        ModelError: A tensor is missing, or the model does not have one.
    """
    model = on_meta(spec)
    aliases, owners = _aliases(model), modules_by_name(model)
    for names, is_parameter in aliases:
        given = next((tensors[name] for name in names if name in tensors), None)
        if given is not None:
            _place(owners, names, nn.Parameter(given, requires_grad=given.is_floating_point()) if is_parameter else given)
    _check_complete(model, tensors)
    state_sizes(model, [name for names, is_parameter in aliases if is_parameter for name in names])
    adapters.resize(adapter, model, sizes)
    return model.eval()


def forward(spec: ModelSpec) -> Callable[[nn.Module, Batch], Any]:
    """Return a function from a model of this spec and a batch to what its forward returns. It ignores labels."""
    if spec.library == "timm":
        return lambda model, batch: model(batch["pixel_values"], **spec.forward)

    def run(model: nn.Module, batch: Batch) -> Any:
        wanted = transformers_models.inputs_of(cast(Hashable, type(model))) - {"labels"}
        inputs = {name: tensor for name, tensor in batch.items() if name in wanted}
        no_cache = {"use_cache": False} if "use_cache" in wanted else {}
        return model(**{**inputs, **_for_each(spec.forward, batch), **no_cache})

    return run


def _for_each(constants: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Return the constant arguments of a forward: a list as a tensor with a row for each image, (images, numbers), int64."""
    made: dict[str, Any] = dict(constants)
    for name, value in constants.items():
        if isinstance(value, list):
            images = batch["pixel_values"]
            made[name] = torch.tensor(value, device=images.device).expand(len(images), -1)
    return made


def inputs_of(spec: ModelSpec, model: nn.Module) -> frozenset[str]:
    """Return the names of what the forward of a model of this spec takes."""
    if spec.library == "timm":
        return frozenset({"pixel_values"})
    return transformers_models.inputs_of(cast(Hashable, type(model)))


def flat_outputs(spec: ModelSpec, model: nn.Module, batch: Batch) -> Tensor:
    """Return all numbers that a model gives for a batch, one tensor after another, (numbers,)."""
    leaves = tree_leaves(forward(spec)(model, batch))
    return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])


def head_names(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return the parameters of the task head (classifier and pooler). A tied parameter counts if any of its names is in it."""
    called = names_of(model).values()
    return [name for names in called if any(matches(name, adapter.head) for name in names) for name in names]


def embedding_names(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return the parameters of the embeddings, frozen by default. A tied parameter counts if all of its names are in them."""
    called = names_of(model).values()
    return [name for names in called if all(matches(name, adapter.embeddings) for name in names) for name in names]


def example_batch(spec: ModelSpec, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs with a fixed seed that the model accepts (`pixel_values`, or `input_ids` and `attention_mask`)."""
    generator = torch.Generator().manual_seed(seed)
    if spec.image is not None:
        side = spec.image["size"]
        return {"pixel_values": torch.randn(batch, spec.image["channels"], side, side, generator=generator)}
    ids = torch.randint(0, spec.config["vocab_size"], (batch, EXAMPLE_TOKENS), generator=generator)
    pad = spec.config.get("pad_token_id") or 0
    ids[ids == pad] = (pad + 1) % spec.config["vocab_size"]  # RoBERTa's positions count tokens that are not padding
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def positions(spec: ModelSpec) -> int | None:
    """Return how many tokens a text model has positions for; None if its configuration has no such number."""
    known = spec.config.get("max_position_embeddings")
    if known is None or spec.image is not None:
        return None
    return int(known) - (spec.config.get("pad_token_id", 0) + 1 if spec.model_type == "roberta" else 0)


def describe(spec: ModelSpec, processor: Any) -> dict[str, str | bytes]:
    """Return the files, by name, that go with model.safetensors: spec.json, config.json, tokenizer or preprocessing.

    The library opens such a folder if the shapes are the original ones and model.safetensors has the metadata
    `{"format": "pt"}`.
    """
    files: dict[str, str | bytes] = {"spec.json": spec.to_json()}
    if spec.library == "timm":
        return {**files, "config.json": timm_models.config_json(spec)}
    files["config.json"] = transformers_models.configure(spec.config).to_json_string(use_diff=False)
    if spec.image is not None:
        files["preprocessor_config.json"] = preprocessing.preprocessor_json(spec.image, spec.model_type)
    if spec.image is not None and processor is not None:
        files["processor_config.json"] = prompts.processor_json(spec.forward)
    return {**files, **({} if processor is None else transformers_models.files_of(processor))}


def load_processor(folder: Path, spec: ModelSpec) -> Any:
    """Return the tokenizer that `describe` wrote into a folder; None where a model of images reads no words, or made-up ones.

    The preprocessing of images is in the spec.
    """
    if spec.image is None:
        return transformers_models.read_tokenizer(folder, spec.config["vocab_size"])
    return prompts.kept_tokenizer(folder, spec.config) if prompts.INPUT in spec.forward else None


def _build(spec: ModelSpec) -> nn.Module:
    if spec.library == "timm":
        return cast(nn.Module, timm_models.build(spec.config["architecture"], spec.config["args"]))
    return transformers_models.build(spec)


def _aliases(model: nn.Module) -> list[tuple[list[str], bool]]:
    """Return all names of each tensor (several if it is tied), and whether it is a parameter."""
    found: dict[int, tuple[list[str], bool]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(tensor), ([], True))[0].append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found.setdefault(id(buffer), ([], False))[0].append(name)
    return list(found.values())


def _place(owners: Mapping[str, nn.Module], names: Sequence[str], tensor: Tensor) -> None:
    for name in names:
        path, _, attribute = name.rpartition(".")
        setattr(owners[path], attribute, tensor)


def _check_complete(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    present = {name: tensor for names in (model.named_parameters, model.named_buffers) for name, tensor in names()}
    lacking = sorted(name for name, tensor in present.items() if tensor.is_meta)
    foreign = sorted(set(tensors) - {name for names, _ in _aliases(model) for name in names})
    if lacking or foreign:
        what = f"lack {some(lacking)}" if lacking else f"hold {some(foreign)}, which the model does not have"
        raise ModelError(
            f"the tensors {what}",
            hint="were they written with another version of transformers or timm? state.yaml has the versions",
        )
