"""The files of checkpoints, in a local folder or the hub's cache: safetensors only, checked before a model is built."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from recap_cli.errors import ModelError
from recap_cli.untrusted import files as foreign

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
WANTED = ("*.json", "*.txt", "*.model", WEIGHTS, "model-*.safetensors")  # .txt and .model: tokenizers
CONFIGS = ("config.json", "preprocessor_config.json")
TIMEOUT_SECONDS = 5.0
LFS_POINTER = b"version https://git-lfs"  # how the file begins that git has instead of a large one
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTIZED_HINT = "name the model without quantization; RECAP quantizes it with --set finetune.weights=int8 (or nf4)"
FOLDER_HINT = "name a local folder with config.json and model.safetensors: --set model.name=DIR"
CONFIG_HINT = "copy or download config.json again, or name another folder: --set model.name=DIR"


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)  # of this thread


class LoadReport(NamedTuple):
    """The names of weights that a checkpoint lacks, has with another shape, and has in addition to its model's."""

    missing: set[str]
    mismatched: set[str]
    unexpected: set[str]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence load reports, progress bars and warnings of transformers, which ruin logs. Errors are shown.

    Its handlers are silenced, not its loggers: a change of a logger's level makes `logging` look through all loggers.
    Where its records go on to the handlers of the whole process, as in CI, those drop only what is transformers'.
    Inside another such block it does nothing.
    """
    from transformers.utils import logging as hf_logging

    if _QUIET.get():
        yield
        return
    silenced, bars = _QUIET.set(True), hf_logging.is_progress_bar_enabled()
    hf_logging.get_logger()  # makes the library's own handler, if nothing has
    library = logging.getLogger("transformers")
    handlers = [*library.handlers, *(logging.getLogger().handlers if library.propagate else ())]
    for handler in handlers:
        handler.addFilter(_is_worth_hearing)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _QUIET.reset(silenced)
        for handler in handlers:
            handler.removeFilter(_is_worth_hearing)
        if bars:
            hf_logging.enable_progress_bar()


def _is_worth_hearing(record: logging.LogRecord) -> bool:
    """Whether a record is an error, or not of transformers."""
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] != "transformers"


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Silence the same of timm, which logs by the handlers of others."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)


def locate(name: str, revision: str | None = None, *, only_config: bool = False) -> Path:
    """Return the folder with the files of a model: `name` if it is a folder, else the files of the hub in its cache.

    Args:
        name: A folder or a hub id.
        revision: A branch, tag or commit on the hub.
        only_config: Download only the configuration, which is small JSON files.

    Raises:
        ModelError: There is no such folder, the hub cannot be reached, or it has no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file, not a folder with a model", hint=FOLDER_HINT)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}", hint=FOLDER_HINT)
    return _download(name, revision, CONFIGS if only_config else WANTED)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder.

    Raises:
        ModelError: There is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.exists() and not path.is_symlink():
        raise ModelError(f"{folder} has no config.json", hint=FOLDER_HINT)
    return foreign.read_object(path, CONFIG_HINT)


def check_weights(folder: Path) -> list[Path]:
    """Check the safetensors files of a folder, and return their paths.

    Raises:
        ModelError: A file is missing, truncated or quantized; the message names it.
    """
    files = _weight_files(folder)
    for path in files:
        try:
            foreign.check_ordinary(path)
            with safe_open(path, framework="pt") as file:  # reads the header and compares it with the file's length
                _check_types(path, file)
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing, though {INDEX} names it", hint="copy or download it again") from error
        except (SafetensorError, OSError) as error:
            if _is_pointer(path):
                raise ModelError(
                    f"{path} holds no weights, only the pointer of git LFS to them", hint="git lfs pull, in that folder"
                ) from error
            raise ModelError(f"{path} is truncated or damaged: {error}", hint="copy or download it again") from error
        except MemoryError as error:
            raise ModelError(
                f"{path} is larger than the memory that is left", hint="end other programs, or name another"
            ) from error
    return files


def count_weights(folder: Path) -> int:
    """Return how many numbers the weights of a folder have. Raises `ModelError` as `check_weights` does."""
    count = 0
    for path in check_weights(folder):
        with safe_open(path, framework="pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  (no mapping)
    return count


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder by name. Raises `ModelError` as `check_weights` does."""
    return {name: tensor for path in check_weights(folder) for name, tensor in load_file(path).items()}


def _check_types(path: Path, file: Any) -> None:
    """Raise `ModelError` for integer or 8-bit weights, which mean nothing without the scales of their quantization."""
    for name in file.keys():  # noqa: SIM118  (no mapping)
        if name.endswith(".weight") and (kind := file.get_slice(name).get_dtype()) not in FLOATS:
            raise ModelError(f"{path}: {name} is quantized ({kind})", hint=QUANTIZED_HINT)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return [folder / shard for shard in _shards(folder / INDEX)]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights as {pickled[0]}, a pickle; RECAP reads safetensors only",
            hint="if you trust it, convert it once: AutoModel.from_pretrained(DIR).save_pretrained(NEW)",
        )
    raise ModelError(f"{folder} has no {WEIGHTS}", hint=FOLDER_HINT)


def _shards(path: Path) -> list[str]:
    """Return the files that an index names. Raises `ModelError` if it names none, or one outside its folder."""
    shards = foreign.read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{path} does not name the files of the weights (weight_map)", hint=foreign.AGAIN)
    for shard in shards.values():
        if not foreign.is_plain(shard) or not shard.endswith(".safetensors"):
            raise ModelError(f"{path} names {shard!r}, which is no safetensors file in the same folder", hint=foreign.AGAIN)
    return sorted(set(shards.values()))


def _download(name: str, revision: str | None, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), etag_timeout=TIMEOUT_SECONDS))
    except GatedRepoError as error:
        raise ModelError(f"the hub gives {name} only to users with access", hint="log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the hub", hint="--set model.revision=main") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"there is no folder {name}, and no model of that name on the hub", hint=FOLDER_HINT) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name}, the hub cannot be reached, and its cache does not have the model", hint=FOLDER_HINT
        ) from error
    except (HfHubHTTPError, OSError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name} cannot be downloaded from the hub: {first_line}", hint=FOLDER_HINT) from error
    finally:
        enable_progress_bars()
