"""Images that are cut, strange, or bombs: what the cases of `data` put among the images of a class."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

from tests.fuzz import damage
from tests.fuzz.case import Box

WHOLE = "an image that is no whole image is refused"
PATCHES = ("cut", "flip", "insert", "drop-line", "double-line")  # of a file's bytes: they make no whole image of a broken one


def altered(root: Path, step: tuple[Any, ...], box: Box, spoiled: dict[Path, str]) -> None:
    """Do a step to the folders of images, and note in `spoiled` which files nobody may take for images, by which rule."""
    files = sorted(file for file in (root / "train").rglob("*.png") if not _is_hidden(file.relative_to(root)))
    if step[0] in ("bytes", "file"):
        touched = damage.apply(root, step[2], box.outside)
        if touched and touched.startswith("train") and touched.endswith(".png") and not _is_hidden(Path(touched)):
            _note(spoiled, root / touched, step[2][0], WHOLE if step[2][0] in ("empty", "junk") else "")
    if step[0] == "beside":
        path = root / "train" / os.fsdecode(step[1].encode().decode("unicode_escape").encode("utf-8", "surrogateescape"))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.suffix == ".png" and not path.name.startswith("._")
        path.write_bytes(png(16, 16) if whole else b"\0\5\x16\7")
    elif step[0] == "mode":
        file = files[int(step[1] * len(files))]
        damage.apply(file.parent, ("delete", file.name), box.outside)  # a pipe of an earlier step would be waited for
        _save(file, step[2], step[3])
        _note(spoiled, file, "mode", "")
    elif step[0] == "png":
        file = files[int(step[1] * len(files))]
        _note(spoiled, file, step[2], _broken(file, step, box))
    elif step[0] == "must-refuse":
        spoiled[root] = str(step[1])


def _note(spoiled: dict[Path, str], file: Path, what: str, rule: str) -> None:
    if rule or what not in PATCHES:
        spoiled[file] = rule


def _is_hidden(file: Path) -> bool:
    """Whether a file is one of those that are noted, and not read."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.parts)


def _broken(file: Path, step: tuple[Any, ...], box: Box) -> str:
    what, share = step[2], step[3]
    if what in ("bomb", "wide", "text"):
        damage.apply(file.parent, ("delete", file.name), box.outside)
    if what == "bomb":
        file.write_bytes(png(20_000, 20_000))
    elif what == "wide":
        file.write_bytes(png(5000, 1))
    elif what == "text":
        file.write_text("no image")
    else:
        damage.apply(
            file.parent, (what, file.name, *((share, 3) if what == "flip" else (share,) if what == "cut" else ())), box.outside
        )
    cut = what == "cut" and share < 0.5
    return WHOLE if cut or what in ("empty", "junk", "text", "dangling") else ""


def _save(file: Path, mode: str, edge: int) -> None:
    """An image of a mode, as PNG or TIFF."""
    import numpy as np
    from PIL import Image

    grey = np.linspace(0, 1, edge * edge).reshape(edge, edge)
    made = {
        "I;16": lambda: Image.fromarray((grey * 65535).astype(np.uint16)),
        "I": lambda: Image.fromarray((grey * 65535).astype(np.int32)),
        "F": lambda: Image.fromarray(grey.astype(np.float32)),
    }
    image = (
        made[mode]()
        if mode in made
        else Image.fromarray((grey * 255).astype(np.uint8)).convert("RGB").convert("L" if mode == "LA" else mode)
    )
    image = image.convert("LA") if mode == "LA" else image
    form = "PNG" if mode in ("1", "L", "LA", "P", "RGBA", "I;16") else "TIFF"
    if form == "TIFF" and mode == "HSV":
        image = image.convert("RGB")
    image.save(file, form)


def png(width: int, height: int) -> bytes:
    """A black image of one bit a pixel, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed, row = zlib.compressobj(9), b"\0" * (1 + (width + 7) // 8)
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def ramp(file: Path, depth: str, number: int) -> None:
    import numpy as np
    from PIL import Image

    grey = np.linspace(1000, 60_000, 256).reshape(16, 16)
    pixels = np.roll(grey if len(file.parent.name) % 2 else grey.T, number % 5, axis=0)
    made = {"8": (pixels / 257).astype(np.uint8), "white": np.full((16, 16), 255, np.uint8), "16": pixels.astype(np.uint16)}
    Image.fromarray(made[depth]).save(file)
