"""Models of timm: an architecture by name, or a folder in timm's layout (config.json and model.safetensors)."""

import json
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.errors import ModelError
from recap_cli.models.checkpoints import FOLDER_HINT, LoadReport, locate, quiet_timm, read_config
from recap_cli.models.config_checks import HINT as CONFIG_HINT
from recap_cli.models.config_checks import check_fit
from recap_cli.models.specs import ModelSpec, image_facts
from recap_cli.models.unfilled import meta_device
from recap_cli.untrusted.files import LIBRARY_ERRORS
from recap_cli.untrusted.model_limits import LARGEST, LIMITS

OF_VERSION = ("first_conv", "classifier")  # keys of `pretrained_cfg` that may differ between versions of timm
REFUSED_ARGS = (  # arguments that name files, and switches of the process or of the output
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "features_only"),
)


def build(architecture: str, args: Mapping[str, Any], held: int | None = None) -> Any:
    """Return a model with random weights, in eval mode, on torch's current default device.

    Args:
        architecture: The name in timm.
        args: Arguments of `create_model`.
        held: How many numbers its checkpoint has, if there is one.

    Raises:
        ModelError: timm cannot build it, or it is too large for this machine or for its checkpoint.
    """
    import timm

    check_architecture(architecture)
    _check_args(architecture, args)
    try:
        with quiet_timm():
            if torch.get_default_device().type != "meta":
                with meta_device():
                    check_fit(architecture, timm.create_model(architecture, pretrained=False, **args), held)
            return timm.create_model(architecture, pretrained=False, **args).eval()
    except LIBRARY_ERRORS as error:
        hint = "see model.config in the recipe, or model_args in the folder's config.json"
        raise ModelError(f"timm cannot build {architecture}: {_first_line(error)}", hint=hint) from error


def check_architecture(architecture: str) -> None:
    """Check that timm has an architecture.

    Raises:
        ModelError: It has not. The hint has similar names.
    """
    import timm

    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists all of them"
        raise ModelError(f"timm has no architecture {architecture!r}", hint=hint)


def architecture_of(values: Mapping[str, Any], origin: str) -> str:
    """Return the architecture that a configuration names.

    Raises:
        ModelError: It names none. The message names `origin`.
    """
    if not isinstance(values.get("architecture"), str):
        raise ModelError(
            f"{origin} names no timm architecture", hint="is it one of transformers? --set model.library=transformers"
        )
    return str(values["architecture"])


def classes_of(architecture: str, args: Mapping[str, Any], folder: Path | None) -> int:
    """Return the number of classes of a model, from its arguments, its folder's config.json or the pretrained architecture.

    Raises:
        ModelError: It is not a number above 1.
    """
    import timm

    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    given = [args.get("num_classes"), read_config(folder).get("num_classes") if folder else None]
    found = next((count for count in given if count is not None), default.num_classes if default is not None else 1000)
    if not isinstance(found, int) or found < 2:
        raise ModelError(f"num_classes of {architecture} is {found!r}; expected 2 or more", hint="see model.config")
    return found


def find(name: str, revision: str | None, *, only_config: bool = False) -> tuple[Path | None, str, dict[str, Any]]:
    """Find a model of timm.

    Args:
        name: A folder, `architecture`, `architecture.tag`, or a hub id.
        revision: A branch, tag or commit on the hub.
        only_config: Fetch no weights.

    Returns:
        The folder with the weights, the architecture, and the arguments of `create_model`. With `only_config`, the folder of an
        architecture by name is None.

    Raises:
        ModelError: There is none.
    """
    import timm

    architecture = name.partition(".")[0]
    if Path(name).expanduser().is_dir() or not timm.is_model(architecture):
        if "/" not in name and not Path(name).exists():
            check_architecture(architecture)
        folder = locate(name.removeprefix("hf-hub:").removeprefix("hf_hub:"), revision, only_config=only_config)
        config = read_config(folder)
        return folder, architecture_of(config, f"{folder}/config.json"), _part(folder, config, "model_args")
    if only_config:
        return None, architecture, {}
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.hf_hub_id:
        raise ModelError(f"timm has no pretrained weights of {name}", hint=FOLDER_HINT)
    return locate(cfg.hf_hub_id, revision), architecture, {}


def open_folder(folder: Path) -> Any:
    """Open a folder in timm's layout by a public call of timm, and return the model in eval mode.

    Raises:
        ModelError: timm cannot open it.
    """
    import timm

    try:
        with quiet_timm():
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except LIBRARY_ERRORS as error:
        raise ModelError(f"timm cannot open {folder}: {_first_line(error)}", hint="export or copy it again") from error


