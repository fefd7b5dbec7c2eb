"""What travels together is a record: no function of ours takes more than six arguments, and `finetune` few modules."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import recap_cli
from tests.test_imports import imports

PACKAGE = Path(recap_cli.__file__).parent
PLUGINS = Path(next(iter(import_module("recap_cli.plugins").__path__)))
MOST_ARGUMENTS, MOST_MODULES = 6, 12
OPTIONS = "an argument for each option of the command, as typer reads them"
EXCEPTIONS = {  # file:function, and why it takes more
    "commands/compare.py:compare": OPTIONS,
    "commands/compress.py:compress": OPTIONS,
    "commands/eval.py:evaluate": OPTIONS,
    "commands/profile_memory.py:profile_memory": OPTIONS,
    "memory/fake_cuda.py:_attention": "stands in for F.scaled_dot_product_attention",
    "trainable/linear.py:forward": "torch.autograd.Function: each tensor is an argument of its own",
}


def many_arguments(file: Path, root: Path) -> Iterator[str]:
    """The functions of a file that take more than six arguments, besides `self` and `cls`: file:name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            named = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs) if arg.arg not in ("self", "cls")]
            if len(named) + (given.vararg is not None) + (given.kwarg is not None) > MOST_ARGUMENTS:
                yield f"{file.relative_to(root)}:{node.name}"


def test_no_function_takes_more_than_six_arguments() -> None:
    found = [name for root in (PACKAGE, PLUGINS) for file in sorted(root.rglob("*.py")) for name in many_arguments(file, root)]
    assert set(found) == EXCEPTIONS.keys(), "make a record of what travels together, or say here why it is none"
    assert len(found) == len(EXCEPTIONS)


def test_a_function_of_seven_arguments_is_found(tmp_path: Path) -> None:
    file = tmp_path / "seven.py"
    file.write_text(
        "class Six:\n    def six(self, a, b, /, c, *, d, e, f): ...\n    def seven(self, a, b, /, c, *d, e, f, **g): ...\n"
        "def fit(a, b, c, d, e, f): ...\nasync def late(a, b, c, d, e, f, g): ...\n",
        encoding="utf-8",
    )
    assert set(many_arguments(file, tmp_path)) == {"seven.py:seven", "seven.py:late"}


def test_finetune_imports_a_dozen_of_our_modules_at_most() -> None:
    ours = {found.module for found in imports(PACKAGE / "stages/finetune.py") if found.module.startswith("recap_cli.")}
    assert 0 < len(ours) <= MOST_MODULES, sorted(ours)


def test_stages_are_short() -> None:
    lengths = {name: len((PACKAGE / f"stages/{name}.py").read_text().splitlines()) for name in ("prune", "mask", "merge")}
    assert max(lengths.values()) <= 60, lengths
