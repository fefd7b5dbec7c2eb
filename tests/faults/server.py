"""A process that runs tests on changed sources: it imports what others have made once, and forks for each change.

It is started as `python -m tests.faults.server` (see `FaultServer`) and reads one request a line, as JSON: `tests`, the ids of
tests, `sources`, file → its changed text, and `limit`, seconds. It answers with one line each: the outcome of every test by its
id, whether `passed`, `failed`, `error` or what else pytest calls it, or why there is none. A test that failed has asserted so;
of one that ended by any other exception the outcome is `crashed` and its type, which no fault is found by.

Neither `recap_cli` nor a test is ever imported in the server itself. A child imports them afresh, with the changed text in the
place of the file's, wherever they are imported from. What no change can touch, torch and the libraries of models, is there
before the fork: the first child, on sources as they are, says which modules that are. Our own modules are compiled there, and
not run: where no bytecode is written, to compile them took half of a child's time. The server only imports; it never computes,
so that no thread, no device and no lock is carried over a fork.
"""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
FIRST = (
    "torch",
    "pytest",
    "pytest_timeout",
    "transformers",
    "datasets",
    "timm",
    "torchmetrics.functional.classification",
    "yaml",
)
OURS = ("recap_cli", "tests", "__main__", "__editable__")
Outcomes = dict[str, str]
COMPILED: dict[str, CodeType] = {}  # of sources as they are, by file


class Changed(MetaPathFinder):
    """Finds modules as every other finder does, and gives some files another text."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.sources: dict[str, str | CodeType] = {**COMPILED}
        self.sources.update((str((ROOT / file).resolve()), text) for file, text in texts.items())

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(("recap_cli", "tests")):
            return None
        for finder in (f for f in sys.meta_path if f is not self):
            if (spec := finder.find_spec(name, path, target)) is not None:
                file = str(Path(spec.origin).resolve()) if spec.origin else ""
                if file in self.sources:
                    spec.loader = _Loader(name, file, self.sources[file])
                return spec
        return None


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str | CodeType) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return _compiled(self.source, self.path) if isinstance(self.source, str) else self.source


def _compiled(text: str, file: str) -> CodeType:
    return compile(text, file, "exec", dont_inherit=True)


class _Outcomes:
    """A plugin of pytest's: how each test ended."""

    def __init__(self) -> None:
        self.of: Outcomes = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome if report.when == "call" else "error"

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        import pytest

        asserted = (AssertionError, pytest.fail.Exception)  # the latter where `pytest.raises` has seen nothing raised
        if getattr(report, "when", None) == "call" and not call.excinfo.errisinstance(asserted):
            self.of[node.nodeid] = f"crashed: {call.excinfo.typename}"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.of[report.nodeid] = "error"


def _child(request: Mapping[str, Any], out: int) -> None:
    """Run the tests of a request, and write what came of them."""
    gc.enable()
    sys.meta_path.insert(0, Changed(request["sources"]))
    import pytest

    heard, cache = _Outcomes(), "no:cacheprovider"
    with tempfile.TemporaryDirectory(prefix="recap-fault-") as folder, open(os.devnull, "w") as nowhere:
        tempfile.tempdir = folder  # what tests make for the whole of a process goes with it
        if not request.get("loud"):
            os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        options = ["-q", "-p", cache, "-p", "pytest_timeout", "-o", "addopts=", "--assert=plain", f"--basetemp={folder}/pytest"]
        options += ["-p", "no:unraisableexception"]  # it collects garbage at its end, five times, in all that is imported
        options += ["-p", "no:logging", "--tb=native"]  # what else pytest gathers for a report that nobody reads
        options += request.get("options", [])
        code = pytest.main([*options, "--rootdir", str(ROOT), *request["tests"]], plugins=[heard])
    told: dict[str, Any] = {"exit": int(code), "outcomes": heard.of}
    if request.get("modules"):
        told["modules"] = [name for name in sys.modules if not name.startswith(OURS)]
        told["sources"] = sorted(_sources())
    os.write(out, json.dumps(told).encode())


def _sources() -> Iterator[str]:
    """The files of our own modules that this process has imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("recap_cli", "tests")) and (file := getattr(module, "__file__", None)):
            yield str(Path(file).resolve())


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fork for a request; what its child wrote, or that it wrote nothing within its limit."""
    come, go = os.pipe()
    gc.freeze()  # a child need not look through what was imported each time it collects garbage
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(come)
            os.setpgid(0, 0)
            _child(request, go)
            status = 0
        except Exception:  # noqa: BLE001 - told, and the parent hears that there is no answer
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(go)
    said, late = b"", False
    with open(come, "rb", buffering=0) as pipe:
        while not (late := not select.select([pipe], [], [], request["limit"])[0]) and (part := pipe.read(1 << 16)):
            said += part
    if late:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    why = f"no answer within {request['limit']} s" if late else "the process ended without an answer"
    return json.loads(said) if said and not late else {"exit": -1, "outcomes": {}, "why": why}


def _preload(modules: Sequence[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - a module that is made in some other way; each child makes it again
            sys.modules.pop(name, None)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints at import is no answer
    gc.disable()  # of what is imported nothing is garbage
    _preload(FIRST)
    for line in sys.stdin:
        answer = _run(json.loads(line))
        _preload(answer.pop("modules", []))
        COMPILED.update((file, _compiled(Path(file).read_text(encoding="utf-8"), file)) for file in answer.pop("sources", []))
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # what libraries say at their end is of no interest


class FaultServer:
    """The server, as a test or another runner has it: inside, `run` gives the outcomes of tests on changed sources."""

    def __enter__(self) -> "FaultServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate(timeout=1800)

    def run(
        self,
        tests: Sequence[str],
        sources: Mapping[str, str] | None = None,
        *,
        limit: float = 1800,
        modules: bool = False,
        options: Sequence[str] = (),
    ) -> Outcomes:
        """How each of these tests ends with some files' texts replaced; `modules` lets the server preload what they import.

        `options` are pytest's own, such as `-x`.

        Raises `RuntimeError` if the child ended without an answer, or not within the limit.
        """
        request: dict[str, Any] = {"tests": list(tests), "sources": dict(sources or {}), "limit": limit, "modules": modules}
        request["options"] = list(options)
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the server has no pipes")
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the server of faults has ended")
        answer = json.loads(line)
        if answer["exit"] == -1:
            raise RuntimeError(f"{', '.join(tests)}: {answer['why']}")
        outcomes: Outcomes = answer["outcomes"]
        return outcomes


if __name__ == "__main__":
    main()
