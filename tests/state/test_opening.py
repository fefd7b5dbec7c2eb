"""Making and opening a state: what is refused, and in which words."""

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from recap_cli.errors import CorruptStateError, StateError, StorageError
from recap_cli.state.manifest import ELSEWHERE, checksummed
from recap_cli.state.store import State
from tests.state.made import BEST, RECIPE, alter, committed, create, rewrite, tree


def test_a_second_init_refuses_the_state_that_is_there(state: State) -> None:
    with pytest.raises(StateError, match="is a state already") as caught:
        create(state.path)
    assert "--state" in str(caught.value.hint)
    assert f"recap run --state {state.path}" in str(caught.value.hint)
    assert tree(state.path) == committed(state.path)


def test_init_refuses_a_folder_with_other_things_and_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "full-000").mkdir()
    with pytest.raises(StateError, match="not empty"):
        create(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full-000", "thesis.tex"]


def test_init_takes_an_empty_folder(tmp_path: Path) -> None:
    assert create(tmp_path).next_stage() == "prune"


@pytest.mark.parametrize("error", [RuntimeError("adapter"), KeyboardInterrupt()])
def test_a_failed_init_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(root: Path) -> None:
        with State.create(root, RECIPE, "d") as transaction:
            transaction.save_text("full-000/model.txt", "zero")
            raise error

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(type(error)):
            fail(tmp_path / name)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("kept", ["names", "model.txt", ".recap-transaction"])
@pytest.mark.parametrize("made", [True, False])
def test_a_failed_init_that_cannot_clean_up_leaves_a_folder_that_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, made: bool, error: BaseException
) -> None:
    root = tmp_path / "s"
    if not made:
        root.mkdir()

    def failing(patched: pytest.MonkeyPatch) -> None:
        with State.create(root, RECIPE, "d") as transaction:
            transaction.save_text("full-000/model.txt", "zero")
            refuse_to_remove(kept, error, patched)
            raise RuntimeError("adapter")

    with monkeypatch.context() as patched, pytest.raises((RuntimeError, KeyboardInterrupt)):
        failing(patched)
    assert root.exists()
    with pytest.raises(StateError, match="its `init` was stopped") as caught:
        State.open(root)
    assert caught.value.hint == f"recap init RECIPE --state {root}"
    state = create(root)
    assert tree(root) == committed(root)
    assert state.next_stage() == "prune"


def refuse_to_remove(name: str, error: BaseException, patched: pytest.MonkeyPatch) -> None:
    """Let every removal of a file or folder of this name fail, by `pathlib` and by `shutil`."""

    def guard(plainly: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Path | str, *more: object, **how: object) -> None:
            if Path(path).name == name:
                raise error
            plainly(path, *more, **how)

        return remove

    for place, function in ((Path, "unlink"), (os, "unlink"), (os, "rmdir")):
        patched.setattr(place, function, guard(getattr(place, function)))


