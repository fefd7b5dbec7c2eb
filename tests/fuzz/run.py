"""`python -m tests.fuzz.run`: draws cases with a seed, plays each in a process of its own, and reports what no command may do.

Everything is imported and made once; a case is a fork of that, so it costs milliseconds, and whatever it breaks goes with it.
A case that uses more processor time than the limit, or waits as long, is ended and counted as a hang.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.fuzz.case import Box, Case, Fault
from tests.fuzz.judge import judge
from tests.fuzz.kinds import KINDS, corpus, drawn, load_libraries, probes
from tests.fuzz.watch import put_on
from tests.fuzz.world import World, environment

LIMIT_SECONDS = 25.0
BUSY_FACTOR = 12  # a process that is not waiting gets so much more time by the clock: the machine may be busy
ADDRESS_BYTES = 12 * 2**30
RESIDENT_BYTES = 3 * 2**30
ROOM_BYTES = 2**30
SHRINKS = 40  # plays that making one failing case smaller may cost


class Played(NamedTuple):
    """What playing a case came to."""

    case: Case
    faults: list[Fault]
    cpu_seconds: float
    told: list[str]  # per call: its words, its exit code, and what it printed


class Child(NamedTuple):
    """A case that is being played."""

    case: Case
    box: Box
    began: float


class Player:
    """Plays cases in forks of this process."""

    def __init__(self, world: Any, root: Path, limit: float, weight_bytes: int = RESIDENT_BYTES) -> None:
        self.world, self.root, self.limit, self.weight_bytes = world, root, limit, weight_bytes
        self.played = 0

    def play(self, cases: Iterable[Case], jobs: int) -> Iterator[Played]:
        """What each case comes to, as they end."""
        waiting, running = iter(cases), dict[int, Child]()
        while True:
            while len(running) < jobs and (case := next(waiting, None)) is not None:
                running |= self._start(case)
            if not running:
                return
            yield from self._ended(running)

    def _start(self, case: Case) -> dict[int, Child]:
        self.played += 1
        box = Box(self.root / f"case-{self.played}").make()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                _in_child(case, self.world, box, self.limit)
                code = 0
            except BaseException:  # noqa: BLE001  (a fault of the play, told by the process that waits)
                (box.root / "broken").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        return {pid: Child(case, box, time.monotonic())}

    def _ended(self, running: dict[int, Child]) -> Iterator[Played]:
        for pid, child in list(running.items()):
            ended, status, used = os.wait4(pid, os.WNOHANG)
            hung = not ended and self._hangs(pid, child)
            if hung:
                os.kill(pid, signal.SIGKILL)
                ended, status, used = os.wait4(pid, 0)
            if ended:
                del running[pid]
                yield _played(child, status, used, hung, self.weight_bytes)
                shutil.rmtree(child.box.root, ignore_errors=True)
                return
        time.sleep(0.002)

    def _hangs(self, pid: int, child: Child) -> bool:
        """Whether a process waits for nothing to come: RLIMIT_CPU ends those that compute."""
        took = time.monotonic() - child.began
        if took < self.limit:
            return False
        try:
            process = psutil.Process(pid)
            idle = process.status() != psutil.STATUS_RUNNING and sum(process.cpu_times()[:2]) < took / BUSY_FACTOR
        except psutil.Error:
            return False
        return idle or took > self.limit * BUSY_FACTOR


def _in_child(case: Case, world: Any, box: Box, limit: float) -> None:
    """Play the case and write down what was found; the process ends after it."""
    os.environ.update(environment(box.scratch))
    os.environ.pop("RECAP_TRACEBACK", None)
    os.chdir(box.cwd)
    tempfile.tempdir = str(box.scratch)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit) + 1, int(used + limit) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (until the process ends)
    faults: list[Fault] = []
    told: list[str] = []
    for call in KINDS[case.kind].play(case, world, box):
        (box.root / "call").write_text(ascii(" ".join(call.arguments) or "recap_cli.load"))
        found, result = judge(call, box)
        faults += found
        told.append(f"{' '.join(call.arguments)[:300] or 'recap_cli.load'} -> {result.code}\n{result.out}{result.err}"[:3000])
    (box.root / "found.json").write_text(json.dumps({"faults": [asdict(fault) for fault in faults], "told": told}))


def _played(child: Child, status: int, used: Any, hung: bool, weight_bytes: int) -> Played:
    found = child.box.root / "found.json"
    told, facts = _read(child.box.root / "stderr")[-1500:], {}
    call = _read(child.box.root / "call").strip("'\"").partition(" ")[0]
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if hung or number in (signal.SIGXCPU, signal.SIGKILL):
        faults = [Fault("hang", f"{call or 'play'} was ended", told)]
    elif number:
        faults = [Fault("crash", f"{call}: {signal.Signals(number).name}", told)]
    elif not found.exists():
        told = _read(child.box.root / "broken")
        faults = [Fault("broken", f"the play itself failed: {(told.strip().splitlines() or ['?'])[-1][:150]}", told)]
    else:
        facts = json.loads(found.read_text())
        faults = [Fault(**fault) for fault in facts["faults"]]
    if used.ru_maxrss * 1024 > weight_bytes:
        faults.append(Fault("memory", f"{call} held above {weight_bytes / 2**30:.1f} GiB"))
    return Played(child.case, faults, used.ru_utime + used.ru_stime, facts.get("told", []))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def smaller(player: Player, case: Case, signature: str) -> Case:
    """The case with as few steps and calls, and as short texts, as still have the same fault."""
    left = SHRINKS
    changed = True
    while changed and left > 0:
        changed = False
        for tried in _smaller_ones(case):
            left -= 1
            played = next(player.play([tried], 1))
            if any(fault.signature == signature for fault in played.faults):
                case, changed = tried, True
                break
            if left <= 0:
                break
    return case


def _smaller_ones(case: Case) -> Iterator[Case]:
    for field in ("steps", "calls"):
        items: tuple[Any, ...] = getattr(case, field)
        for at in range(len(items)):
            if len(items) > 1:
                yield Case(**{**_fields(case), field: items[:at] + items[at + 1 :]})
    for at, step in enumerate(case.steps):
        for place, value in enumerate(step[2:], 2):  # the first says where
            if isinstance(value, str) and len(value) > 8:
                for part in (value[: len(value) // 2], value[len(value) // 2 :]):
                    steps = (*case.steps[:at], (*step[:place], part, *step[place + 1 :]), *case.steps[at + 1 :])
                    yield Case(**{**_fields(case), "steps": steps})


def _fields(case: Case) -> dict[str, Any]:
    return {"kind": case.kind, "base": case.base, "steps": case.steps, "calls": case.calls}


def main(arguments: Sequence[str] | None = None) -> int:
    """Play what the command line asks for; returns 1 where anything was found."""
    options = _options(arguments)
    root = Path(tempfile.mkdtemp(prefix="recap-fuzz-", dir=_in_memory())).resolve()
    began, spent = time.monotonic(), time.process_time()
    try:
        os.chdir(root)
        player, cases = _prepared(options, root)
        made = time.monotonic() - began
        report = _play_all(player, cases, options)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report |= {
        "seed": options.seed,
        "prepared_seconds": round(made, 1),
        "seconds": round(time.monotonic() - began, 1),
        "runner_cpu_seconds": round(time.process_time() - spent, 1),
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
    _tell(report, options)
    return 1 if report["faults"] else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=5000, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--kinds", default="", help="only these, with commas between")
    parser.add_argument(
        "--corpus", default="all", choices=["all", "none", "sample", "only"], help="the inputs that once broke something"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="JSON", help="play this one instead, and show what it prints"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of a hang")
    parser.add_argument("--json", type=os.path.abspath, metavar="FILE", help="write the report here")
    parser.add_argument("--no-shrink", action="store_true")
    return parser.parse_args(arguments)


def _in_memory() -> str | None:
    """A folder of the machine's memory, where there is one with room: every stage waits for the disk."""
    place = Path("/dev/shm")
    return str(place) if place.is_dir() and shutil.disk_usage(place).free > ROOM_BYTES else None


