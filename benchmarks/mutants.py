"""How many small faults in the heart the tests see: mutation testing of `core/`, `trainable/`, the four
stages and the training loop.

    python benchmarks/mutants.py                      # 400 mutants drawn by seed 0, on two processes
    python benchmarks/mutants.py --seed 1 --jobs 4
    python benchmarks/mutants.py --show 12            # how the mutant of that number differs

mutmut's operators make every mutant of a file (another operator or number, an argument left out or None, a condition turned
round, …). So many are drawn with a seed, spread over the files by their number of mutants. A first run of the tests notes
which test runs which line and how long it takes; it is kept in `--work` until a file changes. A mutant then meets the tests
that run its line, those of its own file first, the short ones before the long ones, one set of parameters of each test before
the others, until one fails or `--patience` seconds of tests have passed. Each mutant has a process of its own, forked by the
server that the named faults of the test suite run on (`tests/faults/server.py`). Stopped, the same command goes on.

Not mutated: what stands in a `raise` (texts of errors are asserted where they are shown), annotations, aliases of types,
docstrings.
A mutant that no test can tell from the original is listed with its reason in `mutants_equivalent.yaml`. One that makes its
tests run ten times as long as they should is killed, too.

Wants the extra `mutants` (`pip install -e '.[mutants]'`).
"""

import ast
import difflib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml
from record import parser, write

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).resolve().parent / "mutants_equivalent.yaml"
STAGES = ("prune", "mask", "finetune", "merge")
ROUNDS = (
    *("warm_up", "pruning", "compensation", "masking", "trainer", "training_round", "teacher", "teacher_round", "rates"),
    *("round_results", "merging"),
)
TESTS = (  # those that run the heart; others of the stages' folder are of comparisons, budgets and reports
    "tests/core",
    "tests/trainable",
    "tests/training",
    *(
        f"tests/stages/test_{name}.py"
        for name in (
            "algorithm",
            "own_teacher",
            "algorithm_settings",
            "best",
            "compensation",
            "decoders",
            "distillation",
            "invariants",
            "kinds",
        )
    ),
    *(f"tests/stages/test_{name}.py" for name in ("methods", "on_device", "random_mask", "stages", "ties")),
)
PYTEST = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--no-header"]
FOUND = ("failed", "error", "crashed")  # how a test ends that has seen a mutant
START_SECONDS = 60.0  # what collecting may take, on top of ten times what the tests take
sys.path.insert(0, str(ROOT))  # for the tests' own server of changed sources


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the lines that it takes out and puts in, and the whole code with it."""

    file: str
    function: str  # the function or class that it stands in, or nothing
    line: int
    before: str
    after: str
    code: str = field(repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        return self.file, self.function, self.before, self.after


def files() -> list[str]:
    """The heart: what is mutated, relative to the repository."""
    rooms = (ROOT / "recap_cli/core", ROOT / "recap_cli/trainable")
    core = sorted(path.relative_to(ROOT).as_posix() for room in rooms for path in room.glob("*.py"))
    stages = [f"recap_cli/stages/{stage}.py" for stage in STAGES] + [f"recap_cli/rounds/{name}.py" for name in ROUNDS]
    return [*core, *stages, "recap_cli/training/loop.py"]


def mutations_of(file: str) -> tuple[Any, list[Any]]:
    """The syntax tree of a file and all changes that mutmut makes to it, but for those in a `raise` or an alias of a type."""
    import libcst
    from mutmut.mutation.file_mutation import create_mutations

    module, mutations, _, _ = create_mutations(file, (ROOT / file).read_text(encoding="utf-8"))
    left_out = [*_nodes(module, libcst.Raise), *(line for line in module.body if _is_alias(line))]
    unseen = {id(node) for each in left_out for node in _nodes(each, libcst.CSTNode)}
    return module, [mutation for mutation in mutations if id(mutation.original_node) not in unseen]


def _is_alias(line: Any) -> bool:
    """Whether a line of a module names a type: `Scope = Literal["per-kind", "global"]`, or a `TypeVar`."""
    import libcst
    import libcst.matchers as m

    types = m.Subscript() | m.BinaryOperation(operator=m.BitOr()) | m.Call(func=m.Name("TypeVar"))
    return isinstance(line, libcst.SimpleStatementLine) and m.matches(line.body[0], m.Assign(value=types))


def mutant_of(file: str, module: Any, mutation: Any) -> Mutant:
    """The file with one of its changes."""
    changed = module.deep_replace(mutation.original_node, mutation.mutated_node).code
    line, before, after = _difference(module.code, changed)
    return Mutant(file, _function_at(module.code, line), line, before, after, changed)


def _function_at(code: str, line: int) -> str:
    """The dotted name of the innermost function or class around a line."""
    inside = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    around = sorted((node for node in inside if node.lineno <= line <= (node.end_lineno or 0)), key=lambda node: node.lineno)
    return ".".join(node.name for node in around)


def _nodes(root: Any, kind: type) -> Iterator[Any]:
    if isinstance(root, kind):
        yield root
    for child in root.children:
        yield from _nodes(child, kind)


def _difference(code: str, changed: str) -> tuple[int, str, str]:
    """The first changed line's number, and the lines that differ, before and after."""
    old, new = code.splitlines(), changed.splitlines()
    blocks = [op for op in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if op[0] != "equal"]
    before = [line.strip() for _, a, b, _, _ in blocks for line in old[a:b]]
    after = [line.strip() for _, _, _, c, d in blocks for line in new[c:d]]
    return blocks[0][1] + 1, "\n".join(before), "\n".join(after)


