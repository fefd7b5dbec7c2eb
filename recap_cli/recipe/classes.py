"""The file of `data.classes`: read once, so that a state and a comparison have its content, and not a name."""

import json
from pathlib import Path
from typing import Any

LARGEST_BYTES = 2**20


def read_classes(path: Path) -> Any:
    """Return what a JSON file says of classes: its content, or what stands there under `id2label` or `classes`.

    Raises:
        OSError: It cannot be read, or is larger than `LARGEST_BYTES`.
        ValueError: It is no JSON.
    """
    if path.stat().st_size > LARGEST_BYTES:
        raise OSError(f"it is larger than {LARGEST_BYTES // 1024} KiB")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(found, dict):
        found = next((found[key] for key in ("id2label", "classes") if isinstance(found.get(key), dict | list)), found)
    return found
