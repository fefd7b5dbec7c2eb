"""One place imports matplotlib, when a figure is drawn, and never its global state."""

import ast
from pathlib import Path

import recap_cli

PACKAGE = Path(recap_cli.__file__).parent


def imports_of(tree: ast.AST) -> list[str]:
    """The modules that a file imports where it runs, and not for the types alone."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            found += imports_of(node)
    return found


def test_matplotlib_is_imported_in_one_place_and_pyplot_nowhere() -> None:
    found = {
        str(file.relative_to(PACKAGE)): drawn
        for file in PACKAGE.rglob("*.py")
        if (drawn := [name for name in imports_of(ast.parse(file.read_text())) if name.startswith(("matplotlib", "mpl_"))])
    }
    assert found == {"memory/picture.py": ["matplotlib.style", "matplotlib.figure.Figure"]}
