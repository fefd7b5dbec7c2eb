"""What a stopped writer has left goes with the next one; what the user has put there stays."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recap_cli.errors import CorruptStateError, StateError
from recap_cli.state import files
from recap_cli.state.store import State
from tests.state.made import advance, amend, committed, contents, tree

FOREIGN = (
    *("notes.txt", "full-backup/a", "full-000.zip", "round-1/a", "mine.tmp", ".git/config", "state.yaml.tmp"),
    *("full-000/notes.txt", "full-000/deep/notes.txt", "round-001/mine/b", "round-099/a", "best-001/c", "recipe-999.yaml"),
)


def test_files_of_the_user_stay_wherever_they_lie(state: State, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("x")
    for rel in FOREIGN:
        (state.path / rel).parent.mkdir(parents=True, exist_ok=True)
        (state.path / rel).write_text(rel)
    (state.path / "full-000" / "link").symlink_to(outside)
    (state.path / "best-002").symlink_to(outside)
    advance(state, "prune")
    amend(state)
    with state.writing("mask") as transaction:
        transaction.drop("full-000")
        transaction.save_text("full-001/model.txt", "one")
        transaction.set_full("full-001")
    assert tree(state.path) == committed(state.path) | set(FOREIGN)
    assert {rel: (state.path / rel).read_text() for rel in FOREIGN} == {rel: rel for rel in FOREIGN}
    assert (state.path / "full-000" / "link").is_symlink()
    assert (state.path / "best-002" / "precious.txt").exists()


@pytest.mark.parametrize(
    ("rel", "kind"),
    [
        *(("round-001/prune.txt", kind) for kind in ("file", "folder", "link", "dangling link")),
        *(("round-001", kind) for kind in ("file", "link", "dangling link")),  # a stage may write into a folder
    ],
)
def test_what_a_stage_did_not_write_is_not_overwritten(state: State, tmp_path: Path, rel: str, kind: str) -> None:
    place = state.path / rel
    place.parent.mkdir(exist_ok=True)
    (tmp_path / "outside").mkdir()
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        place.symlink_to(tmp_path / ("outside" if kind == "link" else "nowhere"))
    before = contents(state.path)
    with pytest.raises(StateError, match=rf"{rel}: is in the way of `prune`") as caught:
        advance(state, "prune")
    assert not isinstance(caught.value, CorruptStateError)
    assert f"recap run --state {state.path}" in str(caught.value.hint)
    assert contents(state.path) == before
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_recipe_of_the_users_is_not_overwritten_by_a_changed_one(state: State) -> None:
    (state.path / "recipe-002.yaml").write_text("mine")
    before = contents(state.path)
    with pytest.raises(StateError, match=r"recipe-002\.yaml: is in the way"):
        amend(state)
    assert contents(state.path) == before


def stop_in_the_cleanup(state: State, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that replaces the full model is committed, and then a second Ctrl-C comes at its first removal."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def write(patched: pytest.MonkeyPatch) -> None:
        with state.writing(stage) as transaction:
            transaction.drop("full-000")
            transaction.save_text("full-001/model.txt", "one")
            transaction.set_full("full-001")
            patched.setattr(Path, "unlink", interrupt)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        write(patched)
    assert (state.path / ".recap-transaction/names").exists()
    assert (state.path / "full-000/model.txt").exists()


@pytest.mark.parametrize("go_on", ["tidy", "the next stage", "a changed recipe"])
def test_what_a_stopped_cleanup_has_left_goes_with_the_next_writer(
    state: State, monkeypatch: pytest.MonkeyPatch, go_on: str
) -> None:
    stop_in_the_cleanup(state, "prune", monkeypatch)
    found = State.open(state.path)
    (state.path / "full-000/mine.txt").write_text("mine")
    if go_on == "tidy":
        found.tidy()
    elif go_on == "the next stage":
        advance(found, "mask")
    else:
        amend(found)
    assert tree(state.path) == committed(state.path) | {"full-000/mine.txt"}
    assert not (state.path / ".recap-transaction").exists()


def test_what_is_removed_is_flushed_before_the_journal_that_names_it_goes(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, unlink, rmtree = files.flush, Path.unlink, shutil.rmtree

    def recorded(what: str, plainly: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, *more: object, **how: object) -> None:
            events.append(f"{what} {path.relative_to(state.path).as_posix()}")
            plainly(path, *more, **how)

        return call

    with state.writing("prune") as transaction:
        transaction.drop("full-000/model.txt")
        transaction.save_text("round-001/prune.txt", "one")
        transaction.set_full("full-000")
        monkeypatch.setattr(files, "flush", recorded("flush", flush))
        monkeypatch.setattr(Path, "unlink", recorded("remove", unlink))
        monkeypatch.setattr(shutil, "rmtree", recorded("remove", rmtree))
    after = events[events.index("remove full-000/model.txt") :]
    assert {"flush .", "flush full-000"} <= set(after[: after.index("remove .recap-transaction")])


def test_tidy_writes_nothing_where_nothing_is_left(state: State) -> None:
    (state.path / ".recap-lock").unlink()
    State.open(state.path).tidy()
    assert not (state.path / ".recap-lock").exists()


@pytest.mark.parametrize("name", ["full-000/config.json", "full-000/notes.txt", "../outside.txt", "notes.txt", "full-000"])
def test_a_journal_that_is_not_as_it_was_written_removes_nothing(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (state.path / "notes.txt").write_text("mine")
    (state.path / "full-000/notes.txt").write_text("mine")
    stop_in_the_cleanup(state, "prune", monkeypatch)
    journal = state.path / ".recap-transaction/names"
    lines = journal.read_text().splitlines()
    torn = f"{hashlib.sha256(name.encode()).hexdigest()[:16]} {name}"  # without its end
    journal.write_text("\n".join([*(f"{line[:16]} {name}" for line in lines), torn]))
    before = contents(state.path)
    State.open(state.path).tidy()
    gone = (".recap-transaction/names", ".recap-writer")
    assert contents(state.path) == {rel: held for rel, held in before.items() if rel not in gone}
    assert (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "notes.txt", "/etc/hostname", "full-000/../notes.txt", ".recap-lock"])
def test_a_journal_with_names_that_are_not_ours_removes_nothing(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (state.path / "notes.txt").write_text("mine")
    stop_in_the_cleanup(state, "prune", monkeypatch)
    line = f"{hashlib.sha256(name.encode()).hexdigest()[:16]} {name}\n"
    (state.path / ".recap-transaction/names").write_text(line)
    State.open(state.path).tidy()
    assert (tmp_path / "outside.txt").exists()
    assert (state.path / "notes.txt").exists()
    assert (state.path / ".recap-lock").exists()
