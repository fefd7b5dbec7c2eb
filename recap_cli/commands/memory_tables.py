"""What `recap profile-memory` prints: tables of bytes by kind, of parameters, and of the changes for a budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recap_cli import console

FIGURES = {
    "weights": "weights_bytes",
    "gradients": "gradients_bytes",
    "optimizer state": "optimizer_bytes",
    "activations": "activations_bytes",
    "sum of maxima": "sum_of_maxima_bytes",
    "temporary": "temporary_bytes",
    "other": "other_bytes",
    "peak instant": "training_peak_bytes",
    "scoring at peak": "evaluation_peak_bytes",
}
SETTINGS = {"batch_size": "batch size", "prune_ratio": "prune.ratio"}
KINDS = ("weights", "gradients", "optimizer", "activations")
REST = ("temporary", "other")
ABREAST, MODULE = 5, 15  # columns of figures in one table, and characters of a module's path: for a width of 80
MEANING = (
    "Each kind's line is the maximum of that kind over a training step; the paper counts the sum of the first four. "
    "The peak instant is the most that all kinds hold at once."
)
NOT_INCLUDED = (
    "cuBLAS's workspaces (8 to 32 MiB on each of two threads)",
    "fragmentation of the allocator",
    "the CUDA context (some 100 MB, outside the allocator)",
)
Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # headings, cells


def show(found: Mapping[str, Any]) -> None:
    """Print the figures on stdout, and on stderr what they mean and what to do next."""
    if "budget" in found:
        _show_budget(found["budget"])
    rows = found["predicted"]
    console.line(f"{found['recipe']}, in MB (10⁶ bytes): finetuning {_settings_text(rows)}")
    for title, some in _blocks_of_rows(rows):
        console.table(*_bytes(some, rows), title=f"{title}redicted", is_result=True)
    if _is_grid(rows) and len({row["method"] for row in rows}) > 1:
        console.table(*_peaks(rows), title="Peak instant", is_result=True)
    console.table(*_parameters(rows), title="Parameters", is_result=True)
    for row in rows:
        if "by_module" in row:
            console.table(*_modules(row["by_module"]), title=f"{_label(row, rows)}: held at the peak", is_result=True)
    if "measured" in found:
        console.table(*_measured(found["measured"]), title="A real step beside its prediction", is_result=True)
    for line in _closing(found):
        console.say(line)


def _is_grid(rows: Sequence[Row]) -> bool:
    return len(rows) > len({row["method"] for row in rows})


def _settings_text(rows: Sequence[Row]) -> str:
    """Return the settings that all rows have in common: `at batch size 8 (4 at a time) with adamw, bf16 weights`."""
    row = rows[0]
    batch_size = row["batch_size"] if len({row["batch_size"] for row in rows}) == 1 else None
    batch = "" if batch_size is None else f"at batch size {batch_size:,}{_parts_text(rows)} "
    names = {"checkpointing": "checkpoints", "fused_backward": "fused backward", "offload": "offloaded optimizer"}
    flags = [f"{name} of {row[key]}" if isinstance(row[key], str) else name for key, name in names.items() if row[key]]
    how = ", ".join([row["optimizer"], f"{row['weights']} weights", *flags])
    return f"{batch}with {how}; scoring at batch size {row['evaluation_batch_size']:,}"


def _parts_text(rows: Sequence[Row]) -> str:
    """Return how much of a batch is taken at a time, of each method if they differ, as in ` (recap 4 at a time)`."""
    parts = {row["method"]: row["micro_batch_size"] for row in rows if row["micro_batch_size"] != row["batch_size"]}
    if not parts:
        return ""
    if len(parts) == len(rows) and len(set(parts.values())) == 1:
        return f" ({rows[0]['micro_batch_size']:,} at a time)"
    return f" ({', '.join(f'{method} {size:,} at a time' for method, size in parts.items())})"


def _blocks_of_rows(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each table that fits on a screen, with the start of its title. A grid has a table per method."""
    methods = dict.fromkeys(row["method"] for row in rows) if _is_grid(rows) else [None]
    for method in methods:
        of_method = [row for row in rows if method in (None, row["method"])]
        for start in range(0, len(of_method), ABREAST):
            yield "P" if method is None else f"{method}: p", of_method[start : start + ABREAST]