def _prepared(options: argparse.Namespace, root: Path) -> tuple[Player, list[tuple[str, Case]]]:
    """Import and make everything, and draw the cases."""
    gc.disable()  # until all is there: hardly anything of it is garbage
    scratch = root / "world"
    scratch.mkdir()
    os.environ.update(environment(scratch))
    tempfile.tempdir = str(scratch)
    load_libraries()
    kinds = [kind for kind in options.kinds.split(",") if kind] or list(KINDS)
    cases = [("given", Case.from_json(text)) for text in options.case]
    if not cases:
        cases = [] if options.corpus == "none" else corpus(kinds, options.seed if options.corpus == "sample" else None)
        cases += [] if options.corpus == "only" else drawn(kinds, options.cases, options.seed)
    world = World(scratch)
    for kind in {case.kind for _, case in cases}:
        KINDS[kind].prepare(world)
    put_on()
    gc.collect()
    gc.freeze()
    gc.enable()
    held = psutil.Process().memory_info().rss
    _prove_sight(lambda limit: Player(world, root, limit, held + 2**27), probes())
    return Player(world, root, options.limit), cases


def _prove_sight(player: Callable[[float], Player], probes: dict[str, Case]) -> None:
    """Play a case of each kind of fault, by the player of a limit.

    Raises `RuntimeError` where one is not seen: the run would then prove nothing.
    """
    blind = []
    for what, case in probes.items():
        limit = 2.0 if what == "hang" else LIMIT_SECONDS  # a slow machine takes seconds to give a process a gibibyte
        [played] = player(limit).play([case], 1)
        found = {fault.what for fault in played.faults}
        if found != ({what} if what != "nothing" else set()):
            blind.append(f"should see {what}, and sees {played.faults}")
    if blind:
        raise RuntimeError(f"the judge {'; '.join(blind)}")


