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

# Which rooms a room may see, besides itself. A module of the package's top level is a room of its own unless named in MEMBERS.
TABLE = {
    "legible": set(),
    "errors": {"legible"},
    "parent": set(),
    "interrupt": set(),
    "progress": set(),
    "strangers": {"errors"},
    "core": {"strangers", "errors"},
    "api": {"core", "errors"},
    "plugins": {"api"},
    "storage": {"errors"},
    "state": {"storage", "errors", "interrupt"},  # a commit is told there: after it, Ctrl-C has another word
    "recipe": {"errors"},
    "registry": {"core", "strangers", "errors"},
    "runtime": {"core", "storage", "recipe", "registry", "strangers", "errors", "progress"},
    "stages": {"runtime", "core", "storage", "state", "recipe", "registry", "strangers", "errors", "parent", "progress"},
    "console": {"errors", "legible", "progress"},
    "commands": {"stages", "console", "state", "recipe", "registry", "errors", "progress"},
    "cli": {"commands", "console", "registry", "errors", "legible", "interrupt"},
    "__main__": {"cli", "parent"},
    "__init__": {"runtime", "errors"},
}
MEMBERS = {
    "draft": "state",
    "folder": "state",
    "journal": "state",
    "manifest": "state",
    "model_limits": "recipe",
    "recipe_bounds": "recipe",
    "manifest_names": "state",
    "manifest_schema": "state",
    "recipe_conflicts": "recipe",
    "recipe_problems": "recipe",
    "recipe_schema": "recipe",
    "recipe_yaml": "recipe",
}
LIGHT = {
    "errors",
    "interrupt",
    "legible",
    "parent",
    "progress",
    "storage",
    "state",
    "recipe",
    "registry",
    "strangers",
    "console",
    "commands",
    "cli",
    "__main__",
}
LIGHT |= {"__init__"}
HEAVY = {"torch", "transformers", "timm", "datasets", "sklearn", "torchvision", "torchmetrics", "matplotlib", "peft", "jinja2"}


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
            if node.module in ("recap_cli", "recap_cli.commands", "recap_cli.stages", "recap_cli.runtime", "recap_cli.core"):
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
    return MEMBERS.get(top, top)


def files() -> list[tuple[str, Path]]:
    """Every file of ours with its room."""
    ours = [(path, path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
    ours = [(path, rel) for path, rel in ours if rel.parts[0] not in ("plugins", "recipes")]
    found = [(room_of("recap_cli." + ".".join(rel.with_suffix("").parts)), path) for path, rel in ours]
    return found + [("plugins", path) for path in sorted(PLUGINS.rglob("*.py"))]


FILES = files()


def test_every_module_has_a_room() -> None:
    strangers = sorted({room for room, _ in FILES} - TABLE.keys())
    assert not strangers, f"say in TABLE what these may import, or in MEMBERS where they belong: {strangers}"


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
        ("runtime", "from recap_cli.stages import prune", "runtime may not import stages"),
        ("plugins", "from recap_cli.core import groups", "plugins may not import core"),
        ("stages", "import transformers", "import transformers inside a function"),
        ("cli", "import torch", "import torch inside a function"),
        ("commands", "from recap_cli.stages.prune import prune", "import recap_cli.stages.prune inside a function"),
        ("core", "import numpy", "core may not import numpy"),
        ("runtime", "def f():\n    import pickle", "no pickle anywhere"),
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
