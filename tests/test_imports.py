"""Imports run one way, and nothing heavy is imported to print help or a list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import recap_cli

PACKAGE = Path(recap_cli.__file__).parent
PLUGINS = Path(next(iter(import_module("recap_cli.plugins").__path__)))

# Which rooms a room may see, besides itself. A module of the package's top level is a room of its own.
TABLE = {
    "printable": set(),
    "progress": set(),
    "errors": {"printable"},
    "extras": {"errors"},
    "process": set(),
    "untrusted": {"errors"},
    "core": {"untrusted", "errors"},
    "trainable": {"core"},
    "api": {"core", "errors"},
    "plugins": {"api"},
    "registry": {"core", "untrusted", "errors"},
    "recipe": {"untrusted", "errors"},
    "state": {"process", "errors"},  # a commit is told there: after it, Ctrl-C has another word
    "tasks": {"errors"},
    "data": {"tasks", "recipe", "state", "untrusted", "errors", "progress"},
    "models": {"trainable", "core", "data", "state", "registry", "untrusted", "extras", "errors"},
    "machine": {"trainable", "errors"},
    "training": {"machine", "trainable", "data", "tasks", "errors", "progress"},
    "console": {"errors", "printable", "progress"},
    "commands": {
        "compare",
        "report",
        "memory",
        "stages",
        "rounds",
        "machine",
        "state",
        "recipe",
        "registry",
        "console",
        "extras",
        "errors",
    },
    "cli": {"commands", "console", "registry", "process", "errors", "printable"},
    "__main__": {"cli", "process"},
    "__init__": {"models", "errors"},
}
BELOW = {"core", "trainable", "models", "data", "tasks", "training", "machine", "recipe", "state", "registry", "untrusted"}
BELOW |= {"errors", "extras", "progress"}
TABLE |= {
    "rounds": BELOW,
    "memory": BELOW | {"rounds"},
    "stages": BELOW | {"rounds", "memory"},
    "compare": BELOW | {"rounds", "memory", "stages", "process"},
    "report": BELOW | {"rounds", "memory", "compare"},
}
TABLE["commands"] |= {"progress"}
LIGHT = {
    "__init__",
    "__main__",
    "cli",
    "commands",
    "console",
    "errors",
    "extras",
    "printable",
    "process",
    "progress",
    "recipe",
    "registry",
    "state",
    "untrusted",
}
HEAVY = {"torch", "transformers", "timm", "datasets", "sklearn", "torchvision", "torchmetrics", "matplotlib", "peft", "jinja2"}


PACKAGES = {"recap_cli", *(f"recap_cli.{folder.name}" for folder in PACKAGE.iterdir() if folder.is_dir())}


class Import(NamedTuple):
    module: str
    line: int
    at_start: bool  # True: runs when the file is imported, so neither in a function nor for types only


def imports(file: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno, at_start) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            names = [node.module or ""]
            if node.module in PACKAGES:
                names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (Import(name, node.lineno, at_start) for name in names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_start and not inside and not types_only)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), True)


def room_of(module: str) -> str:
    """The room of a dotted module below recap_cli; the package itself is `__init__`."""
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else "__init__"
    return top


def files() -> list[tuple[str, Path]]:
    """Every file of ours with its room."""
    ours = [(path, path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
    ours = [(path, rel) for path, rel in ours if rel.parts[0] not in ("plugins", "recipes")]
    found = [(room_of("recap_cli." + ".".join(rel.with_suffix("").parts)), path) for path, rel in ours]
    return found + [("plugins", path) for path in sorted(PLUGINS.rglob("*.py"))]


FILES = files()


def test_every_module_has_a_room() -> None:
    strangers = sorted({room for room, _ in FILES} - TABLE.keys())
    assert not strangers, f"say in TABLE what these may import: {strangers}"


def wrong_ways(room: str, found: Import) -> Iterator[str]:
    """Imports run one way."""
    if found.module.split(".")[0] == "recap_cli" and (target := room_of(found.module)) not in TABLE[room] | {room}:
        yield f"{room} may not import {target} ({found.module})"


def heavy_at_start(room: str, found: Import) -> Iterator[str]:
    """Heavy libraries wait until they are needed, and light rooms see light rooms only."""
    if not found.at_start:
        return
    top = found.module.split(".")[0]
    unseen = room in LIGHT and top == "recap_cli" and room_of(found.module) not in LIGHT
    if unseen or top in (HEAVY if room in LIGHT else HEAVY - {"torch"}):
        yield f"import {found.module} inside a function"


def foreign(room: str, found: Import, file: str) -> Iterator[str]:
    """`core` and plugins see torch and the standard library only, and nobody unpickles or knows click."""
    top = found.module.split(".")[0]
    allowed = {"torch", "recap_cli"} | sys.stdlib_module_names | ({"peft"} if file == "lora.py" else set())
    if top in ("click", "pickle"):
        yield f"no {top} anywhere"
    if room in ("core", "plugins") and top not in allowed:
        yield f"{room} may not import {found.module}"


def complaints(room: str, file: Path) -> list[str]:
    """What is wrong with the imports of one file, each with its line."""
    return [
        f"{file}:{found.line}: {text}"
        for found in imports(file)
        for text in (*wrong_ways(room, found), *heavy_at_start(room, found), *foreign(room, found, file.name))
    ]


def test_no_file_imports_what_its_room_may_not() -> None:
    assert len(FILES) > 100
    assert [text for room, file in FILES for text in complaints(room, file)] == []


@pytest.mark.parametrize(
    ("room", "line", "text"),
    [
        ("core", "from recap_cli import registry", "core may not import registry"),
        ("models", "from recap_cli.stages import prune", "models may not import stages"),
        ("plugins", "from recap_cli.core import groups", "plugins may not import core"),
        ("stages", "import transformers", "import transformers inside a function"),
        ("cli", "import torch", "import torch inside a function"),
        ("commands", "from recap_cli.stages.prune import prune", "import recap_cli.stages.prune inside a function"),
        ("core", "import numpy", "core may not import numpy"),
        ("data", "def f():\n    import pickle", "no pickle anywhere"),
    ],
)
def test_each_rule_is_seen_to_be_broken(room: str, line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(line, encoding="utf-8")
    assert any(text in complaint for complaint in complaints(room, file)), complaints(room, file)
    file.write_text("def f():\n    import math\n", encoding="utf-8")
    assert complaints(room, file) == []


def test_help_and_lists_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from recap_cli.cli import main\n"
        "codes = [main(line.split()) for line in ('--help', 'run --help', 'recipes ls', 'plugins', 'plugins --json')]\n"
        f"print(codes, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[0, 0, 0, 0, 0] []"
