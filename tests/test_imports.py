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
    "errors": set(),
    "parent": set(),
    "interrupt": set(),
    "progress": set(),
    "core": {"errors"},
    "api": {"core", "errors"},
    "plugins": {"api"},
    "storage": {"errors"},
    "state": {"storage", "errors"},
    "recipe": {"errors"},
    "registry": {"core", "errors"},
    "runtime": {"core", "storage", "recipe", "registry", "errors", "progress"},
    "stages": {"runtime", "core", "storage", "state", "recipe", "registry", "errors", "parent", "progress"},
    "console": {"errors", "progress"},
    "commands": {"stages", "console", "state", "recipe", "registry", "errors", "progress"},
    "cli": {"commands", "console", "errors", "interrupt"},
    "__main__": {"cli", "parent"},
    "__init__": {"runtime", "errors"},
}
MEMBERS = {
    "draft": "state",
    "folder": "state",
    "journal": "state",
    "manifest": "state",
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
    "parent",
    "progress",
    "storage",
    "state",
    "recipe",
    "registry",
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
NAMES = [f"{room}/{path.name}" for room, path in FILES]


def test_every_module_has_a_room() -> None:
    strangers = sorted({room for room, _ in FILES} - TABLE.keys())
    assert not strangers, f"say in TABLE what these may import, or in MEMBERS where they belong: {strangers}"


@pytest.mark.parametrize(("room", "file"), FILES, ids=NAMES)
def test_imports_run_one_way(room: str, file: Path) -> None:
    for found in imports(file):
        if found.module.split(".")[0] == "recap_cli":
            target = room_of(found.module)
            assert target in TABLE[room] | {room}, f"{file}:{found.line}: {room} may not import {found.module}"


@pytest.mark.parametrize(("room", "file"), FILES, ids=NAMES)
def test_heavy_libraries_wait_until_they_are_needed(room: str, file: Path) -> None:
    late = HEAVY if room in LIGHT else HEAVY - {"torch"}
    for found in imports(file):
        if found.at_start:
            assert found.module.split(".")[0] not in late, f"{file}:{found.line}: import {found.module} inside a function"
            if room in LIGHT and found.module.split(".")[0] == "recap_cli":
                assert room_of(found.module) in LIGHT, f"{file}:{found.line}: import {found.module} inside a function"


@pytest.mark.parametrize(("room", "file"), FILES, ids=NAMES)
def test_core_and_plugins_see_torch_and_the_standard_library_only(room: str, file: Path) -> None:
    allowed = {"torch", "recap_cli"} | sys.stdlib_module_names | ({"peft"} if file.name == "lora.py" else set())
    for found in imports(file):
        top = found.module.split(".")[0]
        assert top not in ("click", "pickle"), f"{file}:{found.line}: no {top} anywhere"
        if room in ("core", "plugins"):
            assert top in allowed, f"{file}:{found.line}: {room} may not import {top}"


def test_help_and_lists_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from recap_cli.cli import main\n"
        "codes = [main(line.split()) for line in ('--help', 'run --help', 'recipes ls', 'plugins', 'plugins --json')]\n"
        f"print(codes, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[0, 0, 0, 0, 0] []"