def draw(count: int, seed: int, only: str = "") -> tuple[list[Mutant], int]:
    """So many mutants, each file by its share (at least two, where it has them), drawn with the seed; and how many there are.

    `only` names part of the files' names: others are left out after the draw.
    """
    of = {file: mutations_of(file) for file in files()}
    total = sum(len(mutations) for _, mutations in of.values())
    drawn = []
    for file, (module, mutations) in of.items():
        share = min(len(mutations), max(2, round(count * len(mutations) / total)))
        if only in file:
            drawn += [mutant_of(file, module, each) for each in random.Random(f"{seed}/{file}").sample(mutations, share)]
    return drawn, total


# --- which tests run which line ------------------------------------------------------------------------------------


class _Noting:
    """A plugin of pytest that notes the seconds of every test, and tells `coverage` which one runs."""

    def __init__(self, cover: Any) -> None:
        self.cover, self.seconds, self.failed = cover, dict[str, float](), list[str]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.cover.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def note_cover(to: Path, folders: Sequence[str]) -> None:
    """Run the tests once and write what each runs, and its seconds."""
    import coverage
    import pytest

    cover = coverage.Coverage(data_file=None, include=[str(ROOT / file) for file in files()], config_file=False)
    noting = _Noting(cover)
    cover.start()
    pytest.main([*folders, *PYTEST], plugins=[noting])
    cover.stop()
    if noting.failed:
        raise SystemExit(f"the tests fail without any mutant: {', '.join(noting.failed[:5])}")
    data = cover.get_data()
    lines = {
        file: {str(line): sorted(tests) for line, tests in data.contexts_by_lineno(str(ROOT / file)).items()}
        for file in files()
    }
    to.write_text(json.dumps({"seconds": noting.seconds, "lines": lines}), encoding="utf-8")


