"""Models of the transformers library: from a folder, or from a configuration."""

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import nn

from recap_cli.errors import ModelError
from recap_cli.models.checkpoints import FOLDER_HINT, QUANTIZED_HINT, LoadReport, count_weights, quiet
from recap_cli.models.config_checks import HINT as CONFIG_HINT
from recap_cli.models.config_checks import check_fit, check_limits, check_padding, check_widths
from recap_cli.models.specs import ModelSpec
from recap_cli.models.unfilled import meta_device
from recap_cli.untrusted import files
from recap_cli.untrusted.files import LIBRARY_ERRORS

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
SIZES = (  # keys of configurations that must be 1 or more; `conformance` checks the layers
    *("hidden_size", "dim", "num_attention_heads", "n_heads", "intermediate_size", "hidden_dim"),
    *("vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels"),
    *("embed_dim", "num_heads", "depths", "window_size"),  # of models in stages
    *("hidden_sizes", "patch_sizes", "strides", "sr_ratios", "num_encoder_blocks", "decoder_hidden_size"),  # of SegFormer
    *("neck_hidden_sizes", "fusion_hidden_size", "pool_scales", "auxiliary_channels"),  # of heads that segment
    *("feature_size", "mask_feature_size", "fpn_feature_size", "encoder_feedforward_dim", "dim_feedforward"),  # with queries
    *("num_queries", "train_num_points", "conv_dim", "mask_dim", "task_seq_len"),
)
LAYERS = ("num_hidden_layers", "n_layers", "depth")  # keys for the number of layers
ACTIVATIONS = ("hidden_act", "activation")
DTYPES = ("dtype", "torch_dtype")
CHOICES = (
    "attn_implementation",
    "experts_implementation",
)  # keys that choose code; also with leading underscores, and with the suffix _internal
PRETRAINED = "use_pretrained_backbone"
BACKBONE_HINT = "describe the backbone in backbone_config, and set this key to null"
NOT_IN_DEFAULTS = {"head_dim", "architectures", "tokenizer", "transformers_version", "_name_or_path", "torch_dtype"}


def configure(values: dict[str, Any], *, strict: bool = False) -> Any:
    """Return the configuration object of `values`, with float32 weights.

    Keys that choose an implementation of attention are ignored: they may name code to download.

    Args:
        values: The configuration, with `model_type`.
        strict: Refuse keys that the model type does not have. transformers would silently keep them.

    Raises:
        ModelError: A value is impossible, or a key unknown.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    rest = {key: value for key, value in values.items() if key not in ("model_type", "_name_or_path", "tokenizer")}
    model_type = str(values.get("model_type"))
    check_limits(model_type, rest)
    _check_values(model_type, rest)
    _check_backbone(model_type, rest)
    rest = {key: value for key, value in rest.items() if not key.strip("_").startswith(CHOICES)}
    if strict and (kind := next((rest[key] for key in DTYPES if key in rest), "float32")) != "float32":
        raise ModelError(f"the weights of a {model_type} are float32, not {kind}", hint="see finetune.weights for less memory")
    rest |= {key: "float32" for key in DTYPES if key in rest}
    try:
        with quiet():
            defaults = AutoConfig.for_model(model_type)
            if strict:
                _check_keys(model_type, rest, defaults)
            _check_names(model_type, rest, defaults)
            config = AutoConfig.for_model(model_type, **copy.deepcopy(rest))  # MaskFormer's of 5.17 empties nested ones
            config.architectures = config.architectures or []  # transformers 5.23 iterates over it, even if it is None
            names = {int(number): str(name) for number, name in config.id2label.items()}
            config.id2label = dict(sorted(names.items()))  # JSON may have them as texts, 10 before 2
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        first_line = " ".join(str(error).split())
        raise ModelError(
            f"this is no configuration of a {model_type}: {first_line}", hint="see model.config in the recipe"
        ) from error
    check_padding(config)
    check_widths(config)
    if getattr(config, "is_training", False):  # of OneFormer: its contrastive loss wants a text for each object of an image
        if strict:
            raise ModelError(
                f"is_training of this {model_type} is true: that is for several tasks at once, with texts of the objects",
                hint="leave out model.config.is_training; the model is trained without it",
            )
        config.is_training = False
    return config


def build(spec: ModelSpec) -> nn.Module:
    """Return a model of this spec with random weights, on torch's current default device."""
    with quiet():
        return keep_no_cache(from_config(configure(spec.config), spec))


def keep_no_cache(model: nn.Module) -> nn.Module:
    """Turn off the model's cache of keys and values: a block that runs twice would fill it twice."""
    configs = (getattr(module, "config", None) for module in model.modules())
    for config in configs:
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    return model


