"""The records that pass between the parts: a case, the calls that it comes to, and what was found wrong with them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Steps = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Case:
    """One input: a sound `base` of a kind, the steps that damage it, and the calls that are then made; all JSON values."""

    kind: str
    base: str
    steps: Steps
    calls: tuple[str, ...]

    def to_json(self) -> str:
        """The case as one line, for `--case`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Case":
        """The case of such a line."""
        found = json.loads(text)
        steps = tuple(tuple(step) for step in found["steps"])
        return Case(found["kind"], found["base"], steps, tuple(found["calls"]))


@dataclass(frozen=True)
class Fault:
    """What a call did that it may not do: a kind of fault, and a detail that is the same wherever the cause is."""

    what: str
    detail: str
    told: str = ""  # what the call printed, cut short

    @property
    def signature(self) -> str:
        """By which faults of one cause are counted together."""
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True)
class Call:
    """One call, and what holds for it beyond what holds for all.

    `arguments` go to `recap_cli.cli.main`; with `load`, that folder goes to `recap_cli.load` instead, or `act` is called.
    """

    arguments: tuple[str, ...] = ()
    load: Path | None = None
    act: Callable[[], object] | None = None
    refuse: str = ""  # the rule that forbids to end well
    succeed: str = ""  # the rule that forbids to fail
    names: tuple[str, ...] = ()  # one of these stands in the message of a refusal
    never: tuple[str, ...] = ()  # words of a library that mean nothing to a user
    codes: tuple[int, ...] = ()  # of 1 and 130, those that are right here
    may_start: bool = False  # whether other programs may be started
    state: Path | None = None  # a failure alters nothing in here that was committed
    leftovers: Callable[[str], bool] = lambda rel: False  # what of the state may go even so
    reads_only: bool = False  # success alters nothing in the state either
    writes: tuple[Path, ...] = ()  # where files may be written, besides the scratch folder
    stays: frozenset[str] = frozenset()  # files of the state that a success leaves as they are, too
    same: Mapping[str, str] = field(default_factory=dict)  # of files in `state` after a success: their sha256
    stdout: str | None = None  # what a success prints
    check: Callable[[Any], str] | None = None  # a property of what came of a success: "" or what is wrong


@dataclass(frozen=True)
class Box:
    """The folders of one case: all that its calls may see lies below `root`."""

    root: Path

    @property
    def cwd(self) -> Path:
        """The working directory; deep, so that `../../x` is still below `root`."""
        return self.root / "a" / "b" / "cwd"

    @property
    def scratch(self) -> Path:
        """The folder of temporary files."""
        return self.root / "tmp"

    @property
    def outside(self) -> Path:
        """What no input of the case may lead to: nothing in it is to be opened."""
        return self.root / "outside"

    @property
    def site(self) -> Path:
        """Where distributions of the case are installed: code of these may run."""
        return self.root / "site"

    def make(self) -> "Box":
        """Make the folders."""
        for folder in (self.cwd, self.scratch, self.outside, self.site):
            folder.mkdir(parents=True)
        return self
