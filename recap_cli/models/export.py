"""The export: the small model as a folder that `recap_cli.load`, and if possible its library, opens.

There are three forms:

- *stock*: all layers are alike, and a configuration of the library describes them. `from_pretrained` opens the folder.
- *ragged*: layers differ, or no configuration describes them. Only `recap_cli.load` opens the folder.
- *dense*: the original shapes, with zeros in place of cut groups.

BERT and others ignore configuration keys that other models respect, so no form is assumed. Each export is opened again, and
its shapes and logits are compared.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.core.adapter import Adapter, find_axes
from recap_cli.core.axes import Axis, UnitMask, all_units, counts, shapes_of
from recap_cli.core.surgery import indices, put
from recap_cli.core.ties import first_names
from recap_cli.errors import ModelError, StorageError
from recap_cli.models import build, export_manifest, stock_config, timm_models, transformers_models
from recap_cli.models.checkpoints import WEIGHTS, check_weights, count_weights, read_config
from recap_cli.models.config_checks import check_fit
from recap_cli.models.specs import ModelSpec
from recap_cli.state import files
from recap_cli.untrusted.files import named

TOLERANCE = 1e-5  # of the largest logit


@dataclass(frozen=True)
class Product:
    """A small model with what describes it.

    Attributes:
        spec: The spec of the full model.
        processor: Its tokenizer; None for images.
        adapter: Its adapter.
        tensors: The tensors of the small model.
        axes: The axes of the full model.
        plan: The groups that are kept; nothing is pruned if it is empty.
    """

    spec: ModelSpec
    processor: Any
    adapter: Adapter
    tensors: Mapping[str, Tensor]
    axes: Sequence[Axis]
    plan: UnitMask

    @property
    def sizes(self) -> dict[str, int]:
        """The units kept per axis."""
        return counts(self.plan or all_units(self.axes))


def export(product: Product, out: Path | str, *, dense: bool = False, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a small model to a new folder.

    Args:
        product: The small model.
        out: The new folder.
        dense: True writes the original shapes.
        facts: Further facts for recap.json.

    Returns:
        The content of recap.json, and `path`. `form` is `stock`, `ragged` or `dense`; `reason` is why it is not stock. With
        them `auto_class` and `forward` of the spec: what opens a model of transformers, and what it is called with.

    Raises:
        StorageError: `out` exists and is not empty, or cannot be written.
        ModelError: The export does not have the logits of the small model.
    """
    check_out(Path(out))
    small = build.assemble(product.spec, product.tensors, product.adapter, product.sizes)
    logits = _logits(product.spec, small)
    about: dict[str, Any] = {
        "schema": export_manifest.SCHEMA,
        "sizes": product.sizes,
        "adapter": registry.used("adapters", product.spec.model_type),
        "versions": {name: version(name) for name in ("recap-cli", "torch", "transformers", "timm", "safetensors")},
        "facts": dict(facts or {}),
    }
    with _new_folder(Path(out)) as folder:
        if dense:
            full = replace(product, tensors=_zero_filled(product), plan={})
            _write_stock(folder, full)
            _prove(folder, full, logits)
            about |= {"form": "dense", "reason": None}
        else:
            about |= _write_small(folder, product, logits)
        about["files"] = {path.name: asdict(files.checksum(path)) for path in sorted(folder.iterdir())}
        _write_json(folder / export_manifest.FACTS, about)
    return {**about, "path": str(out), "auto_class": product.spec.auto_class, "forward": product.spec.forward}


