"""Makes the calls of a case, and says what they did that no command may do, whatever it is given."""

import io
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recap_cli.cli import main
from recap_cli.errors import RecapError
from tests.fuzz.case import Box, Call, Fault
from tests.fuzz.documented import exit_codes
from tests.fuzz.watch import WATCH
from tests.fuzz.world import sha256

LONGEST = 20_000  # characters that a person may be told at once
HASHED_BYTES = 2**26
OWN = (".recap-lock", ".recap-writer")


class Result(NamedTuple):
    """What a call came to."""

    code: int
    out: str
    err: str
    value: Any


def judge(call: Call, box: Box) -> tuple[list[Fault], Result]:
    """Make one call; returns what is wrong with what it did, and what it came to."""
    kept = [box.outside] if call.state is None else [box.outside, call.state]
    before = {folder: tree(folder) for folder in kept}
    found = _make(call, box)
    seen = dict(reversed(WATCH.end()))  # of each kind of violation the first
    faults = [Fault(what, _plain(detail)) for what, detail in seen.items()]
    faults += _of_words(call, found)
    faults += _of_rules(call, found)
    for folder in kept:
        faults += _of_files(call, found, folder, before[folder])
    told = (found.out + found.err)[-1500:]
    return [Fault(fault.what, fault.detail, told) for fault in faults], found


def _make(call: Call, box: Box) -> Result:
    """Make the call with both streams, down to their descriptors, in files."""
    streams = [(box.root / name).open("w+b") for name in ("stdout", "stderr")]
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(os.dup(n), "wb"), encoding="utf-8", write_through=True) for n in (1, 2)
    )
    code, value = 0, None
    WATCH.begin((box.scratch, box.cwd, *call.writes), box.outside, box.root, box.site, call.may_start)
    try:
        if call.load is not None:
            import recap_cli

            value = recap_cli.load(call.load)
        elif call.act is not None:
            value = call.act()
        else:
            code = main(call.arguments)
    except RecapError as error:
        code = error.exit_code
        print(f"error: {error.message}", file=sys.stderr)
    except MemoryError:
        code = 12
        print("error: out of memory", file=sys.stderr)
    except BaseException as error:  # noqa: BLE001  (whatever comes out of the last door is what is looked for)
        code = 1
        print(f"bare {type(error).__name__} ({_place(error)}): {str(error)[:300]}", file=sys.stderr)
    WATCH.on = False
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read().decode("utf-8", "replace"))
        stream.close()
    return Result(code, texts[0], texts[1], value)


def _place(error: BaseException) -> str:
    """The last line of ours that the error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}recap_cli{os.sep}" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "nowhere of ours"


def _of_words(call: Call, found: Result) -> Iterator[Fault]:
    if bug := re.search(r"this is a bug in recap: (\w+): (.*)", found.err):
        place = re.findall(r"\(([^()]*), line \d+\)", found.err.replace("\n", " "))
        yield Fault("bug", f"{bug[1]} in {Path(place[-1]).name if place else '?'}")
    elif bare := re.search(r"^bare (\w+) (\([^)]*\))", found.err, re.M):
        yield Fault("bare", f"{bare[1]} {bare[2]}")
    elif "Traceback (most recent call last)" in found.err:
        yield Fault("traceback", found.err.strip().splitlines()[-1][:80])
    elif found.code not in (0, *call.codes) and not re.search(r"error: \S|Error", found.err):
        yield Fault("mute", f"exit code {found.code} without a message")
    elif found.code and call.names and not any(name in found.err.replace("\n", "") for name in call.names):
        yield Fault("unnamed", f"the message names none of {', '.join(Path(name).name for name in call.names)}")
    if words := [words for words in call.never if words in found.err]:
        yield Fault("unclear", f"the message says {words[0]!r}")
    strange = found.code in {1, 130} - {*call.codes} or found.code not in exit_codes()
    known = "bug in recap" in found.err or "bare " in found.err
    if strange and not known:
        yield Fault("code", f"exit code {found.code}")
    if len(found.err) > LONGEST:
        yield Fault("endless", f"a message above {LONGEST:,} characters")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", found.out + found.err):
        yield Fault("escape", "control characters reach the terminal")


def _of_rules(call: Call, found: Result) -> Iterator[Fault]:
    if found.code == 0:
        if call.refuse:
            yield Fault("accepted", call.refuse)
        if call.stdout is not None and found.out != call.stdout:
            yield Fault("stdout", "standard output holds something else than the result")
        if call.check is not None and (wrong := call.check(found.value)):
            yield Fault("wrong", wrong)
    else:
        if call.succeed:
            yield Fault("refused", call.succeed)
        if found.out and call.stdout is not None:
            yield Fault("stdout", "standard output holds something else than the result")


def _of_files(call: Call, found: Result, folder: Path, before: dict[str, str]) -> Iterator[Fault]:
    after = tree(folder)
    whole = folder != call.state or found.code != 0 or call.reads_only
    for name, was in before.items():
        counts = whole and not (folder == call.state and call.leftovers(name))
        if after.get(name) != was and (counts or name in call.stays):
            what = "lost" if name not in after else "altered"
            by = f"by a {'failed' if found.code else 'finished'} {call.arguments[0] if call.arguments else 'load'}"
            yield Fault(what, f"{by}: {_kind(name)}")
            return
    if folder == call.state and not found.code:
        for name, wanted in call.same.items():
            path = folder / name
            if not path.is_file():
                yield Fault("wrong", f"{_kind(name)} was not written")
            elif sha256(path) != wanted:
                yield Fault("wrong", f"{_kind(name)} is not what the sound input gives")


def _plain(detail: str) -> str:
    """A detail without the parts that differ from run to run."""
    return re.sub(r"[\w.-]*(?=[\w]{8}\b)(?=\w*\d)\w{8}\b", "…", _kind(detail))


def _kind(name: str) -> str:
    """A file's name without its round."""
    return re.sub(r"\d{3,}", "NNN", name)


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: of files the sha256, of all else what it is. Links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*files, *folders):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if name in OWN or stat.S_ISDIR(mode):
                continue
            small = stat.S_ISREG(mode) and path.stat().st_size < HASHED_BYTES
            told = sha256(path) if small else os.readlink(path) if stat.S_ISLNK(mode) else f"{stat.S_IFMT(mode):o}"
            found[path.relative_to(folder).as_posix()] = told
    return found
