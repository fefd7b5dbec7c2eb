"""Data sets of the Hugging Face hub, or of its local cache if the hub cannot be reached."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PROBE_SECONDS = 5.0


def read_hub(name: str, subset: str | None, splits: Sequence[str]) -> "list[pa.Table]":
    """Return one table per split, with the features of the data set in its metadata.

    Raises:
        DataError: The data set, its subset or a split does not exist, or neither the hub nor its cache has it.
    """
    import datasets

    found = []
    with _quiet(), _offline_without_hub():
        for split in splits:
            try:
                dataset = datasets.load_dataset(name, subset, split=split)
            except Exception as error:  # datasets raises the errors of its HTTP client, file systems and builders
                raise _not_there(name, subset, split, error) from error
            metadata = dataset.features.arrow_schema.metadata
            found.append(dataset.data.table.replace_schema_metadata(metadata))
    return found


def _not_there(name: str, subset: str | None, split: str, error: Exception) -> DataError:
    place = name if subset is None else f"{name} ({subset})"
    hint = "without the hub, use local files: --set data.train=FILE --set data.validation=FILE"
    if isinstance(error, ConnectionError):
        return DataError(f"the hub cannot be reached, and {place} is not in its cache on this machine", hint=hint)
    if isinstance(error, ValueError):
        hint = "choose among those with --set data.subset=…, data.train_split=… and data.validation_split=…"
    reason = " ".join(str(error).split())  # on one line
    return DataError(f"split {split!r} of {place} cannot be read from the hub: {reason}", hint=hint)


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of the libraries, which ruin logs, unless the environment decides on them."""
    import datasets
    import huggingface_hub

    libraries: list[Any] = [datasets.utils, huggingface_hub.utils]
    if {"HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"} & os.environ.keys():
        libraries = []
    shown = [library for library in libraries if not library.are_progress_bars_disabled()]
    for library in shown:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bars()


@contextmanager
def _offline_without_hub() -> Iterator[None]:
    """Use only the cache if the hub does not answer. Without this, `datasets` tries for 23 seconds (measured, no network)."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not _answers(config.HF_ENDPOINT)
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Whether a connection can be made. With a proxy only the proxy knows, and the answer is yes."""
    address = urlsplit(endpoint)
    if {address.scheme, "all"} & getproxies().keys():
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError:  # no network, no name, no server
        return False
    return True
