"""Torch's record of every allocation on a CUDA device, for its viewer (https://docs.pytorch.org/memory_viz).

torch writes the file as a pickle, which RECAP never reads. Only this module calls these private functions of torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from recap_cli.errors import StorageError, UsageError

EVENTS = 100_000  # the newest ones; each has some kilobytes, and a round may have millions


def check(file: Path, device: torch.device) -> None:
    """Check that a snapshot of the device can be written to `file`, without leaving a file there.

    Raises:
        UsageError: The device is not CUDA's, the file exists already, or its folder does not.
        StorageError: The file cannot be written.
    """
    if device.type != "cuda":
        raise UsageError(
            f"--snapshot records CUDA's allocator, and this stage would run on {device}",
            hint="leave out --snapshot, or use a machine with a CUDA device: `recap doctor` lists the devices",
        )
    try:
        file.open("xb").close()
        file.unlink()
    except FileExistsError:
        raise UsageError(f"--snapshot {file}: exists already", hint="name another file") from None
    except FileNotFoundError:
        raise UsageError(f"--snapshot {file}: there is no folder {file.parent}", hint="make it first") from None
    except OSError as error:
        raise StorageError(f"--snapshot {file}: cannot be written: {error.strerror}", hint="name another file") from error


@contextmanager
def recording(file: Path | None, note: Callable[[str], object]) -> Iterator[None]:
    """Record allocations inside, and write the file at the end, also after an error such as OutOfMemoryError.

    Args:
        file: Where to write; None records nothing.
        note: Is called with a sentence if the file cannot be written. The training is not affected.
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