def save(model: Any, spec: ModelSpec, folder: Path) -> None:
    """Write a model as its library does, with the `use_cache` of its spec: the product may generate text."""
    _restore_cache(model.config, spec.config)
    with quiet():
        model.save_pretrained(folder)


class ForTask(Protocol):
    """What says for which task a model is, and which class of transformers builds it: a spec, or a source."""

    @property
    def task_kind(self) -> str:
        """The name of the task."""

    @property
    def auto_class(self) -> str | None:
        """The class of transformers."""


def from_config(config: Any, wanted: ForTask) -> nn.Module:
    """Return a model with random weights from torch's global generator.

    Raises:
        ModelError: The architecture has no head for the task.
    """
    try:
        model: nn.Module = _auto(wanted).from_config(config)
    except LIBRARY_ERRORS as error:
        raise ModelError(
            f"a {config.model_type} cannot be built for {wanted.task_kind}: {_first_line(error)}", hint=CONFIG_HINT
        ) from error
    return model.float().eval()  # OneFormer makes a number of its loss in float64


def check_size(config: Any, wanted: ForTask, held: int | None = None) -> None:
    """Check a model of this configuration as `check_fit` does, without allocating it."""
    with quiet(), meta_device():
        check_fit(config.model_type, from_config(copy.deepcopy(config), wanted), held)


def from_folder(folder: Path, wanted: ForTask, config: Any) -> tuple[nn.Module, LoadReport]:
    """Return the model with the folder's weights in float32, in eval mode. Weights that the folder lacks are random.

    Raises:
        ModelError: Weights are damaged, pickled, of another architecture, or too large for this machine.
    """
    held = count_weights(folder)
    files.check_folder(folder, ("*.json",))  # transformers reads some of them
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter of PEFT (adapter_config.json), and transformers would load the model that it names",
            hint="merge it into its model first: model.merge_and_unload().save_pretrained(NEW)",
        )
    check_size(config, wanted, held)
    try:
        with quiet():
            model, info = _auto(wanted).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype="float32",
            )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{folder} cannot be loaded for {wanted.task_kind}: {_first_line(error)}", hint=FOLDER_HINT) from error
    mismatched = {str(item[0]) for item in info["mismatched_keys"]}
    return model.float().eval(), LoadReport(set(info["missing_keys"]), mismatched, set(info["unexpected_keys"]))


def model_type(values: Mapping[str, Any], origin: str) -> str:
    """Return the model type that a configuration names.

    Raises:
        ModelError: It names none. The message names `origin`.
    """
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{origin} names no model_type", hint=FOLDER_HINT)
    return str(values["model_type"])


def check_task(config: Any, wanted: ForTask) -> None:
    """Check that transformers has a model of this configuration for the task.

    Raises:
        ModelError: It has not.
    """
    if not has_model(config, wanted):
        raise ModelError(
            f"transformers has no {config.model_type} for {wanted.task_kind}",
            hint="do model.name and task.kind fit together?",
        )


def has_model(config: Any, wanted: ForTask) -> bool:
    """Whether the class that is wanted has a model of this configuration."""
    return type(config) in _auto(wanted)._model_mapping


def label_names(config: Any) -> list[str]:
    """Return the names of the outputs of a configuration's head; an output without a name has an empty one."""
    return [config.id2label.get(number, "") for number in range(len(config.id2label))]


def set_labels(config: Any, names: Sequence[str], problem_type: str | None) -> None:
    """Give a configuration these labels, in this order, and the kind of its loss, as transformers calls it."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = problem_type


def to_dict(model: Any) -> dict[str, Any]:
    """Return the whole configuration of a model as JSON values, without its path."""
    return {**config_values(model.config), "architectures": [type(model).__name__]}


def config_values(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values, without its path."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def read_tokenizer(folder: Path, vocab_size: int, *, words: bool = False) -> Any:
    """Return the tokenizer of a folder; for lists of `words`, one that reads each as after a blank, as RoBERTa does in texts.

    Raises:
        ModelError: There is none, or it has more tokens than the model embeds.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would build an empty tokenizer, for which every word is unknown
        raise ModelError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})", hint="save the tokenizer in that folder"
        )
    files.check_folder(folder, ("*.json", "*.txt", "*.model", "*.jinja"))
    try:
        with quiet():
            load = partial(AutoTokenizer.from_pretrained, folder, local_files_only=True, trust_remote_code=False)
            tokenizer = load()
            if words and getattr(tokenizer, "add_prefix_space", None) is False:
                tokenizer = load(add_prefix_space=True)
    except BaseException as error:
        # tokenizers, written in Rust, raises a bare Exception, and panics with a class that is not an Exception
        if not isinstance(error, LIBRARY_ERRORS) and type(error).__name__ not in ("Exception", "PanicException"):
            raise
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}", hint="save the tokenizer again"
        ) from error
    if len(tokenizer) > vocab_size:
        raise ModelError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model embeds {vocab_size}")
    return tokenizer


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer, by name."""
    with TemporaryDirectory() as scratch, quiet():
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}


def model_inputs(config: Any, wanted: ForTask) -> frozenset[str]:
    """Return the names of the inputs of the model that is wanted of a configuration."""
    made = _auto(wanted)._model_mapping[type(config)]
    return inputs_of(made[0] if isinstance(made, list | tuple) else made)


@lru_cache(maxsize=32)
def inputs_of(model_class: Any) -> frozenset[str]:
    """Return the names of the inputs of a class's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def _restore_cache(config: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key == "use_cache":
            config.use_cache = value
        elif isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):  # a nested configuration
            _restore_cache(getattr(config, key), value)