def _setting(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """Return the settings, by name, in which a row differs from others of its method."""
    of_method = [other for other in rows if other["method"] == row["method"]]
    differ = [key for key in SETTINGS if len({other[key] for other in of_method}) > 1]
    return {SETTINGS[key]: f"{row[key]:,}" if key == "batch_size" else f"{row[key]:.1%}" for key in differ}


def _label(row: Row, rows: Sequence[Row]) -> str:
    return ", ".join([row["method"], *(f"{name} {value}" for name, value in _setting(row, rows).items())])


def _bytes(some: Sequence[Row], rows: Sequence[Row]) -> Table:
    settings = [_setting(row, rows) for row in some]
    heads = [", ".join(setting.values()) or row["method"] for setting, row in zip(settings, some, strict=True)]
    return [", ".join(settings[0]) or "at most", *heads], [
        [name, *(_mb(row[key]) for row in some)] for name, key in FIGURES.items()
    ]


def _peaks(rows: Sequence[Row]) -> Table:
    """Return the peaks of a grid, a line per setting. A method that does not prune repeats its figure at every ratio."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: list[list[str]] = []
    most = max((sum(row["method"] == method for row in rows), method) for method in methods)[1]
    for row in (row for row in rows if row["method"] == most):
        cells = []
        for method in methods:
            of_size = [r for r in rows if r["method"] == method and r["batch_size"] == row["batch_size"]]
            same = [r for r in of_size if r["prune_ratio"] == row["prune_ratio"]] or of_size
            cells.append(_mb(same[0]["training_peak_bytes"]))
        lines.append([*_setting(row, rows).values(), *cells])
    names = next((list(_setting(row, rows)) for row in rows if row["method"] == most), [])
    return [*names, *methods], lines


def _parameters(rows: Sequence[Row]) -> Table:
    seen: dict[tuple[str, float], Row] = {(row["method"], row["prune_ratio"]): row for row in rows}
    ratios = any(len([1 for name, _ in seen if name == method]) > 1 for method, _ in seen)
    keys = ("total_parameters", "held_parameters", "trainable_parameters")
    lines = []
    for (method, ratio), row in seen.items():
        pruned = [f"{ratio:.1%}" if len([1 for name, _ in seen if name == method]) > 1 else ""] if ratios else []
        lines.append([method, *pruned, *(console.millions(row[key]) for key in keys)])
    return ["method", *([SETTINGS["prune_ratio"]] if ratios else []), "total", "weights", "trainable"], lines


def _modules(blocks: Mapping[str, Row]) -> Table:
    lines = []
    for path, kinds in blocks.items():
        short = path if len(path) <= MODULE else f"…{'.'.join(path.split('.')[-2:])}"
        name = "outside modules" if path == "outside" else short
        rest = sum(kinds[kind] for kind in REST)
        lines.append([name, *(_mb(kinds[kind]) for kind in KINDS), _mb(rest), _mb(sum(kinds.values()))])
    return ["module", *KINDS, "rest", "sum"], lines


def _measured(rows: Sequence[Row]) -> Table:
    reserved = any("max_reserved_bytes" in row for row in rows)
    keys = ["predicted_bytes", "measured_bytes", *(["max_reserved_bytes"] if reserved else [])]
    columns = ["method", "device", *(key.removesuffix("_bytes").replace("_", " ") for key in keys), "error", "process RSS"]
    return columns, [
        [
            row["method"],
            row["device"],
            *(_mb(row[key]) for key in keys),
            f"{row['error_share']:+.1%}",
            _mb(row["process"]["peak_rss_bytes"]),
        ]
        for row in rows
    ]


def _show_budget(budget: Row) -> None:
    changes = budget["changes"]
    if not changes:
        console.line(f"RECAP fits in {budget['memory_budget']} without changes.")
        return
    from recap_cli.memory.budget import value_text

    rows = [
        [c["key"], f"{value_text(c['before'])} → {value_text(c['after'])}", _mb(c["before_bytes"]), _mb(c["after_bytes"])]
        for c in changes
    ]
    columns = ["setting", "change", "peak before", "after"]
    console.table(columns, rows, title=f"Changes to fit in {budget['memory_budget']} (MB)", is_result=True)
    for change in changes:
        console.line(f"{change['key']} costs {change['cost']}")
    console.line("")


def _closing(found: Row) -> Iterator[str]:
    yield from (f"note: {note}" for note in found["notes"])
    if "importance_peak_bytes" in found:
        yield f"importance, with the full model streamed to its device: {_mb(found['importance_peak_bytes'])} MB at the peak"
    if "teacher_peak_bytes" in found:
        yield f"the teacher's round, with the full model streamed too: {_mb(found['teacher_peak_bytes'])} MB at the peak"
    yield MEANING
    yield f"Not included; a GPU holds in addition: {', '.join(NOT_INCLUDED)}."
    for sentence in dict.fromkeys(s for row in found.get("measured", ()) for s in row["not_seen"]):
        yield f"not seen: {sentence}"
    for path in found.get("pictures", ()):
        yield f"wrote {path}"
    if "budget" in found:
        yield from _next(found["budget"])


def _next(budget: Row) -> Iterator[str]:
    held = max(budget["training_peak_bytes"], budget["evaluation_peak_bytes"])
    yield (
        f"of {budget['memory_budget']}, recap takes {_mb(held)} MB at its peak, and "
        f"{_mb(budget['workspace_bytes'])} MB are reserved for cuBLAS"
    )
    if not budget["commands"]:
        yield "this state has no stage left to run with these settings"
    else:
        first, *others = budget["commands"]
        yield f"run: {first}"
        yield from (f"or let init find the settings: {line}" for line in others)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"
