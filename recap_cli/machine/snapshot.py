"""Torch's record of every allocation on a CUDA device, for its viewer (https://docs.pytorch.org/memory_viz).

The file is what torch writes, a pickle; nothing here ever reads one. The functions of torch are private ones: they are called
here and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from recap_cli.errors import StorageError, UsageError

EVENTS = 100_000  # the newest so many; each is some kilobytes, and a whole round may be millions


def check(file: Path, device: torch.device) -> None:
    """Pass where a snapshot of the device could be written to `file`, which is not there afterwards either.

    Raises `UsageError` if the device is none of CUDA's, the file is there already or has no folder, `StorageError` if it cannot
    be written.
    """
    if device.type != "cuda":
        raise UsageError(
            f"--snapshot records CUDA's allocator, and this stage would run on {device}",
            hint="leave out --snapshot, or use a machine with a CUDA device: `recap doctor` lists what there is",
        )
    try:
        file.open("xb").close()
        file.unlink()
    except FileExistsError:
        raise UsageError(f"--snapshot {file}: is there already", hint="name another file") from None
    except FileNotFoundError:
        raise UsageError(f"--snapshot {file}: there is no folder {file.parent}", hint="make it first") from None
    except OSError as error:
        raise StorageError(f"--snapshot {file}: cannot be written: {error.strerror}", hint="name another file") from error


@contextmanager
def recording(file: Path | None, note: Callable[[str], object]) -> Iterator[None]:
    """Record until the end of the `with` block, be it an error (an OutOfMemoryError most of all), and write the file then.

    A file that cannot be written costs the training nothing: it becomes a sentence for `note`. Without a file nothing happens.
    """
    if file is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    try:
        yield
    finally:
        try:
            torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            note(f"the snapshot {file} could not be written: {error}")
        torch.cuda.memory._record_memory_history(enabled=None)
