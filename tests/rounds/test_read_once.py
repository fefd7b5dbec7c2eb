"""What every stage of a run asks for is read, or built, once in a process; and what one stage does to it is its own affair."""

from pathlib import Path

import pytest

from recap_cli.models import build
from recap_cli.rounds import stored
from recap_cli.rounds.run_context import Context
from recap_cli.stages.init import init
from recap_cli.state.manifest import manifest_text, read_manifest
from recap_cli.state.store import State
from tests.tiny import tiny


def test_a_manifest_that_was_read_before_shares_nothing_with_the_next(tmp_path: Path) -> None:
    root = init(tiny("vit"), tmp_path / "state").path
    first = read_manifest(root)
    text = manifest_text(first)
    first.history[0]["stage"] = "merge"
    first.versions.clear()
    assert manifest_text(read_manifest(root)) == text == (root / "state.yaml").read_text()


def test_the_meta_model_of_a_model_is_built_once_for_all_contexts_and_anew_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {name: init(tiny(name), tmp_path / name).path for name in ("vit", "deit")}
    built: list[str] = []
    plain = build.on_meta

    def on_meta(spec: build.ModelSpec) -> object:
        built.append(spec.model_type)
        return plain(spec)

    monkeypatch.setattr(stored, "_SHAPES", {})
    monkeypatch.setattr(build, "on_meta", on_meta)
    for name in ("vit", "vit", "deit", "deit"):
        context = Context(State.open(states[name]))
        assert context.layout.shapes.items() <= context._shapes_by_name.shapes.items()
    assert built == ["vit", "deit"]