def cover_of(work: Path, folders: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Which tests run which line, read, or noted if a file has changed since; with the digest of all that it hangs on."""
    sources = [path for folder in ("recap_cli", "plugins", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256(" ".join(folders).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    place = work / f"cover-{digest}.json"
    if not place.exists():
        print("which test runs which line: the tests run once …", flush=True)
        with (work / "cover.log").open("w") as log:
            command = [sys.executable, __file__, "--note", str(place), "--tests", ",".join(folders)]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not place.exists():
        raise SystemExit(f"the tests did not run through: {work / 'cover.log'}")
    return digest, json.loads(place.read_text(encoding="utf-8"))


def tests_for(mutant: Mutant, cover: Mapping[str, Any], patience: float) -> list[str]:
    """The tests that run the mutant's line, in the order in which they are tried, as many as `patience` seconds allow."""
    seconds, lines = cover["seconds"], cover["lines"][mutant.file]
    running = [test for test in lines.get(str(mutant.line), []) if test]
    if not running:  # a line that runs when the file is imported: whatever runs the file
        running = sorted({test for tests in lines.values() for test in tests if test})
    own = f"test_{Path(mutant.file).name}"
    seen: Counter[str] = Counter()
    ranks = {}
    for test in sorted(running, key=lambda t: (seconds.get(t, 0.0), t)):
        function = test.partition("[")[0]
        ranks[test] = (seen[function] > 0, own not in test, seconds.get(test, 0.0), test)
        seen[function] += 1
    chosen, spent = [], 0.0
    for test in sorted(running, key=ranks.__getitem__):
        if chosen and spent + seconds.get(test, 0.0) > patience:
            continue
        chosen.append(test)
        spent += seconds.get(test, 0.0)
    return chosen


# --- one mutant in one process ----------------------------------------------------------------------------------------------


def fate(server: Any, mutant: Mutant, cover: Mapping[str, Any], patience: float) -> dict[str, Any]:
    """Whether a test fails on the mutant, and which."""
    tests = tests_for(mutant, cover, patience)
    seconds, started = sum(cover["seconds"].get(test, 0.0) for test in tests), time.monotonic()
    try:
        limit = START_SECONDS + 10 * seconds
        outcomes = server.run(tests, {mutant.file: mutant.code}, limit=limit, options=["-x"])
        by = next((f"{test} ({outcome})" for test, outcome in outcomes.items() if outcome.startswith(FOUND)), None)
        if by is None and not outcomes:
            raise SystemExit(f"no test ran on {mutant.file}:{mutant.line}")
    except RuntimeError as error:  # it ran too long, or its process died
        by = f"no answer: {str(error).rpartition(': ')[2]}"
    return {"killed": by is not None, "by": by, "tests": len(tests), "seconds": round(time.monotonic() - started, 1)}


def run(mutants: Sequence[Mutant], cover: Mapping[str, Any], *, jobs: int, patience: float, kept: Path) -> list[dict[str, Any]]:
    """The fate of every mutant, in their order; `jobs` servers share them. What stands in the file `kept` is not run again."""
    from tests.faults.server import FaultServer

    fates = _kept(mutants, kept)
    servers: SimpleQueue[Any] = SimpleQueue()
    by_file = {test.partition("::")[0]: test for test in sorted(cover["seconds"], key=cover["seconds"].__getitem__)}

    def one(mutant: Mutant) -> dict[str, Any]:
        server = servers.get()
        try:
            return fate(server, mutant, cover, patience)
        finally:
            servers.put(server)

    with ThreadPoolExecutor(jobs) as threads, ExitStack() as stack, kept.open("a", encoding="utf-8") as out:
        for _ in range(jobs):
            server = stack.enter_context(FaultServer())
            server.run(list(by_file.values()), modules=True)  # the longest of each file: a child finds all that they import
            servers.put(server)
        asked = {threads.submit(one, mutant): number for number, mutant in enumerate(mutants) if number not in fates}
        for done in as_completed(asked):
            number = asked[done]
            fates[number] = done.result()
            print(json.dumps({"key": mutants[number].key, **fates[number]}), file=out, flush=True)
            killed = sum(each["killed"] for each in fates.values())
            print(f"\r{len(fates)} of {len(mutants)}, {killed} killed ", end="", flush=True)
    print()
    return [fates[number] for number in range(len(mutants))]


def _kept(mutants: Sequence[Mutant], kept: Path) -> dict[int, dict[str, Any]]:
    """What an earlier run of the same command has found, by the mutants' numbers."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    found = {tuple(each.pop("key")): each for each in map(json.loads, lines)}
    return {number: found[mutant.key] for number, mutant in enumerate(mutants) if mutant.key in found}


# --- the figure ----------------------------------------------------------------------------------------------------


def equivalents() -> dict[tuple[str, ...], str]:
    """The mutants that no test can tell from the original, each with the reason."""
    listed = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or [] if EQUIVALENT.exists() else []
    return {
        tuple(str(entry[key]).strip() for key in ("file", "function", "before", "after")): entry["reason"] for entry in listed
    }


def figures(mutants: Sequence[Mutant], fates: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """What came out: counts, the share of the non-equivalent that were killed, per file, and every survivor."""
    known = equivalents()
    rows = [
        {
            "file": m.file,
            "function": m.function,
            "line": m.line,
            "before": m.before,
            "after": m.after,
            **fate,
            "equivalent": known.get(m.key),
        }
        for m, fate in zip(mutants, fates, strict=True)
    ]
    counted = [row for row in rows if row["killed"] or row["equivalent"] is None]
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_file[row["file"]]["killed" if row["killed"] else "equivalent" if row["equivalent"] else "survived"] += 1
    keys = ("file", "function", "line", "before", "after", "tests", "equivalent")
    return {
        "mutants_in_all": total,
        "drawn": len(rows),
        "killed": sum(row["killed"] for row in rows),
        "of_these_by_no_answer": sum(str(row["by"]).startswith("no answer") for row in rows),  # a hang, or the process died
        "of_these_by_an_error_outside_a_test": sum(str(row["by"]).endswith("(error)") for row in rows),
        "equivalent": sum(not row["killed"] and row["equivalent"] is not None for row in rows),
        "survived": sum(not row["killed"] and row["equivalent"] is None for row in rows),
        "killed_share_of_non_equivalent": round(sum(row["killed"] for row in counted) / max(1, len(counted)), 4),
        "by_file": {file: dict(counts) for file, counts in by_file.items()},
        "survivors": [{key: row[key] for key in keys} for row in rows if not row["killed"]],
        "killed_by": Counter(str(row["by"]).partition("::")[0] for row in rows if row["killed"]).most_common(),
    }


def main() -> None:
    command = parser(__doc__, "mutants")
    command.add_argument("--count", type=int, default=400, help="mutants to draw")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--jobs", type=int, default=2)
    command.add_argument("--patience", type=float, default=40.0, help="seconds of tests that a mutant meets at most")
    command.add_argument("--tests", default=",".join(TESTS), help="the folders and files of tests that mutants meet")
    command.add_argument("--note", type=Path, help="run the tests once, write here which runs which line, and end")
    command.add_argument("--work", type=Path, default=ROOT / "build" / "mutants", help="where the cover is kept")
    command.add_argument("--show", type=int, help="print how this one of the drawn mutants differs, and end")
    command.add_argument("--only", default="", help="mutants of files whose names contain this")
    args = command.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    if args.note is not None:
        note_cover(args.note, args.tests.split(","))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    mutants, total = draw(args.count, args.seed, args.only)
    if args.show is not None:
        chosen = mutants[args.show]
        print(f"{chosen.file}:{chosen.line}\n- {chosen.before}\n+ {chosen.after}")
        return
    digest, cover = cover_of(args.work, args.tests.split(","))
    started = time.monotonic()
    fates = run(
        mutants, cover, jobs=args.jobs, patience=args.patience, kept=args.work / f"fates-{digest}-{args.patience:g}.jsonl"
    )
    found = {"seed": args.seed, "patience_seconds": args.patience, "minutes": round((time.monotonic() - started) / 60, 1)}
    found |= figures(mutants, fates, total)
    for row in found["survivors"]:
        if row["equivalent"] is None:
            print(f"{row['file']}:{row['line']}\n- {row['before']}\n+ {row['after']}")
    print(
        {key: found[key] for key in ("drawn", "killed", "equivalent", "survived", "killed_share_of_non_equivalent", "minutes")}
    )
    if not args.only and args.tests == ",".join(TESTS):
        write(args.out, "mutants", found, how="measured")


if __name__ == "__main__":
    main()
