"""Imports run one way, and nothing heavy is imported to print help or a list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import recap_cli

PACKAGE = Path(recap_cli.__file__).parent
PLUGINS = Path(next(iter(import_module("recap_cli.plugins").__path__)))

# Which rooms a room may see, besides itself, or which modules of one. A module of the package's top level is a room of its own.
TABLE = {
    "printable": set(),
    "progress": set(),
    "errors": {"printable"},
    "extras": {"errors"},
    "process": set(),
    "untrusted": {"errors"},
    "core": {"untrusted", "errors"},
    "trainable": {"core"},
    "api": {"core", "tasks.labels", "tasks.losses", "errors"},
    "plugins": {"api"},
    "registry": {"core", "untrusted", "errors"},
    "recipe": {"tasks.calls", "core.task", "registry", "untrusted", "errors"},
    "state": {"process", "errors"},  # a commit is told there: after it, Ctrl-C has another word
    "tasks": {"core.task", "core.ragged", "core.label_maps", "registry", "untrusted", "errors"},
    "data": {"core.task", "core.ragged", "core.label_maps", "recipe", "state", "untrusted", "errors", "progress"},
    "models": {"trainable", "core", "tasks.labels", "state", "registry", "untrusted", "extras", "errors"},
    "machine": {"trainable", "errors"},
    "training": {"machine", "trainable", "data", "tasks.losses", "core.task", "errors", "progress"},
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
TABLE["commands"] |= {"progress", "tasks.calls"}
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
LIGHT_MODULES = {"core.task", "tasks.calls", "tasks.labels"}  # of other rooms: reading a recipe looks at its task
HEAVY = {"torch", "transformers", "timm", "datasets", "sklearn", "torchvision", "torchmetrics", "matplotlib", "peft", "jinja2"}


EXTRA_OF = {"lora.py": {"peft"}, "token_classification.py": {"seqeval"}}  # what a plugin's own extra brings
PACKAGES = {"recap_cli", *(f"recap_cli.{folder.name}" for folder in PACKAGE.iterdir() if folder.is_dir())}


class Import(NamedTuple):
    module: str
    line: int
    at_start: bool  # True: runs when the file is imported, so neither in a function nor for types only
    for_types: bool = False  # True: does not run at all


def imports(file: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_start: bool, for_types: bool = False) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno, at_start, for_types) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            names = [node.module or ""]
            if node.module in PACKAGES:
                names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (Import(name, node.lineno, at_start, for_types) for name in names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_start and not inside and not types_only, for_types or types_only)

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
    if found.module.split(".")[0] != "recap_cli":
        return
    target, module = room_of(found.module), found.module.removeprefix("recap_cli.")
    if target != room and not {target, module} & TABLE[room]:
        yield f"{room} may not import {target} ({found.module})"


def is_light(room: str, file: Path) -> bool:
    """Whether printing help, listing what there is or reading a recipe imports a file."""
    return room in LIGHT or f"{room}.{file.stem}" in LIGHT_MODULES or is_task(room, file)


def is_task(room: str, file: Path) -> bool:
    return room == "plugins" and file.parent.name == "tasks"


def heavy_at_start(room: str, found: Import, file: Path) -> Iterator[str]:
    """Heavy libraries wait until they are needed, and what is light sees what is light only."""
    if not found.at_start:
        return
    top, light = found.module.split(".")[0], is_light(room, file)
    seen = LIGHT | ({"api"} if is_task(room, file) else set())  # `api` itself imports a name when it is asked for
    unseen = room_of(found.module) not in seen and found.module.removeprefix("recap_cli.") not in LIGHT_MODULES
    if (light and top == "recap_cli" and unseen) or top in (HEAVY if light else HEAVY - {"torch"}):
        yield f"import {found.module} inside a function"


def foreign(room: str, found: Import, file: Path) -> Iterator[str]:
    """`core` and plugins see torch and the standard library only, and nobody unpickles or knows click.

    A task reads labels from tables, so it sees pyarrow and numpy, and torchmetrics; its record names the types of pyarrow.
    """
    top = found.module.split(".")[0]
    allowed = {"torch", "recap_cli"} | sys.stdlib_module_names | EXTRA_OF.get(file.name, set())
    if is_task(room, file):
        allowed |= {"pyarrow", "numpy", "torchmetrics"}
    if (room, file.name) == ("core", "task.py") and found.for_types:
        allowed |= {"pyarrow"}
    if top in ("click", "pickle"):
        yield f"no {top} anywhere"
    if room in ("core", "plugins") and top not in allowed:
        yield f"{room} may not import {found.module}"


def complaints(room: str, file: Path) -> list[str]:
    """What is wrong with the imports of one file, each with its line."""
    return [
        f"{file}:{found.line}: {text}"
        for found in imports(file)
        for text in (*wrong_ways(room, found), *heavy_at_start(room, found, file), *foreign(room, found, file))
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
        ("core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyarrow", "core may not import pyarrow"),
        ("recipe", "from recap_cli.tasks.losses import mean_loss", "recipe may not import tasks (recap_cli.tasks.losses)"),
        ("recipe", "from recap_cli.core.ragged import Ragged", "recipe may not import core (recap_cli.core.ragged)"),
        ("recipe", "from recap_cli.core.ragged import Ragged", "import recap_cli.core.ragged inside a function"),
        ("tasks", "from recap_cli.data import split", "tasks may not import data"),
    ],
)
def test_each_rule_is_seen_to_be_broken(room: str, line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(line, encoding="utf-8")
    assert any(text in complaint for complaint in complaints(room, file)), complaints(room, file)
    file.write_text("def f():\n    import math\n", encoding="utf-8")
    assert complaints(room, file) == []


@pytest.mark.parametrize(
    ("room", "name", "line", "text"),
    [
        ("core", "task.py", "import torch", "import torch inside a function"),
        ("core", "task.py", "import pyarrow", "core may not import pyarrow"),
        ("tasks", "calls.py", "import torch", "import torch inside a function"),
        ("tasks", "labels.py", "from recap_cli.core.ragged import Ragged", "import recap_cli.core.ragged inside a function"),
        ("plugins", "tasks/a.py", "import torch", "import torch inside a function"),
        ("plugins", "tasks/a.py", "import torchmetrics", "import torchmetrics inside a function"),
        ("plugins", "tasks/a.py", "def f():\n    import seqeval", "plugins may not import seqeval"),
        ("plugins", "criteria/a.py", "def f():\n    import pyarrow", "plugins may not import pyarrow"),
    ],
)
def test_what_a_recipe_looks_at_is_light(room: str, name: str, line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(line, encoding="utf-8")
    assert any(text in complaint for complaint in complaints(room, file)), complaints(room, file)
    file.write_text("from recap_cli.api import Task\n" if room == "plugins" else "import math\n", encoding="utf-8")
    assert complaints(room, file) == []


def test_the_table_has_no_circle() -> None:
    graph = {room: {each.partition(".")[0] for each in may} - {room} for room, may in TABLE.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("core") < order.index("tasks") < order.index("recipe") < order.index("models")


def test_what_a_plugin_imports_when_it_asks_for_it_stands_in_the_table_too() -> None:
    from recap_cli import api

    for_types = {found.module for found in imports(PACKAGE / "api.py") if found.for_types}
    assert for_types == set(api._HOMES), "the types that are named, and where they are, are the same"
    assert sorted(api.__all__) == sorted(api._HOME_OF)
    assert all(getattr(api, name) is not None for name in api.__all__)


def test_reading_a_recipe_and_its_task_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from recap_cli import registry\n"
        "from recap_cli.recipe import recipe\n"
        "from recap_cli.tasks.calls import task_named\n"
        "metric = recipe.read('quickstart').metric\n"
        "tasks = [task_named(entry.name) for entry in registry.entries('tasks') if entry.distribution == registry.OURS]\n"
        f"print(metric.name, len(tasks), sorted({HEAVY | {'numpy', 'pyarrow'}!r} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "accuracy 7 []", done.stderr


def test_help_and_lists_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from recap_cli.cli import main\n"
        "codes = [main(line.split()) for line in ('--help', 'run --help', 'recipes ls', 'plugins', 'plugins --json')]\n"
        f"print(codes, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[0, 0, 0, 0, 0] []"
