"""Files that last: with size and checksum, flushed before they count, and with an error that names a full disk.

This module knows nothing of states. A process hashes a file once, unless size, times or inode show a change.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.errors import CorruptStateError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

DENIED = "it may not be read"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_PLACE = frozenset({errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.ELOOP})  # no folder can have that name
HEADER_BYTES = 1 << 16  # what the disk needs in addition to the tensors: the safetensors header, state.yaml

Fingerprint = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Checksum:
    """The size and SHA-256 that a committed file must have."""

    bytes: int
    sha256: str


_checksummed: dict[Fingerprint, Checksum] = {}  # of this process, so that a run does not hash a file twice


def fingerprint(path: Path) -> Fingerprint:
    """Return what changes when a file is written or replaced: device, inode, bytes, and both times in nanoseconds."""
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def oddity(path: Path) -> str | None:
    """Return what a path is instead of a plain file, in words; None for a plain file. Links are not followed.

    Raises:
        OSError: It does not exist, or cannot be looked at.
    """
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    kinds = {"a link": stat.S_ISLNK, "a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((word for word, is_it in kinds.items() if is_it(mode)), "a device")


def odd_place(root: Path, rel: str) -> tuple[Path, str] | None:
    """Return the first path from `root` to the file `rel` that is not a plain folder or file, and what it is instead.

    Returns:
        None if all are plain, or if one does not exist.
    """
    parts = rel.split("/")
    for count in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:count])
        try:
            found = oddity(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if count < len(parts):
            found = None if found == "a folder" else found or "a file"
        if found:
            return path, found
    return None


def checksum(path: Path) -> Checksum:
    """Return the size and SHA-256 of a file. It is read only if it is new to this process, or has changed."""
    before = fingerprint(path)
    if before in _checksummed:
        return _checksummed[before]
    with path.open("rb") as file:
        found = Checksum(before[2], hashlib.file_digest(file, "sha256").hexdigest())
    if fingerprint(path) == before:
        _checksummed[before] = found
    return found


def difference(path: Path, expected: Checksum) -> str | None:
    """Return how a file differs from its checksum, in words, or None. A file of another size is not hashed."""
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"it has {size:,} bytes, {expected.bytes:,} were committed"
        found = checksum(path)
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing"
    except PermissionError as error:
        return f"{DENIED} ({error.strerror})"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if found.sha256 != expected.sha256:
        return f"its sha256 begins with {found.sha256[:12]}, {expected.sha256[:12]} was committed"
    return None


def flush(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk and not only in memory."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def flush_folders(root: Path, rels: Iterable[str]) -> None:
    """Flush every folder from `root` (included) down to the files `rels`, the deepest first."""
    folders = {root, *(root / parent for rel in rels for parent in Path(rel).parents)}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with storage_errors(folder):
            flush(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, not yet flushed.

    Raises:
        StorageError: The disk is full, or the file cannot be written.
    """
    data = text.encode()
    with storage_errors(path, len(data)):
        path.write_bytes(data)


def replace_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Replace a whole file at once: at any moment, and after a crash, it holds the old or the new text.

    Args:
        path: The file.
        text: The new text.
        temporary: A file on the same disk that is written first; one beside `path` by default.

    Raises:
        StorageError: The disk is full, or the file cannot be written. The old text stands, unless the error names the folder.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    write_text(temporary, text)
    with storage_errors(path, len(text)):
        flush(temporary)
        os.replace(temporary, path)
    with storage_errors(path.parent):
        flush(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], by: Path | None = None) -> None:
    """Write a safetensors file, not yet flushed. Contiguous CPU tensors are not copied.

    Args:
        path: The file.
        tensors: The tensors by name.
        by: A folder on the same disk in which the file is written before it is moved; the file's folder by default.
            safetensors writes a temporary file first, which stays there after a kill.

    Raises:
        StorageError: The disk is full, or the file cannot be written. Too little free space is found before anything is
            written.
    """
    from safetensors.torch import save_file

    wanted_bytes = HEADER_BYTES + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with storage_errors(path, wanted_bytes):
        free = free_bytes(path)
        if free is not None and free < wanted_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        made = (by or path.parent) / path.name
        made.touch()
        mode = made.stat().st_mode
        packed = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(packed, made, {"format": "pt"})
        made.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
        os.replace(made, path)


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Return the tensors of a safetensors file, on the CPU. They are private pages of it: writing to them changes no file.

    Raises:
        CorruptStateError: The file is not in the safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CorruptStateError(f"{path}: is no safetensors file ({error})") from error
    return tensors


def free_bytes(path: Path) -> int | None:
    """Return the bytes that the disk of `path` has free for this user, or None if the file system reports none."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return usage.free if usage.total else None


@contextmanager
def storage_errors(path: Path, wanted_bytes: int | None = None) -> Iterator[None]:
    """Turn every error of the system inside into a StorageError that names `path`."""
    try:
        yield
    except Exception as error:  # safetensors raises another type, with the system's error only in its text
        code = system_error(error)
        if code is None:
            raise
        raise storage_error(path, code, wanted_bytes) from error


@contextmanager
def refused_writes(root: Path) -> Iterator[None]:
    """Turn a full disk, or a refusal to write below `root`, into a StorageError; other errors pass.

    For libraries that write files themselves, as `save_pretrained` does.
    """
    try:
        yield
    except Exception as error:  # as in storage_errors
        code = system_error(error)
        named = getattr(error, "filename", None)
        place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else root
        below = place.absolute().is_relative_to(root.absolute())
        if code in FULL or (code in REFUSED and below):
            raise storage_error(place, code) from error
        raise


def system_error(error: BaseException) -> int | None:
    """Return the `errno` of an OSError, or the one that an error of safetensors names in its text, or None."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"(?:os error |code: )(\d+)", str(error))  # as safetensors 0.8, 0.5 write it
        return int(found.group(1)) if found else None
    return None


def storage_error(path: Path, code: int, wanted_bytes: int | None = None) -> StorageError:
    """Return the error that names the file, why it cannot be written and, on a full disk, the bytes wanted and free."""
    if code not in FULL:
        mend = "" if code in NO_PLACE else "make the folder writable, or "
        hint = f"{mend}use another one with --state (`recap compare`: --out)"
        return StorageError(f"{path}: cannot be written: {os.strerror(code)}", hint=hint)
    sizes = [] if wanted_bytes is None else [f"{wanted_bytes:,} bytes wanted"]
    free = free_bytes(path)
    if free is not None:
        sizes.append(f"{free:,} bytes free")
    hint = "free space on that disk, or raise the quota, and run the same command again"
    return StorageError(f"{path}: cannot be written: {', '.join([os.strerror(code), *sizes])}", hint=hint)
