"""What every result says of itself: machine, versions, command, date, and how its figures were got."""

import argparse
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("recap-cli", "torch", "transformers", "safetensors", "torch-pruning")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with `--out`, by default `results/NAME.json`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the JSON goes")
    return made


def write(out: Path, name: str, figures: Mapping[str, Any], *, how: str) -> None:
    """Write the figures with what they were got on; `how` says which are measured and which predicted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "benchmark": name,
        "how": how,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(),
        "environment": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if key in os.environ},
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command_line() -> str:
    """The command that this process was called by, without paths of this machine."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shlex.quote, _options())])


def machine() -> dict[str, Any]:
    """Cores, processor and memory; nothing that names a host or a person."""
    lines = _lines("/proc/cpuinfo")
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": os.cpu_count(), "cpu": cpu, "ram_gib": round(memory_bytes / 2**30, 1), "system": platform.system()}


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that count here and are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its columns padded so that it also reads in a terminal."""
    cells = [list(header), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) + " |"
        for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of paired measurements: what slows both of a pair down cancels."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _options() -> list[str]:
    """The command line without what changes no figure and may name a folder of this machine."""
    known, rest = argparse.ArgumentParser(add_help=False), sys.argv[1:]
    for name in ("--out", "--work", "--plot"):
        known.add_argument(name)
    return known.parse_known_args(rest)[1]


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def forget_peak() -> None:
    """Make the kernel forget the peak resident set (`VmHWM`) of this process so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(key: str) -> int:
    """Bytes that the kernel tells of this process: `VmRSS` now, `VmHWM` at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