def test_init_where_a_file_stands_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="is a file"):
        create(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file.s: cannot be written: Not a directory"):
        create(tmp_path / "file" / "s")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission of a folder")
@pytest.mark.usefixtures("permissions")
def test_init_in_an_unwritable_folder_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        create(tmp_path / "s")
    tmp_path.chmod(0o700)
    assert "--state" in str(caught.value.hint)


def test_opening_what_is_no_state_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, message in [("none", "there is no such folder"), ("file", "is a file"), ("folder", "has no state.yaml")]:
        with pytest.raises(StateError, match=message) as caught:
            State.open(tmp_path / name)
        new = f"recap init RECIPE --state {tmp_path / name}"
        assert caught.value.hint == (ELSEWHERE if name == "file" else new)
    (tmp_path / "folder" / "thesis.tex").touch()
    for place in (tmp_path / "folder", tmp_path / "file" / "below", Path("/dev/null"), tmp_path / ("n" * 300)):
        with pytest.raises(StateError) as caught:
            State.open(place)
        assert caught.value.hint == ELSEWHERE


def test_what_can_be_no_folder_is_not_called_unwritable(tmp_path: Path) -> None:
    for place, error, message in [
        (Path("/dev/null"), StateError, "is a file, not a folder"),
        (tmp_path / ("n" * 300), StorageError, "File name too long"),
    ]:
        with pytest.raises(error, match=message) as caught:
            create(place)
        assert "--state" in str(caught.value.hint)
        assert "writable" not in str(caught.value.hint)


def test_a_path_through_folders_that_are_not_there_makes_none_of_them(state: State, tmp_path: Path) -> None:
    around = f"{state.path}/full-000/x/../../../{state.path.name}/"
    with pytest.raises(StateError, match="is a state already"):
        create(around)  # type: ignore[arg-type]  # as text, which keeps its slashes
    assert State.open(around).path == state.path
    assert tree(state.path) == committed(state.path)
    assert not (state.path / "full-000/x").exists()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert create(tmp_path / "link" / ".." / "new").next_stage() == "prune"
    assert (tmp_path / "far" / "new" / "state.yaml").exists()


def test_a_newer_schema_is_refused_with_both_versions(state: State) -> None:
    rewrite(state, schema=7, versions={"recap": "9.1"}, files="another shape")
    with pytest.raises(StateError, match=r"schema 7, written by recap 9\.1, and this recap reads only schema 3") as caught:
        State.open(state.path)
    assert not isinstance(caught.value, CorruptStateError)
    assert "the version of recap that made the state" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no schema number"),
        ("schema: 3\nround: [", "state.yaml, line [23]: is no YAML"),
        ("schema: 3\n", "round is missing"),
        ("!!python/object/apply:os.system [echo]", "is no YAML"),
        ("!!bool maybe", "is no YAML"),
        ("schema: 3\nx: 2026-99-99\n", "is no YAML"),
        ("schema: 3\nx: " + "[" * 50_000, "is no YAML"),
        ("\0", "is no YAML"),
        ("schema: 3\nround: 0\nround: 1\n", "round stands in it twice"),
        ("schema: 3\nx:\n- {a: 1, a: 2}\n", "a stands in it twice"),
        (
            "x: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrst")),
            "schema",
        ),
    ],
)
def test_a_malformed_state_yaml_is_named(state: State, text: str, message: str) -> None:
    (state.path / "state.yaml").write_text(checksummed(text))
    with pytest.raises(CorruptStateError, match=message) as caught:
        State.open(state.path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "distill"}, "stage is missing or not"),
        ({"history": 3}, "history is missing or not"),
        ({"schema": "3"}, "has no schema number"),
        ({"round": -1}, "round is missing or not"),
        ({"round": 1}, "does not lead to init of round 1"),
        ({"round": 1000}, "does not lead to init of round 1000"),
        ({"stage": "merge"}, "does not lead to merge of round 0"),
        ({"history": []}, "does not lead to init"),
        ({"history": [{"stage": "init"}]}, r"history\[0\]\.round is missing"),
        ({"plugins": {"used": [{"name": "x"}]}}, r"plugins\.used\[0\]\.kind is missing"),
        ({"plugins": {"used": {"kind": "x"}}}, r"plugins\.used is missing or not"),
        ({"full": ".."}, r"full is '\.\.'"),
        ({"full": None}, "full is missing"),
        ({"full": "full-001"}, "full is 'full-001'"),
        ({"full": "full-0"}, "full is 'full-0'"),
        ({"full": "full-٠٠٠"}, "full is"),
        ({"small": ".."}, r"small is '\.\.'"),
        ({"small": "full-000"}, "small is 'full-000'"),
        ({"best": {}}, "best.round is missing"),
        ({"best": {**BEST, "round": ".."}}, "best.round is missing or not"),
        ({"best": {**BEST, "value": "high"}}, "best.value is missing or not"),
        ({"best": {key: value for key, value in BEST.items() if key != "loss"}}, "best.loss is missing"),
        ({"best": BEST}, "best is 'best-001'"),
        ({"versions": {"recap": 3}}, r"versions\.recap is missing or not"),
        ({"recipe": "recipe-002.yaml"}, "'recipe.yaml' in files makes no sense"),
        ({"files": {}}, "is not in files"),
        ({"files": {"../../x": {"bytes": 1, "sha256": "a" * 64}}}, r"entry of '\.\./\.\./x'"),
        ({"files": {"full-000/x": {"bytes": "1", "sha256": "a" * 64}}}, "files.full-000/x.bytes is"),
        ({"files": {"full-000/x": {"bytes": 1, "sha256": "a"}}}, "files.full-000/x.sha256 is"),
        ({"extra": 1}, "extra is missing or not"),
    ],
)
def test_a_state_yaml_that_makes_no_sense_is_named(state: State, changes: dict[str, object], message: str) -> None:
    rewrite(state, **changes)
    with pytest.raises(CorruptStateError, match=message):
        State.open(state.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("seconds", "finished", "stage", "round")
        for value in (None, "x", [1], -1)
        if (key, value) != ("finished", "x")  # a text, and nothing reckons with it
    ],
)
def test_an_entry_of_the_history_that_makes_no_sense_is_named(state: State, key: str, value: object) -> None:
    (entry,) = state.manifest.history
    rewrite(state, history=[{**entry, key: value}])
    with pytest.raises(CorruptStateError, match=rf"history\[0\]\.{key} is missing or not"):
        State.open(state.path)


def test_an_edited_recipe_is_refused(state: State) -> None:
    alter(state.path / "recipe.yaml", b"name: other\n")
    with pytest.raises(CorruptStateError, match=r"recipe.yaml: .*; the recipe of a state is not edited by hand"):
        State.open(state.path)