def _auto(wanted: ForTask) -> Any:
    """Return the class that builds models for a task. Raises `ModelError` if transformers has none of this name."""
    import transformers

    found = getattr(transformers, wanted.auto_class or "", None)
    if not hasattr(found, "_model_mapping"):
        raise ModelError(
            f"transformers has no class {wanted.auto_class} for {wanted.task_kind}", hint="install a newer transformers"
        )
    return found


def _check_values(model_type: str, values: Mapping[str, Any]) -> None:
    """Refuse sizes below 1 and unknown activations, by their keys: the library's errors do not name them."""
    from transformers.activations import ACT2FN

    if values.get("quantization_config"):
        raise ModelError(f"the weights of this {model_type} are quantized (quantization_config)", hint=QUANTIZED_HINT)
    for key in DTYPES:
        kind = values.get(key)
        if kind not in (None, "auto") and not isinstance(getattr(torch, str(kind).removeprefix("torch."), None), torch.dtype):
            raise ModelError(f"{key} of this {model_type} is {kind!r}, which is not a type of torch", hint=CONFIG_HINT)
    for key in (*SIZES, *LAYERS, "num_labels"):
        value = values.get(key)
        least = 0 if key in LAYERS or key == "num_labels" else 1
        for size in value if isinstance(value, list | tuple) else [value]:
            if isinstance(size, int) and size < least:
                raise ModelError(f"{key} of this {model_type} is {size}; expected {least} or more", hint=CONFIG_HINT)
    for key in ACTIVATIONS:
        value = values.get(key)
        if isinstance(value, str) and value not in ACT2FN:
            near = get_close_matches(value, sorted(ACT2FN), n=1)
            hint = f"did you mean {near[0]}?" if near else CONFIG_HINT
            raise ModelError(f"{key} of this {model_type} is {value!r}, which transformers does not know", hint=hint)
    for value in values.values():
        if isinstance(value, dict) and "model_type" in value:  # the configuration of a backbone, or of a decoder
            _check_values(str(value["model_type"]), value)


def _check_backbone(model_type: str, values: Mapping[str, Any]) -> None:
    """Refuse a backbone that would be downloaded. That of a decoder's own configuration is never built."""
    if named := next((key for key in ("backbone", PRETRAINED) if values.get(key)), None):
        raise ModelError(
            f"{named} of this {model_type} is {values[named]!r}: transformers would download a backbone", hint=BACKBONE_HINT
        )
    inner = values.get("backbone_config")
    if not isinstance(inner, dict):
        return
    if inner.get(PRETRAINED) or inner.get("backbone") or inner.get("model_type") == "timm_backbone":
        raise ModelError(f"the backbone of this {model_type} is one to download, or of timm", hint=BACKBONE_HINT)


def _check_keys(model_type: str, values: dict[str, Any], defaults: Any) -> None:
    known = set(defaults.to_dict()) | set(type(defaults).attribute_map) | NOT_IN_DEFAULTS
    for key in values:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise ModelError(f"a {model_type} has no configuration key {key!r} (model.config.{key})", hint=hint)


def _check_names(model_type: str, values: Mapping[str, Any], defaults: Any) -> None:
    """Refuse keys that would replace methods and tables of the library's class."""
    known = {*defaults.to_dict(), *type(defaults).attribute_map}
    for key in values.keys() - known:
        attribute = getattr(type(defaults), key, None)
        if callable(attribute) or isinstance(attribute, dict | set | tuple):
            raise ModelError(f"{key} is no setting of a {model_type}", hint=CONFIG_HINT)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