def check_config(folder: Path, spec: ModelSpec) -> None:
    """Check that config.json is what `config_json` writes: timm would read files that another one names.

    Raises:
        ModelError: It is not.
    """
    given, written = read_config(folder), json.loads(config_json(spec))
    found, wanted = (
        {**values, "pretrained_cfg": {k: v for k, v in _part(folder, values, "pretrained_cfg").items() if k not in OF_VERSION}}
        for values in (given, written)
    )
    if wrong := [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]:
        raise ModelError(f"{folder}: {wrong[0]} in config.json does not fit spec.json", hint="export or copy it again")


def filtered(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the model's names, and positions resampled to its grid, as timm does on loading."""
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return tensors if translate is None else dict(translate(tensors, model))


def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Copy the tensors that fit into a model. Other weights of the model stay random."""
    weights = model.state_dict()
    missing = {name for name in weights if name not in tensors}
    mismatched = {name for name in weights if name in tensors and tensors[name].shape != weights[name].shape}
    model.load_state_dict({name: t for name, t in tensors.items() if name in weights and name not in mismatched}, strict=False)
    return LoadReport(missing, mismatched, set(tensors) - set(weights))


def model_type(model: Any) -> str:
    """Return the name of a model's adapter: `timm-vit` for every VisionTransformer, else `timm-` and its module."""
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, VisionTransformer):
        return "timm-vit"
    return f"timm-{type(model).__module__.rpartition('.')[2].replace('_', '-')}"


def read_image_facts(model: Any, args: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return the size, channels, mean, std and interpolation of a model's pretraining. A folder's config.json has priority.

    Raises:
        ModelError: Images are not square, or a value is missing.
    """
    cfg = dict(model.pretrained_cfg)
    if folder is not None:
        cfg.update(_part(folder, read_config(folder), "pretrained_cfg"))
    try:
        return _image_facts(model, args, cfg)
    except ModelError as error:
        raise ModelError(f"pretrained_cfg: {error.message}", hint=error.hint or CONFIG_HINT) from error
    except (TypeError, ValueError, LookupError) as error:
        message = f"pretrained_cfg has no size, mean or std of images: {_first_line(error)}"
        raise ModelError(message, hint=CONFIG_HINT) from error


def _image_facts(model: Any, args: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
    if height != width:
        raise ModelError(
            f"the model is for images of {height} × {width}, not square ones", hint="give one side: --set data.image_size=224"
        )
    channels = int(args.get("in_chans") or cfg["input_size"][0])
    return image_facts(int(height), channels, cfg.get("mean"), cfg.get("std"), str(cfg.get("interpolation", "bicubic")))


def label_names(folder: Path) -> list[str] | None:
    """Return the list of labels in a folder's config.json, or None."""
    names = read_config(folder).get("label_names")
    return [str(name) for name in names] if isinstance(names, list) else None


def config_json(spec: ModelSpec) -> str:
    """Return a config.json in timm's layout, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    import timm

    image, architecture = spec.image or {}, spec.config["architecture"]
    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    values = {
        "architecture": architecture,
        "num_classes": spec.num_labels,
        "label_names": spec.label_names,
        "model_args": {key: value for key, value in spec.config["args"].items() if key != "num_classes"},
        "pretrained_cfg": {
            "num_classes": spec.num_labels,
            "input_size": [image["channels"], image["size"], image["size"]],
            "fixed_input_size": True,
            "interpolation": image["interpolation"],
            "crop_pct": 1.0,
            "mean": image["mean"],
            "std": image["std"],
            "first_conv": default and default.first_conv,
            "classifier": default and default.classifier,
        },
    }
    return json.dumps(values, indent=2) + "\n"


def config_of(architecture: str, args: Mapping[str, Any], names: Sequence[str], image_size: int | None) -> dict[str, Any]:
    """Return the `config` of a spec: the architecture, and the arguments with the task's classes and image size."""
    sized = {} if image_size is None else {"img_size": image_size}
    return {"architecture": architecture, "args": {**args, "num_classes": len(names), **sized}}


def _part(folder: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object in a folder's config.json; empty if it is missing."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ModelError(f"{key} in {folder}/config.json is no object, but a {type(found).__name__}", hint=CONFIG_HINT)
    return dict(found)


def _check_args(architecture: str, args: Mapping[str, Any]) -> None:
    """Refuse arguments that name files, and sizes that no model has."""
    for key, value in args.items():
        if key in REFUSED_ARGS:
            raise ModelError(f"{key} is an argument of {architecture} that RECAP refuses", hint=CONFIG_HINT)
        for size in value if isinstance(value, list | tuple) else [value]:
            if isinstance(size, int | float) and not size <= LIMITS.get(key, LARGEST):  # NaN too
                raise ModelError(f"{key} of this {architecture} is {size:,}, which no model has", hint=CONFIG_HINT)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