def _play_all(player: Player, cases: list[tuple[str, Case]], options: argparse.Namespace) -> dict[str, Any]:
    names: dict[str, str] = {case.to_json(): name for name, case in cases}
    by_signature: dict[str, list[tuple[Case, Fault]]] = defaultdict(list)
    corpus: dict[str, list[str]] = {}
    cpu: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for played in _until_stopped(player.play((case for _, case in cases), options.jobs)):
        cpu[played.case.kind] += played.cpu_seconds
        counts[played.case.kind] += 1
        signatures = {fault.signature: fault for fault in played.faults}
        if name := names[played.case.to_json()]:
            corpus[name] = sorted(signatures)
        if options.case:
            print("\n".join(played.told).encode("ascii", "backslashreplace").decode())
        for signature, fault in signatures.items():
            if signature not in by_signature:
                print(f"{name or 'drawn'}: {signature}", file=sys.stderr, flush=True)
            by_signature[signature].append((played.case, fault))
    faults = []
    for signature, found in sorted(by_signature.items(), key=lambda item: -len(item[1])):
        case, fault = min(found, key=lambda item: len(item[0].to_json()))
        if not options.no_shrink and not options.case and fault.what != "hang":
            case = smaller(player, case, signature)
        faults.append({"signature": signature, "times": len(found), "case": case.to_json(), "told": fault.told})
    return {
        "cases": sum(counts.values()),
        "by_kind": {kind: {"cases": counts[kind], "cpu_seconds": round(cpu[kind], 1)} for kind in counts},
        "faults": faults,
        "corpus": dict(sorted(corpus.items())),
    }


def _until_stopped(plays: Iterator[Played]) -> Iterator[Played]:
    """What has been played; Ctrl-C ends it, and what was found until then is reported."""
    try:
        yield from plays
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def _tell(report: dict[str, Any], options: argparse.Namespace) -> None:
    for fault in report["faults"]:
        print(f"{fault['times']:5} × {fault['signature']}\n        --case {shell(fault['case'])}")
    kinds = ", ".join(f"{kind} {told['cases']} in {told['cpu_seconds']} s" for kind, told in report["by_kind"].items())
    print(f"{report['cases']} cases ({kinds} of processor time), {report['seconds']} s in all, seed {report['seed']}")
    print(f"{len(report['faults'])} kinds of fault")


def shell(text: str) -> str:
    """The text as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # libraries that were imported for the forks have pages to say when they are taken down
