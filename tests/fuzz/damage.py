"""Steps that damage files: bytes cut or put in, files taken away or replaced by what is no file, trees and tensors altered.

A step is a tuple of JSON values, its name first. A file is named, or counted among all files of the folder.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz.values import LARGE, hostile, in_text, shares, unfold

Node = tuple[Any, Any]  # a container, and the key or index in it

which = st.integers(0, 40)
TENSOR_OPERATIONS = ("drop", "rename", "longer", "flat", "half", "whole", "nan", "inf", "empty", "strange")
bytewise = st.one_of(
    st.tuples(st.just("cut"), which, shares),
    st.tuples(st.just("flip"), which, shares, st.integers(0, 7)),
    st.tuples(
        st.just("insert"),
        which,
        shares,
        st.sampled_from(["\0", "\n", "\x1b[2J", "\xff", "[" * 2000, "x" * 300, "- ", ": ", "&a *a"]),
    ),
    st.tuples(st.just("drop-line"), which, shares),
    st.tuples(st.just("double-line"), which, shares),
)
filewise = st.tuples(
    st.sampled_from(["empty", "delete", "fifo", "folder", "link", "dangling", "sparse", "socket", "zero", "junk"]), which
)
tree = st.tuples(
    st.just("tree"), which, shares, st.sampled_from(["set", "set", "set", "delete", "rename", "wrap", "double"]), hostile
)
tensor = st.tuples(st.just("tensor"), which, shares, st.sampled_from(TENSOR_OPERATIONS))
large = st.tuples(st.just("tree"), which, shares, st.just("set"), st.sampled_from(LARGE))


def on(name: str, steps: st.SearchStrategy[tuple[Any, ...]]) -> st.SearchStrategy[tuple[Any, ...]]:
    """The same steps on one named file."""
    return steps.map(lambda step: (step[0], name, *step[2:]))


def apply(root: Path, step: tuple[Any, ...], outside: Path) -> str | None:
    """Do one step to a file below `root`; returns its name, or None where there is nothing to damage.

    `outside` is where a file goes that a link is put in place of.
    """
    file = pick(root, step[1], {"tensor": ".safetensors", "tree": (".json", ".yaml")}.get(step[0], ""))
    if file is None or root not in Path(os.path.normpath(file)).parents:
        return None
    ACTIONS[step[0]](file, outside, *step[2:])
    return file.relative_to(root).as_posix()


def pick(root: Path, name: str | int, suffix: Any = "") -> Path | None:
    """The file that is meant, or None if there is none of that name and suffix."""
    if isinstance(name, str):
        return next(iter(sorted(root.glob(name))), None) if "*" in name else root / name
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and path.name.endswith(suffix))
    return files[name % len(files)] if files else None


def _bytes(change: Callable[..., bytes]) -> Callable[..., None]:
    def act(file: Path, _: Path, *values: Any) -> None:
        if is_small(file):
            file.write_bytes(change(file.read_bytes(), *values))

    return act


def is_small(file: Path) -> bool:
    """Whether it is a file, and not the sparse one of 1 TB."""
    return file.is_file() and file.stat().st_size < 2**26


def _flip(data: bytes, share: float, bit: int) -> bytes:
    at = int(share * len(data))
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else data


def _insert(data: bytes, share: float, text: str) -> bytes:
    at = int(share * len(data))
    return data[:at] + text.encode("latin-1") + data[at:]


def _line(copies: int) -> Callable[[bytes, float], bytes]:
    def change(data: bytes, share: float) -> bytes:
        lines = data.splitlines(keepends=True)
        at = int(share * len(lines))
        return b"".join(lines[:at] + lines[at : at + 1] * copies + lines[at + 1 :])

    return change


def _instead(make: Callable[[Path, Path], object]) -> Callable[..., None]:
    def act(file: Path, outside: Path, *_: Any) -> None:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        make(file, outside)

    return act


def _socket(file: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(file.parent)  # the name of a socket is short
        made.bind(file.name)
        os.chdir(here)


def _sparse(file: Path, _: Path) -> None:
    with file.open("wb") as made:
        made.truncate(2**40)


def _link(file: Path, outside: Path, *_: Any) -> None:
    """Move a file or folder elsewhere, as to a larger disk, and link it back."""
    if file.exists():
        elsewhere = outside.with_name("elsewhere")
        elsewhere.mkdir(exist_ok=True)
        shutil.move(file, elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)


def _drop_match(file: Path, _: Path, pattern: str) -> None:
    """Take the first line away that a pattern is found in."""
    lines = file.read_text().splitlines(keepends=True)
    del lines[next(at for at, line in enumerate(lines) if re.search(pattern, line))]
    file.write_text("".join(lines))


def _tree(file: Path, _: Path, share: float, operation: str, value: Any) -> None:
    """Alter one node of a JSON or YAML file."""
    found = read_tree(file)
    nodes = list(_nodes(found))
    if nodes:
        _alter(*nodes[int(share * len(nodes))], operation, unfold(value))
        write_tree(file, found)


def read_tree(file: Path) -> Any:
    """The value of a JSON or YAML file; None where it is none."""
    if not is_small(file):
        return None
    try:
        text = file.read_text()
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def write_tree(file: Path, value: Any) -> None:
    """Write a value as JSON or YAML, whatever it is."""
    text = json.dumps(value) if file.suffix == ".json" else yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    file.write_text(in_text(text))


def _nodes(value: Any) -> Iterator[Node]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _nodes(inner)


def _alter(container: Any, key: Any, operation: str, value: Any) -> None:
    if operation == "delete":
        del container[key]
    elif operation == "wrap":
        container[key] = [container[key]]
    elif operation == "double" and isinstance(container, list):
        container.append(container[key])
    elif operation in ("rename", "double") and isinstance(container, dict):
        container[str(value)[:200]] = container[key] if operation == "double" else container.pop(key)
    else:
        container[key] = value


def _at(file: Path, _: Path, dotted: str, value: Any) -> None:
    """Set the value at a dotted key of a JSON or YAML file; `$delete` takes it away."""
    found = read_tree(file)
    *way, last = [int(part) if part.lstrip("-").isdigit() else part for part in dotted.split("/")]
    inner = found
    for part in way:
        inner = inner[part]
    if value == "$delete":
        del inner[last]
    else:
        inner[last] = unfold(value)
    write_tree(file, found)


def _keep_files(file: Path, _: Path, count: int) -> None:
    """Cut a state.yaml after so many entries of `files`: what is left is good YAML."""
    head, _found, rest = file.read_text().partition("\nfiles:\n")
    file.write_text(head + "\nfiles:\n" + "".join(rest.splitlines(keepends=True)[: 3 * count]))


def _tensor(file: Path, _: Path, share: float | str, operation: str) -> None:
    """Alter one tensor of a safetensors file: counted, or named."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    if not is_small(file):
        return
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
    except SafetensorError:  # an earlier step has damaged the file: it has no tensors to alter
        return
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if not tensors:
        return
    name = share if isinstance(share, str) else sorted(tensors)[int(share * len(tensors))]
    old = tensors.pop(name)
    made = {
        "longer": lambda: torch.cat([old, old[:1]]) if old.dim() else old[None],
        "flat": lambda: old.reshape(-1, 1).clone(),
        "half": lambda: old.to(torch.float16),
        "whole": lambda: old.to(torch.int64),
        "nan": lambda: torch.full_like(old, float("nan")) if old.is_floating_point() else old + 7,
        "inf": lambda: torch.full_like(old, float("inf")) if old.is_floating_point() else old - 7,
        "empty": lambda: old[:0].clone() if old.dim() else old[None][:0],
    }
    if operation in made:
        tensors[name] = made[operation]()
    elif operation == "rename":
        tensors[f"{name}.evil"] = old
    elif operation == "strange":
        tensors |= {name: old, "a.stranger.weight": torch.zeros(3, 3)}
    save_file(tensors, file, metadata)


