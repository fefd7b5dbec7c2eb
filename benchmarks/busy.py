"""How long `recap run quickstart` takes on idle cores and beside busy processes, both in one run.

    python benchmarks/busy.py                 # two busy processes a core; some minutes
    python benchmarks/busy.py --before        # also idle with what recap chose before: all cores, the library's own waiting

Idle and busy runs take turns, so that what changes on the machine meets both. The machine must be idle otherwise.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from record import parser, ratio, table, write

CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LIBRARY_SPINS = "300000"  # of libgomp, where nothing says otherwise
ENDS_AFTER_SECONDS = 3600  # against a hang


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many processes compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(overrides: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds of one run, and the CPU seconds of all its threads."""
    given = {key: value for key, value in os.environ.items() if key not in CHOSEN} | dict(environment)
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "recap_cli", "run", "quickstart", "--state", str(Path(folder) / "state")]
        command += [part for override in overrides for part in ("--set", override)]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=given, check=True, capture_output=True, timeout=ENDS_AFTER_SECONDS)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    everything = {"OMP_NUM_THREADS": str(cores()), "GOMP_SPINCOUNT": LIBRARY_SPINS}
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.repeats):
        found.setdefault("idle", []).append(run(options.set, {}))
        if options.before:
            found.setdefault("idle, before", []).append(run(options.set, everything))
        with busy(options.beside * cores()):
            found.setdefault("busy", []).append(run(options.set, {}))
        said = ", ".join(f"{name} {rows[-1]['seconds']:.1f} s" for name, rows in found.items())
        print(f"repeat {number + 1} of {options.repeats}: {said}", file=sys.stderr)
    return found


def main() -> None:
    command = parser(__doc__, "busy")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--beside", type=int, default=2, help="busy processes a core")
    command.add_argument("--before", action="store_true", help="also idle, with all cores and the library's own waiting")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the recipe")
    options = command.parse_args()
    load = os.getloadavg()[0]
    found = measure(options)
    seconds = {name: [row["seconds"] for row in rows] for name, rows in found.items()}
    figures = {
        "cores": cores(),
        "busy_processes": options.beside * cores(),
        "load_at_start": load,
        "runs": found,
        "busy_over_idle": ratio(seconds["busy"], seconds["idle"]),
    }
    if options.before:
        figures["idle_over_before"] = ratio(seconds["idle"], seconds["idle, before"])
    rows = [[name, median(values), median(row["cpu_seconds"] for row in found[name])] for name, values in seconds.items()]
    print(table(["quickstart", "seconds", "CPU seconds"], rows))
    print(f"busy over idle: {figures['busy_over_idle']:.2f}; aim: no more than 4")
    if options.before:
        print(f"idle over idle before: {figures['idle_over_before']:.2f}; aim: no more than 1")
    write(options.out, "busy", figures, how="measured; ratios are medians of pairs, a run each that follow one another")


if __name__ == "__main__":
    main()
