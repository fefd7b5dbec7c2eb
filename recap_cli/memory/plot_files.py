"""The pictures of `profile-memory`: bars by kind where there is one setting, a curve for each list of settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recap_cli.errors import StorageError
from recap_cli.memory import plots
from recap_cli.memory.picture import check_path, save


def check(path: Path) -> None:
    """Raise `UsageError` or `StorageError` if no picture can be written to `path`."""
    check_path(path)
    if path.is_dir():
        raise StorageError(f"{path} cannot be written: it is a folder", hint=f"name a file in it: {path / 'memory.svg'}")


def draw(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    batch_sizes: Sequence[int] = (),
    prune_ratios: Sequence[float] = (),
    budget_bytes: int | None = None,
) -> list[Path]:
    """Write the bars of these predictions to `path`, or their curves, beside it if they are of both settings; returns the
    paths of what was written. The peak is that of a training step: scoring may take whatever batch fits.
    """
    rows = [{**row, "peak_bytes": row["training_peak_bytes"], "evaluation_peak_bytes": 0} for row in rows]
    given: dict[str, Any] = {"name": title, "budget_bytes": budget_bytes}
    grids: dict[plots.By, Sequence[float]] = {"batch_size": batch_sizes, "prune_ratio": prune_ratios}
    curves = [by for by, values in grids.items() if len(values) > 1]
    if not curves:
        save(plots.bars(rows, **given), path)
        return [path]
    written = []
    for by in curves:
        place = path if len(curves) == 1 else path.with_stem(f"{path.stem}-{by.replace('_', '-')}")
        save(plots.curves(rows, by=by, **given), place)
        written.append(place)
    return written