def _bomb(file: Path, _: Path, levels: int, width: int, key: str) -> None:
    """Append a section whose aliases stand for width to the power of levels values."""
    lines = ["b0: &b0 [x]", *(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * width)}]" for n in range(1, levels))]
    with file.open("a") as text:
        text.write(f"{key}:\n" + "".join(f"  {line}\n" for line in lines))


ACTIONS: dict[str, Callable[..., None]] = {
    "cut": _bytes(lambda data, share: data[: int(share * len(data))] if share < 1 else data[: int(share)]),
    "flip": _bytes(_flip),
    "insert": _bytes(_insert),
    "append": _bytes(lambda data, text: data + text.encode("latin-1")),
    "drop-line": _bytes(_line(0)),
    "double-line": _bytes(_line(2)),
    "drop-match": _drop_match,
    "empty": _bytes(lambda data: b""),
    "junk": _bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    "delete": _instead(lambda file, _: None),
    "fifo": _instead(lambda file, _: os.mkfifo(file)),
    "folder": _instead(lambda file, _: file.mkdir()),
    "dangling": _instead(lambda file, _: file.symlink_to("nowhere")),
    "zero": _instead(lambda file, _: file.symlink_to("/dev/zero")),
    "sparse": _instead(_sparse),
    "socket": _instead(_socket),
    "link": _link,
    "tree": _tree,
    "at": _at,
    "keep-files": _keep_files,
    "tensor": _tensor,
    "bomb": _bomb,
}


def _replace(file: Path, _: Path, text: str) -> None:
    """Put a file with this text in the place of whatever is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(in_text(text).encode("utf-8", "surrogateescape"))


ACTIONS["write"] = _replace
