"""A recipe that is changed in its state: one commit more, and what was before stays written."""

import hashlib
import os
import re
from pathlib import Path

import pytest
import yaml

from recap_cli.errors import CorruptStateError, StateError, StateLockedError, StorageError
from recap_cli.state.manifest import CHECKSUMMED, FIELDS, manifest_text
from recap_cli.state.store import State
from tests.state.made import RECIPE, advance, alter, amend, committed, full_disk, rewrite, tree


def test_a_changed_recipe_is_committed_under_a_new_name_with_the_values_before(state: State) -> None:
    advance(state, "prune")
    amend(state)
    manifest = State.open(state.path).manifest
    assert manifest == state.manifest
    assert (manifest.recipe, manifest.recipe_digest) == ("recipe-002.yaml", "d2")
    assert state.recipe_text == State.open(state.path).recipe_text == "name: changed\n"
    (change,) = manifest.changes
    assert (change["round"], change["stage"]) == (1, "prune")
    assert (change["before"], change["after"]) == ({"finetune.micro_batch_size": None}, {"finetune.micro_batch_size": 2})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", change["changed"])
    assert [entry["stage"] for entry in manifest.history] == ["init", "prune"]
    assert tree(state.path) == committed(state.path)
    assert "recipe.yaml" not in manifest.files


def test_stages_go_on_after_a_changed_recipe_and_it_may_change_again(state: State) -> None:
    amend(state)
    advance(state, "prune")
    amend(state, 4, "name: again\n")
    advance(state, "mask")
    found = State.open(state.path)
    assert (found.manifest.recipe, found.recipe_text, found.manifest.recipe_digest) == (
        "recipe-003.yaml",
        "name: again\n",
        "d4",
    )
    assert [change["after"]["finetune.micro_batch_size"] for change in found.manifest.changes] == [2, 4]
    assert found.manifest.stage == "mask"
    assert tree(state.path) == committed(state.path)


def test_the_facts_stand_in_the_file_in_their_order_and_its_checksum_last(state: State) -> None:
    amend(state)
    text = (state.path / "state.yaml").read_text()
    assert list(yaml.safe_load(text)) == list(FIELDS)
    assert manifest_text(state.manifest) == text
    body, _, checksum = text.partition(CHECKSUMMED)
    assert checksum == f"{hashlib.sha256(body.encode()).hexdigest()}\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "../recipe.yaml"},
        {"recipe": None},
        {"recipe": "recipe.yaml"},
        {"changes": []},
        {"changes": [{"changed": "2026"}]},
        {"changes": ["x"]},
    ],
)
def test_a_changed_recipe_that_makes_no_sense_is_named(state: State, changes: dict[str, object]) -> None:
    amend(state)
    rewrite(state, **changes)
    with pytest.raises(CorruptStateError, match=r"recipe(-002.yaml')? (is missing|in files|is not in files)|changes\[0\]"):
        State.open(state.path)


def test_a_changed_recipe_that_was_edited_is_refused_under_its_name(state: State) -> None:
    amend(state)
    alter(state.path / "recipe-002.yaml", b"name: other\n")
    with pytest.raises(CorruptStateError, match=r"recipe-002\.yaml: .*not edited by hand") as caught:
        State.open(state.path)
    assert "restore recipe-002.yaml" in str(caught.value.hint)


def test_a_writer_that_has_read_the_recipe_before_it_was_changed_is_refused(state: State) -> None:
    late, later = State.open(state.path), State.open(state.path)
    amend(state)
    with pytest.raises(StateError, match="another process changed settings of this state"):
        advance(late, "prune")
    with pytest.raises(StateError, match="another process changed settings of this state"):
        amend(later)
    with pytest.raises(StateError, match="another process changed settings of this state"):
        late.load_text("recipe.yaml")
    assert tree(state.path) == committed(state.path)


def test_the_recipe_is_not_changed_while_another_process_writes(state: State) -> None:
    with state.writing("prune"), pytest.raises(StateLockedError):
        amend(State.open(state.path))
    assert State.open(state.path).manifest.recipe == "recipe.yaml"


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_while_the_recipe_is_changed_leaves_the_old_one(
    state: State, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, text = tree(state.path), (state.path / "state.yaml").read_bytes()
    monkeypatch.setattr(Path if step == "write_bytes" else os, step, full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        amend(state)
    monkeypatch.undo()
    assert (tree(state.path), (state.path / "state.yaml").read_bytes()) == (before, text)
    assert (State.open(state.path).recipe_text, state.recipe_text) == (RECIPE, RECIPE)