def check_out(out: Path) -> None:
    """Check that a folder can be made at `out`, or is empty.

    Raises:
        StorageError: It is a file, is not empty, or cannot be made.
    """
    try:
        if out.is_file():
            raise StorageError(f"{out} is a file, not a folder", hint="name a new folder, or remove the file")
        if out.exists() and any(out.iterdir()):
            raise StorageError(f"{out} exists already and is not empty", hint="name a new folder, or remove this one")
        above = next(folder for folder in out.absolute().parents if folder.exists())
    except OSError as error:
        raise _unwritable(out, error.strerror or str(error)) from error
    if not above.is_dir():
        raise _unwritable(out, f"{above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unwritable(out, f"nothing may be written to {above}")


def load(folder: Path | str) -> nn.Module:
    """Return the model of an export, in eval mode, with the usual forward of its library.

    Files without a checksum in recap.json are not read.

    Raises:
        ModelError: The folder is not an export, comes from a newer version, or its files do not fit each other.
    """
    folder = Path(folder)
    about = export_manifest.read(folder)
    spec = ModelSpec.from_json(_read_text(folder / "spec.json"), str(folder / "spec.json"))
    with named(folder):
        model = _open_ragged(folder, spec, about["sizes"]) if about["form"] == "ragged" else _open_stock(folder, spec)
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{folder}: {name} holds values that are not finite", hint=export_manifest.HINT)
    return model


def _open_ragged(folder: Path, spec: ModelSpec, sizes: dict[str, int]) -> nn.Module:
    """Return the model cut to `sizes` and filled. Raises `ModelError` if the sizes or the shapes do not fit it."""
    tensors, adapter, full = _read_tensors(folder), build.adapter_of(spec), build.on_meta(spec)
    shapes = shapes_of(build.tensors_of(full))
    try:
        axes = find_axes(adapter, full)
    except LookupError as error:
        raise ModelError(f"{folder} is no {spec.model_type}: {error}", hint=export_manifest.HINT) from error
    if {axis.name for axis in axes} != set(sizes) or not all(0 <= sizes[axis.name] <= axis.size for axis in axes):
        raise ModelError(
            f"the sizes in {folder / export_manifest.FACTS} are none of this {spec.model_type}", hint=export_manifest.HINT
        )
    index_map = indices(axes, {axis.name: torch.arange(axis.size) < sizes[axis.name] for axis in axes}, shapes)
    for name, tensor in tensors.items():
        cut = index_map.get(name, {})
        wanted = tuple(len(cut[dim]) if dim in cut else size for dim, size in enumerate(shapes.get(name, ())))
        if name in shapes and tuple(tensor.shape) != wanted:
            raise ModelError(f"{folder}: {name} has shape {tuple(tensor.shape)}; expected {wanted}", hint=export_manifest.HINT)
    return build.assemble(spec, tensors, adapter, sizes)


def _write_small(folder: Path, product: Product, logits: Tensor) -> dict[str, Any]:
    """Write the stock form if it opens with the same logits, else the ragged form. Return the form and why it is not stock."""
    spec, axes = product.spec, product.axes
    stock, reason = stock_config.stock_spec(spec, axes, product.plan or all_units(axes), shapes_of(product.tensors))
    if stock is not None:
        whole = replace(product, spec=stock, plan={})
        try:
            _write_stock(folder, whole)
            _prove(folder, whole, logits)
            return {"form": "stock", "reason": None}
        except ModelError as error:
            reason = error.message
            _empty(folder)
    _describe(folder, product)
    _save(product.tensors, folder)
    reloaded = build.assemble(spec, _read_tensors(folder), product.adapter, product.sizes)
    _compare(_logits(spec, reloaded), logits)
    return {"form": "ragged", "reason": reason}


def _write_stock(folder: Path, product: Product) -> None:
    """Write what the library writes (transformers: with the names of published checkpoints), and spec.json.

    The tensors have the shapes of the spec: nothing of it is pruned.
    """
    _describe(folder, product)
    model: Any = build.assemble(product.spec, product.tensors, product.adapter, {})
    if product.spec.library == "timm":
        tied = {name for name, first in first_names(model).items() if name != first}  # a file has no ties
        _save({name: tensor.clone() if name in tied else tensor for name, tensor in model.state_dict().items()}, folder)
    else:
        transformers_models.save(model, product.spec, folder)


def _describe(folder: Path, product: Product) -> None:
    for name, content in build.describe(product.spec, product.processor).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    files.save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def _prove(folder: Path, product: Product, logits: Tensor) -> None:
    """Open the folder with its library. Raises `ModelError` if names, shapes or logits differ from those written."""
    model = _open_stock(folder, product.spec)
    wanted, first = shapes_of(product.tensors), first_names(model)
    for name, shape in shapes_of(model.state_dict()).items():
        if (given := wanted.get(first.get(name, name))) != shape:
            raise ModelError(f"{folder.name}: the library makes {name} of shape {shape}, not {given}")
    _compare(_logits(product.spec, model), logits)


def _compare(found: Tensor, wanted: Tensor) -> None:
    difference = float((found - wanted).abs().max()) / max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny)
    if not difference <= TOLERANCE:  # NaN too
        raise ModelError(f"loaded again, the model's logits differ by {difference:.1e}")


def _open_stock(folder: Path, spec: ModelSpec) -> nn.Module:
    """Open the folder with a public call of its library. Raises `ModelError` if a weight does not fit."""
    if spec.library == "timm":
        timm_models.check_config(folder, spec)
        check_fit(spec.model_type, build.on_meta(spec), count_weights(folder))
        return cast(nn.Module, timm_models.open_folder(folder))
    config = transformers_models.configure(read_config(folder))
    if config.model_type != spec.model_type:
        raise ModelError(f"{folder}: model_type in config.json is not that of spec.json", hint=export_manifest.HINT)
    transformers_models.check_task(config, spec)
    model, report = transformers_models.from_folder(folder, spec, config)
    if wrong := sorted(report.missing | report.mismatched | report.unexpected):
        raise ModelError(f"a plain {type(model).__name__} cannot hold {wrong[0]}", hint=export_manifest.HINT)
    return model


@torch.no_grad()
def _logits(spec: ModelSpec, model: nn.Module) -> Tensor:
    return build.flat_outputs(spec, model.cpu().eval(), build.example_batch(spec)).double()


def _zero_filled(product: Product) -> dict[str, Tensor]:
    """Return the tensors in their original shapes, zero in place of cut groups: zeroing equals cutting (I1)."""
    original = build.tensors_of(build.on_meta(product.spec))
    index_map = indices(product.axes, product.plan or all_units(product.axes), shapes_of(original))
    full: dict[str, Tensor] = {}
    for name, tensor in product.tensors.items():
        if name in index_map:
            full[name] = torch.zeros(original[name].shape, dtype=tensor.dtype)
            put(full[name], tensor, index_map[name])
        else:
            full[name] = tensor
    return full


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` at the end, and is removed if anything fails."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise _unwritable(out, error.strerror or str(error)) from error
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        for path in scratch.iterdir():
            path.chmod(0o666 & ~_umask())  # safetensors 0.8 makes files that only their owner can read
        os.replace(scratch, out)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{out} cannot be written: {error}", hint="is the disk full?") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwritable(out: Path, why: str) -> StorageError:
    return StorageError(f"{out} cannot be written: {why}", hint="name a folder you may write to")


def _umask() -> int:
    """Return the process's file mode mask: mkdtemp ignores it, and makes folders that only their owner can open."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="recap export STATE OUT writes such a folder") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    check_weights(folder)
    try:
        return dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is missing, truncated or damaged: {error}", hint=export_manifest.HINT) from error
